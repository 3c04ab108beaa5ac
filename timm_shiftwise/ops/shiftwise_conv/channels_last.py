"""The merged way with the channels of maps last in memory: on GPUs cuDNN's depthwise convolutions, not PyTorch's own.

Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3, read backwards; only for full padding (p = N - 1).
"""
import torch
from torch import Tensor

from timm_shiftwise.ops.depthwise import depthwise_conv2d
from timm_shiftwise.ops.large_kernels import assemble_centred, small_kernel_gradient

from .call import Branches, Call, Gradients


def channels_last_conv2d(call: Call) -> Branches:
    """The three branches, of all small kernels, pruned ones as zeros."""
    x = _channels_last(call.x)
    wide, tall, square = _kernels(call)
    return depthwise_conv2d(x, wide), depthwise_conv2d(x, tall), depthwise_conv2d(x, square)


def channels_last_conv2d_backward(grads: Branches, call: Call, need_x: bool, need_weight: bool) -> Gradients:
    """Gradients, those of the small kernels summed from the large ones' in float32 at least."""
    x, weight, wiring, _, focus_length, *_ = call
    x = _channels_last(x)
    grad_x, grad_kernels = None, []
    for grad, kernel in zip(grads, _kernels(call), strict=True):
        part, grad_kernel, _ = torch.ops.aten.convolution_backward(
            _channels_last(grad), x, kernel.unsqueeze(1), None, [1, 1], [side // 2 for side in kernel.shape[1:]],
            [1, 1], False, [0, 0], x.shape[1], [need_x, need_weight, False])
        if need_x:
            grad_x = part if grad_x is None else grad_x + part
        if need_weight:
            grad_kernels.append(grad_kernel[:, 0].to(torch.promote_types(weight.dtype, torch.float32)))
    if not need_weight:
        return grad_x, None
    wide, tall, square = grad_kernels
    grad_weight = small_kernel_gradient(wide, tall, square, wiring, weight.shape[1], weight.shape[2], focus_length)
    return grad_x, grad_weight.to(weight.dtype)


def _kernels(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return assemble_centred(call.weight, call.wiring, call.focus_length, call.x.shape[2], call.x.shape[3])


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)

"""The merged way: any set of small kernels, orders and repeats as one wide, one tall and one square convolution.

Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3, read backwards; only for full padding (p = N - 1).
"""
import torch
from torch import Tensor

from timm_shiftwise.ops.depthwise import depthwise_conv2d, large_depthwise_conv2d, large_kernel_gradients
from timm_shiftwise.ops.large_kernels import assemble_centred, small_kernel_gradient
from timm_shiftwise.ops.tracing import graph_leaves_python


def merged_conv2d(
        x: Tensor,
        weight: Tensor,
        wiring: Tensor,
        focus_length: int,
        padding: str = 'full',
        mask: Tensor | None = None,
        backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three branches with full padding, each as one depthwise convolution.

    Arguments and returns are those of :func:`.frontend.shiftwise_conv2d`. The convolutions are PyTorch's, of all small
    kernels, pruned ones as zeros: mask and backend are of no use here.
    """
    if torch.jit.is_scripting():
        wide, tall, square = assemble_centred(weight, wiring, focus_length)
        return depthwise_conv2d(x, wide), depthwise_conv2d(x, tall), depthwise_conv2d(x, square)
    else:
        if graph_leaves_python():
            wide, tall, square = assemble_centred(weight, wiring, focus_length)
            return depthwise_conv2d(x, wide), depthwise_conv2d(x, tall), depthwise_conv2d(x, square)
        wide, tall, square = assemble_centred(weight, wiring, focus_length, x.shape[2], x.shape[3])
        return large_depthwise_conv2d(x, wide), large_depthwise_conv2d(x, tall), large_depthwise_conv2d(x, square)


def merged_conv2d_backward(
        grads: tuple[Tensor, Tensor, Tensor],
        x: Tensor,
        weight: Tensor,
        wiring: Tensor,
        focus_length: int,
        padding: str,
        mask: Tensor | None,
        backend: str | None,
        need_x: bool,
        need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the small kernels of :func:`merged_conv2d`; None where not wanted.

    The backend is that of the gradients of the large kernels.
    """
    kernels = assemble_centred(weight, wiring, focus_length, x.shape[2], x.shape[3])
    grad_x, grad_kernels = large_kernel_gradients(grads, x, kernels, backend, need_x, need_weight)
    if grad_kernels is None:
        return grad_x, None
    grad_weight = small_kernel_gradient(*grad_kernels, wiring, weight.shape[1], weight.shape[2], focus_length)
    return grad_x, grad_weight.to(weight.dtype)

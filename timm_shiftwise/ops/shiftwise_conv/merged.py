"""The merged way: any set of small kernels, orders and repeats as one wide, one tall and one square convolution.

Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3, read backwards; only for full padding (p = N - 1).
"""
from torch import Tensor

from timm_shiftwise.ops.depthwise import depthwise_conv2d, large_depthwise_conv2d, large_kernel_gradients
from timm_shiftwise.ops.large_kernels import assemble_centred, small_kernel_gradient

from .call import Branches, Call, Gradients


def plain_merged_conv2d(x: Tensor, weight: Tensor, wiring: Tensor, focus_length: int) -> Branches:
    """The three branches in operators of PyTorch that fit every size of a map, for graphs that leave Python."""
    wide, tall, square = assemble_centred(weight, wiring, focus_length)
    return depthwise_conv2d(x, wide), depthwise_conv2d(x, tall), depthwise_conv2d(x, square)


def merged_conv2d(call: Call) -> Branches:
    """The three branches, of all small kernels, pruned ones as zeros."""
    x, weight, wiring, _, focus_length, *_ = call
    wide, tall, square = assemble_centred(weight, wiring, focus_length, x.shape[2], x.shape[3])
    return large_depthwise_conv2d(x, wide), large_depthwise_conv2d(x, tall), large_depthwise_conv2d(x, square)


def merged_conv2d_backward(grads: Branches, call: Call, need_x: bool, need_weight: bool) -> Gradients:
    """Gradients; the backend is that of the gradients of the large kernels."""
    x, weight, wiring, _, focus_length, _, backend = call
    kernels = assemble_centred(weight, wiring, focus_length, x.shape[2], x.shape[3])
    grad_x, grad_kernels = large_kernel_gradients(grads, x, kernels, backend, need_x, need_weight)
    if grad_kernels is None:
        return grad_x, None
    grad_weight = small_kernel_gradient(*grad_kernels, wiring, weight.shape[1], weight.shape[2], focus_length)
    return grad_x, grad_weight.to(weight.dtype)

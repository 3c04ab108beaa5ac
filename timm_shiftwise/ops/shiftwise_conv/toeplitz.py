"""The Toeplitz way: the merged kernels' convolutions as batched matrix products, for devices other than CPUs.

Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3, read backwards. With ``padding='same'`` some windows of a kernel are
dropped at the border, which a convolution cannot do and a matrix can.
"""
import torch
from torch import Tensor

from timm_shiftwise.ops.depthwise.toeplitz import Kernels, convolve, kernel_gradients
from timm_shiftwise.ops.large_kernels import assemble_kernels, assembled_gradient

from .call import Branches, Call, Gradients


def toeplitz_conv2d(call: Call, block: int | None = None) -> Branches:
    """The three branches, of all small kernels, pruned ones as zeros.

    Args:
        call: The call.
        block: Rows that a product makes at a time, see :func:`timm_shiftwise.ops.depthwise.toeplitz.convolve`.
    """
    x = call.x
    wide, tall, square = _kernels(call)
    h, v, i = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(3))
    convolve([x], [[wide, square]], [h, i], block)
    convolve([x.mT], [[tall]], [v.mT], block)
    return h, v, i


def toeplitz_conv2d_backward(
        grads: Branches, call: Call, need_x: bool, need_weight: bool, block: int | None = None) -> Gradients:
    """Gradients; ``block`` as for :func:`toeplitz_conv2d`."""
    x, weight, wiring, *_ = call
    grad_h, grad_v, grad_i = grads
    wide, tall, square = _kernels(call)
    grad_x = grad_weight = None
    if need_x:
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        convolve([grad_h, grad_i], [[wide.turn()], [square.turn()]], [grad_x], block)
        convolve([grad_v.mT], [[tall.turn()]], [grad_x.mT], block, add=True)
    if need_weight:
        grad_wide, grad_square = kernel_gradients(x, [grad_h, grad_i], [wide, square], block)
        grad_tall, = kernel_gradients(x.mT, [grad_v.mT], [tall], block)
        grad_weight = assembled_gradient(grad_wide, grad_tall.mT, grad_square, wiring, weight.shape[1])
        grad_weight = grad_weight.to(weight.dtype)
    return grad_x, grad_weight


def _kernels(call: Call) -> tuple[Kernels, Kernels, Kernels]:
    """The wide, the tall and the square kernels, the tall ones as wide ones of the transposed map."""
    wide, tall, square = assemble_kernels(call.weight, call.wiring)
    size, middle = square.shape[1], call.focus_length // 2
    window = size if call.padding == 'same' else 0
    long = Kernels(wide, size // 2, middle, window, masks={})
    return long, long._replace(weight=tall.mT), Kernels(square, size // 2, size // 2)

"""Depthwise convolutions in plain PyTorch, and their gradients as batched matrix products."""
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_shiftwise.ops.large_kernels import within_reach


def depthwise_conv2d(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise convolution of [B, C, H, W] with kernels [C, rows, columns] of odd sides; the size stays."""
    return F.conv2d(
        x, kernel.unsqueeze(1), bias, padding=[kernel.shape[1] // 2, kernel.shape[2] // 2], groups=kernel.shape[0])


def large_depthwise_conv2d(x: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise convolution with large kernels [C, rows, columns] of odd sides, without what lies beyond the map.

    A wide kernel runs on the transposed map on the CPU: PyTorch's kernels there are made for tall ones.
    """
    kernel = within_reach(kernel, x.shape[2], x.shape[3])
    if kernel.shape[2] > kernel.shape[1] and x.device.type == 'cpu':
        return depthwise_conv2d(x.mT.contiguous(), kernel.mT.contiguous()).mT
    return depthwise_conv2d(x, kernel)


def large_depthwise_weight_gradient(x: Tensor, grad: Tensor, rows: int, columns: int) -> Tensor:
    """Gradient of the kernels of :func:`large_depthwise_conv2d`, [C, rows, columns]."""
    height, width = min(rows, 2 * x.shape[2] - 1), min(columns, 2 * x.shape[3] - 1)  # within reach
    if height >= width:
        grad_kernel = depthwise_weight_gradient(x, grad, height, width)
    else:
        grad_kernel = depthwise_weight_gradient(x.mT, grad.mT, width, height).mT
    above, left = (rows - height) // 2, (columns - width) // 2
    return F.pad(grad_kernel, [left, left, above, above])


_WINDOW_ELEMENTS = {'cpu': 2 ** 20}
_WINDOW_ELEMENTS_ELSEWHERE = 2 ** 28
"""Shifted copies that a weight gradient makes at a time, by device: what caches hold, elsewhere what launches cost."""


def depthwise_weight_gradient(x: Tensor, grad: Tensor, rows: int, columns: int) -> Tensor:
    """Gradient of the kernels of a depthwise convolution as batched matrix products.

    For one column offset ``b`` the products of every row of the gradient with every row of the shifted input make an H
    x H matrix; element ``a`` of the kernel's column is the sum along one of its diagonals.

    Args:
        x: Input [B, C, H, W].
        grad: Gradient of the output [B, C, H, W].
        rows: Rows of the kernels, odd.
        columns: Columns of the kernels, odd.

    Returns:
        Gradient [C, rows, columns], float32 at least.
    """
    channels, height = x.shape[1], x.shape[2]
    reach = rows // 2
    if height > 3 * rows:
        # rows far apart never meet: cut the map into bands and give each the rows within reach
        bands = -(-height // rows)
        grad = F.pad(grad, [0, 0, 0, bands * rows - height])
        grad = grad.unflatten(2, (bands, rows)).transpose(1, 2).flatten(0, 1)
        x = F.pad(x, [0, 0, reach, bands * rows - height + reach])
        x = x.unfold(2, rows + 2 * reach, rows).permute(0, 2, 1, 4, 3).flatten(0, 1)
        first = 0
    else:
        first = -reach
    at_once = _WINDOW_ELEMENTS.get(x.device.type, _WINDOW_ELEMENTS_ELSEWHERE)
    chunk = max(1, at_once // max(1, columns * x[:, 0].numel()))
    parts = [
        _weight_gradient_of(x[:, c:c + chunk], grad[:, c:c + chunk], first, rows, columns)
        for c in range(0, channels, chunk)
    ]
    return torch.cat(parts)


def _weight_gradient_of(x: Tensor, grad: Tensor, first: int, rows: int, columns: int) -> Tensor:
    width = grad.shape[3]
    shifted = F.pad(x, [columns // 2, columns // 2]).unfold(3, width, 1)  # [B, C, H', columns, W]
    shifted = shifted.permute(1, 3, 2, 0, 4).flatten(3).flatten(1, 2)  # [C, columns * H', B * W]
    grad = grad.permute(1, 2, 0, 3).flatten(2)  # [C, H, B * W]
    products = torch.bmm(grad, shifted.transpose(1, 2)).unflatten(2, (columns, -1))  # [C, H, columns, H']
    return diagonal_sums(products.transpose(1, 2), first, rows).transpose(1, 2)


def diagonal_sums(matrix: Tensor, first: int, count: int) -> Tensor:
    """Sums of ``matrix[..., i, i + j]`` over i for ``count`` offsets j from ``first`` on, float32 at least."""
    rows, columns = matrix.shape[-2:]
    # rows laid one after another, each one element further to the right, line the diagonals up
    skewed = F.pad(matrix.flip(-2), [0, rows]).flatten(-2)[..., :rows * (columns + rows - 1)]
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    sums = skewed.unflatten(-1, (rows, columns + rows - 1)).sum(-2, dtype=dtype)
    # the sums run over offsets -(rows - 1) to columns - 1
    before, after = -(rows - 1) - first, first + count - columns
    return F.pad(sums, [before, after])


def large_kernel_gradients_torch(
        grads: tuple[Tensor, Tensor, Tensor], x: Tensor, kernels: tuple[Tensor, Tensor, Tensor], need_x: bool,
        need_weight: bool) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
    """See :func:`timm_shiftwise.ops.depthwise.large_kernel_gradients`.

    That of the input is a forward convolution with the turned kernels; those of the kernels, which PyTorch is slow at,
    are batched matrix products.
    """
    grad_x = None
    if need_x:
        first, second, third = (
            large_depthwise_conv2d(grad, kernel.flip(1, 2)) for grad, kernel in zip(grads, kernels, strict=True))
        grad_x = first + second + third
    if not need_weight:
        return grad_x, None
    wide, tall, square = (
        large_depthwise_weight_gradient(x, grad, kernel.shape[1], kernel.shape[2])
        for grad, kernel in zip(grads, kernels, strict=True))
    return grad_x, (wide, tall, square)

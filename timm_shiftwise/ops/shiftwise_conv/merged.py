"""The merged way: any set of small kernels, orders and repeats as one wide, one tall and one square kernel.

Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3, read backwards: with full padding (p = N - 1) every small kernel
lies at the place along the focus length that its shift stands for, and kernels at one place add up.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_shiftwise.ops.tracing import graph_leaves_python


def assemble_kernels(
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add every small kernel at its places. Differentiable.

    Args:
        weight: Small kernels [C, K, N, N].
        horizontal: Kernel index at every place of the wide branch, integer [R, C, G].
        vertical: The same for the tall branch, integer [R, C, G].
        identity: Kernel index of the centre branch, integer [R, C].

    Returns:
        The wide kernel [C, N, G * N], the tall one [C, G * N, N] and the square one [C, N, N]. Column ``M // 2`` of the
        wide and row ``M // 2`` of the tall kernel lie over the output's own position.
    """
    table = _one_table(horizontal, vertical, identity)
    channels, maps, size, _ = weight.shape
    first = torch.arange(0, channels * maps, maps, dtype=table.dtype, device=table.device)
    kernels = weight.flatten(0, 1).index_select(0, (table + first[None, :, None]).flatten())
    kernels = kernels.view(table.shape[0], channels, table.shape[2], size, size).sum(0)  # [C, 2 * G + 1, N, N]
    groups = horizontal.shape[2]
    turned, tall, square = kernels[:, :groups].mT, kernels[:, groups:2 * groups], kernels[:, 2 * groups]
    return turned.flatten(1, 2).mT, tall.flatten(1, 2), square


def _one_table(horizontal: Tensor, vertical: Tensor, identity: Tensor) -> Tensor:
    """All places of the wide, then of the tall, then of the square kernel: [R, C, 2 * G + 1]."""
    return torch.cat([horizontal, vertical, identity[:, :, None]], dim=2)


def centred(kernel: Tensor, row: int, column: int, reach: int | None = None) -> Tensor:
    """Bring kernels [C, rows, columns] to odd sides that have the given element in the middle.

    Zeros are added, and rows that are further than ``reach`` from the middle are cut off.
    """
    above, below = _rim(kernel.shape[1], row, reach)
    left, right = _rim(kernel.shape[2], column)
    return F.pad(kernel, [left, right, above, below])


def _uncentred(kernel: Tensor, row: int, column: int, rows: int, columns: int) -> Tensor:
    """Undo :func:`centred`: kernels [C, rows, columns] whose element at ``row``, ``column`` is in the middle now."""
    above, below = _rim(rows, row, kernel.shape[1] // 2)
    left, right = _rim(columns, column)
    return F.pad(kernel, [-left, -right, -above, -below])


def _rim(length: int, middle: int, reach: int | None = None) -> tuple[int, int]:
    """How much to add before and behind a side to have the element at ``middle`` there; below zero is cut off."""
    before, behind = middle, length - 1 - middle
    side = max(before, behind) if reach is None else min(max(before, behind), reach)
    return side - before, side - behind


def within_reach(kernel: Tensor, height: int, width: int) -> Tensor:
    """Cut off what only meets zeros: of kernels [C, rows, columns] of odd sides no more than 2 * H - 1 by 2 * W - 1."""
    rows, columns = kernel.shape[1], kernel.shape[2]
    above, left = max(rows // 2 - height + 1, 0), max(columns // 2 - width + 1, 0)
    if above == left == 0:
        return kernel
    return kernel[:, above:rows - above, left:columns - left]


def trimmed(kernel: Tensor) -> Tensor:
    """Cut zeros off the rim of kernels [C, rows, columns] of odd sides, alike on opposite sides, down to 1 x 1."""
    touched = (kernel != 0).any(dim=0)
    cut = []
    for axis in (0, 1):
        line = touched.any(dim=1 - axis)
        line = line | line.flip(0)
        cut.append(min(int(line.int().argmax()) if bool(line.any()) else len(line) // 2, len(line) // 2))
    return kernel[:, cut[0]:kernel.shape[1] - cut[0], cut[1]:kernel.shape[2] - cut[1]]


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


_WINDOW_ELEMENTS = 2 ** 20
"""Shifted copies that a weight gradient makes at a time: enough for the matrix product, little beside the input."""


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
    chunk = max(1, _WINDOW_ELEMENTS // max(1, columns * x[:, 0].numel()))
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
    return _diagonal_sums(products.transpose(1, 2), first, rows).transpose(1, 2)


def _diagonal_sums(matrix: Tensor, first: int, count: int) -> Tensor:
    """Sums of ``matrix[..., i, i + j]`` over i for ``count`` offsets j from ``first`` on, float32 at least."""
    rows, columns = matrix.shape[-2:]
    # rows laid one after another, each one element further to the right, line the diagonals up
    skewed = F.pad(matrix.flip(-2), [0, rows]).flatten(-2)[..., :rows * (columns + rows - 1)]
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    sums = skewed.unflatten(-1, (rows, columns + rows - 1)).sum(-2, dtype=dtype)
    # the sums run over offsets -(rows - 1) to columns - 1
    before, after = -(rows - 1) - first, first + count - columns
    return F.pad(sums, [before, after])


def merged_conv2d(
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three branches of a shift-wise convolution with full padding, each as one depthwise convolution.

    Args:
        x: Input [B, C, H, W].
        weight: Small kernels [C, K, N, N].
        horizontal: Kernel index at every place of the wide branch, integer [R, C, G].
        vertical: The same for the tall branch, integer [R, C, G].
        identity: Kernel index of the centre branch, integer [R, C].
        focus_length: M in pixels.

    Returns:
        The horizontal, vertical and identity branches, each [B, C, H, W].
    """
    if torch.jit.is_scripting():
        wide, tall, square = _centred_kernels(weight, horizontal, vertical, identity, focus_length)
        return depthwise_conv2d(x, wide), depthwise_conv2d(x, tall), depthwise_conv2d(x, square)
    else:
        if graph_leaves_python():
            wide, tall, square = _centred_kernels(weight, horizontal, vertical, identity, focus_length)
            return depthwise_conv2d(x, wide), depthwise_conv2d(x, tall), depthwise_conv2d(x, square)
        wide, tall, square = _centred_kernels(
            weight, horizontal, vertical, identity, focus_length, x.shape[2], x.shape[3])
        return large_depthwise_conv2d(x, wide), large_depthwise_conv2d(x, tall), large_depthwise_conv2d(x, square)


def _centred_kernels(
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        height: int | None = None,
        width: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The wide, the tall and the square kernel, for a map of a known size without what lies beyond it.

    The wide one is a transposed tall one in memory.
    """
    wide, tall, square = assemble_kernels(weight, horizontal, vertical, identity)
    middle, size = focus_length // 2, square.shape[1]
    return (
        centred(wide.mT, middle, size // 2, None if width is None else width - 1).mT,
        centred(tall, middle, size // 2, None if height is None else height - 1),
        centred(square, size // 2, size // 2),
    )


def large_kernel_backward(
        grad_h: Tensor,
        grad_v: Tensor,
        grad_i: Tensor,
        x: Tensor,
        wide: Tensor,
        tall: Tensor,
        square: Tensor,
        need_x: bool,
        need_weight: bool,
) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
    """Gradients of a wide, a tall and a square depthwise convolution of one input.

    That of the input is a forward convolution with the turned kernels; those of the kernels, which PyTorch is slow at,
    are batched matrix products (:func:`depthwise_weight_gradient`).

    Args:
        grad_h: Gradient of the wide kernels' output, [B, C, H, W].
        grad_v: Gradient of the tall kernels' output, [B, C, H, W].
        grad_i: Gradient of the square kernels' output, [B, C, H, W].
        x: Input [B, C, H, W].
        wide: Kernels [C, rows, columns] of odd sides.
        tall: The same.
        square: The same.
        need_x: Whether the gradient of the input is wanted.
        need_weight: Whether the gradients of the kernels are wanted.

    Returns:
        The gradient of ``x``, and those of the wide, the tall and the square kernels in float32 at least; None where
        not wanted.
    """
    grads, kernels = (grad_h, grad_v, grad_i), (wide, tall, square)
    grad_x = grad_kernels = None
    if need_x:
        grad_x = large_depthwise_conv2d(grad_h, wide.flip(1, 2))
        for grad, kernel in zip(grads[1:], kernels[1:], strict=True):
            grad_x = grad_x + large_depthwise_conv2d(grad, kernel.flip(1, 2))
    if need_weight:
        grad_kernels = tuple(
            large_depthwise_weight_gradient(x, grad, kernel.shape[1], kernel.shape[2])
            for grad, kernel in zip(grads, kernels, strict=True))
    return grad_x, grad_kernels


def merged_conv2d_backward(
        grad_h: Tensor,
        grad_v: Tensor,
        grad_i: Tensor,
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        need_x: bool,
        need_weight: bool,
        in_taichi: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the small kernels of :func:`merged_conv2d`; None where not wanted.

    They are those of the large kernels, of which every small kernel gathers its places; ``in_taichi`` makes them in one
    Taichi kernel instead of PyTorch's operators.
    """
    backward = large_kernel_backward
    if in_taichi:
        from .taichi_large import large_kernel_backward_taichi as backward
    kernels = _centred_kernels(weight, horizontal, vertical, identity, focus_length, x.shape[2], x.shape[3])
    grad_x, grads = backward(grad_h, grad_v, grad_i, x, *kernels, need_x, need_weight)
    if grads is None:
        return grad_x, None
    size, groups = weight.shape[2], horizontal.shape[2]
    wide, tall, square = grads
    middle, length = focus_length // 2, groups * size
    pieces = torch.cat([
        _uncentred(wide.mT, middle, size // 2, length, size).unflatten(1, (groups, size)).mT,
        _uncentred(tall, middle, size // 2, length, size).unflatten(1, (groups, size)),
        _uncentred(square, size // 2, size // 2, size, size).unsqueeze(1),
    ], dim=1)  # [C, 2 * G + 1, N, N]
    uses = _uses(_one_table(horizontal, vertical, identity), weight.shape[1], pieces.dtype)
    return grad_x, torch.bmm(uses.mT, pieces.flatten(2)).view_as(weight).to(weight.dtype)


def _uses(table: Tensor, maps: int, dtype: torch.dtype) -> Tensor:
    """How often a table [R, C, places] names each of K kernels: [C, places, K]."""
    index = table.permute(1, 2, 0).long()  # [C, places, R]
    uses = torch.zeros([*index.shape[:2], maps], dtype=dtype, device=table.device)
    return uses.scatter_add_(2, index, torch.ones((), dtype=dtype, device=table.device).expand(index.shape))


def add_centred(first: Tensor, second: Tensor) -> Tensor:
    """Add kernels [C, rows, columns] of odd sides, middle over middle, in the larger of the sides."""
    rows, columns = max(first.shape[1], second.shape[1]), max(first.shape[2], second.shape[2])

    def grown(kernel: Tensor) -> Tensor:
        vertical, horizontal = (rows - kernel.shape[1]) // 2, (columns - kernel.shape[2]) // 2
        return F.pad(kernel, [horizontal, horizontal, vertical, vertical])

    return grown(first) + grown(second)


def large_kernel_conv2d(x: Tensor, tall: Tensor, wide: Tensor, bias: Tensor) -> Tensor:
    """A tall and a wide depthwise convolution, added.

    Args:
        x: Input [B, C, H, W].
        tall: Kernels [C, rows, columns] of odd sides.
        wide: Kernels [C, rows, columns] of odd sides.
        bias: Bias [C].

    Returns:
        Output [B, C, H, W].
    """
    if torch.jit.is_scripting():
        return depthwise_conv2d(x, tall, bias) + depthwise_conv2d(x, wide)
    else:
        if graph_leaves_python() or torch.compiler.is_compiling() or x.device.type != 'cpu':
            return depthwise_conv2d(x, tall, bias) + depthwise_conv2d(x, wide)
        first, second = large_kernel_conv2d_terms(x, tall, wide, bias)
        return first.add_(second)


def large_kernel_conv2d_terms(x: Tensor, tall: Tensor, wide: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The two convolutions whose sum is :func:`large_kernel_conv2d`, outside of graphs."""
    return depthwise_conv2d(x, within_reach(tall, x.shape[2], x.shape[3]), bias), large_depthwise_conv2d(x, wide)

"""Large kernels made of small ones: assembled, centred, cut to what a map can feel.

Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3, read backwards: with full padding (p = N - 1) every small kernel
lies at the place along the focus length that its shift stands for, and kernels at one place add up.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_shiftwise.geometry import num_groups


def assemble_kernels(weight: Tensor, wiring: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add every small kernel at its places. Differentiable.

    Args:
        weight: Small kernels [C, K, N, N].
        wiring: Kernel index at every place of the wide branch, then of the tall branch, then of the centre branch;
            integer [R, C, 2 * G + 1].

    Returns:
        The wide kernel [C, N, G * N], the tall one [C, G * N, N] and the square one [C, N, N]. Column ``M // 2`` of the
        wide and row ``M // 2`` of the tall kernel lie over the output's own position.
    """
    channels, maps, size, _ = weight.shape
    first = torch.arange(0, channels * maps, maps, dtype=wiring.dtype, device=wiring.device)
    kernels = weight.flatten(0, 1).index_select(0, (wiring + first[None, :, None]).flatten())
    kernels = kernels.view(wiring.shape[0], channels, wiring.shape[2], size, size).sum(0)  # [C, 2 * G + 1, N, N]
    groups = wiring.shape[2] // 2
    turned, tall, square = kernels[:, :groups].mT, kernels[:, groups:2 * groups], kernels[:, 2 * groups]
    return turned.flatten(1, 2).mT, tall.flatten(1, 2), square


def assemble_centred(
        weight: Tensor, wiring: Tensor, focus_length: int, height: int | None = None,
        width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels of :func:`assemble_kernels`, of odd sides with the output's own position in the middle.

    For a map of a known size the long sides are without what lies beyond it. The wide kernel is a transposed tall one
    in memory.
    """
    wide, tall, square = assemble_kernels(weight, wiring)
    middle, size = focus_length // 2, square.shape[1]
    return (
        centred(wide.mT, middle, size // 2, None if width is None else width - 1).mT,
        centred(tall, middle, size // 2, None if height is None else height - 1),
        centred(square, size // 2, size // 2),
    )


def small_kernel_gradient(
        wide: Tensor, tall: Tensor, square: Tensor, wiring: Tensor, maps: int, kernel_size: int,
        focus_length: int) -> Tensor:
    """Gradient of the small kernels, each the sum over the places where it lies: [C, K, N, N].

    Args:
        wide: Gradient of the wide kernels that :func:`assemble_centred` makes.
        tall: That of the tall ones.
        square: That of the square ones.
        wiring: See :func:`assemble_kernels`.
        maps: K, small kernels a channel.
        kernel_size: N in pixels.
        focus_length: M in pixels.
    """
    groups, size = wiring.shape[2] // 2, kernel_size
    middle, length = focus_length // 2, groups * size
    return assembled_gradient(
        _uncentred(wide.mT, middle, size // 2, length, size).mT,
        _uncentred(tall, middle, size // 2, length, size),
        _uncentred(square, size // 2, size // 2, size, size), wiring, maps)


def assembled_gradient(wide: Tensor, tall: Tensor, square: Tensor, wiring: Tensor, maps: int) -> Tensor:
    """Gradient of the small kernels, [C, K, N, N], of those of the kernels that :func:`assemble_kernels` makes."""
    groups, size = wiring.shape[2] // 2, square.shape[1]
    pieces = torch.cat([
        wide.mT.unflatten(1, (groups, size)).mT,
        tall.unflatten(1, (groups, size)),
        square.unsqueeze(1),
    ], dim=1)  # [C, 2 * G + 1, N, N]
    index = wiring.permute(1, 2, 0).long()  # [C, 2 * G + 1, R]
    uses = torch.zeros([*index.shape[:2], maps], dtype=pieces.dtype, device=wiring.device)  # of each kernel, by place
    uses.scatter_add_(2, index, torch.ones((), dtype=pieces.dtype, device=wiring.device).expand(index.shape))
    return torch.bmm(uses.mT, pieces.flatten(2)).unflatten(2, (size, size))


def merged_sides(focus_length: int, kernel_size: int, assembled: bool = True) -> tuple[int, int]:
    """Long and short side, both odd, of the kernels that an operator merges to.

    Args:
        focus_length: M in pixels.
        kernel_size: N in pixels.
        assembled: Whether the long side is G * N, as that of assembled small kernels is, or M.
    """
    length = num_groups(focus_length, kernel_size) * kernel_size if assembled else focus_length
    middle, short = focus_length // 2, 2 * (kernel_size // 2) + 1
    return max(2 * max(middle, length - 1 - middle) + 1, short), short  # the square kernel lies within the tall one


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


def grown(kernel: Tensor, rows: int, columns: int) -> Tensor:
    """Add zeros all around kernels of odd sides, up to larger odd sides."""
    above, left = (rows - kernel.shape[-2]) // 2, (columns - kernel.shape[-1]) // 2
    return F.pad(kernel, [left, left, above, above])


def within_reach(kernel: Tensor, height: int, width: int) -> Tensor:
    """Cut off what only meets zeros: of kernels [..., rows, columns] of odd sides, 2 * H - 1 by 2 * W - 1 remain."""
    rows, columns = kernel.shape[-2], kernel.shape[-1]
    above, left = max(rows // 2 - height + 1, 0), max(columns // 2 - width + 1, 0)
    if above == left == 0:
        return kernel
    return kernel[..., above:rows - above, left:columns - left]

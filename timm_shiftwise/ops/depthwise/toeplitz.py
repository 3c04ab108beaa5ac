"""Depthwise convolutions with long kernels as batched matrix products, for devices that multiply matrices best.

A row of the output is a sum over the kernel's rows: of a row of the map times a Toeplitz matrix [W, W], whose diagonals
hold the elements of that row of the kernel. A block of rows of the output is one product: of all rows of the map that
it sees. A map much wider than the kernel is cut into tiles of columns, whose windows overlap by the kernel's length.
The gradient of the input is the same with turned kernels; that of the kernels is a product and sums along diagonals.

Kernels are wide here; a tall one is a wide one of the transposed map. Shapes and steps follow from the shapes of the
arguments alone, so that a device is never waited for.
"""
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_shiftwise.geometry import map_size, small_padding

from .torch_impl import diagonal_sums

LEAST_TEMPORARIES = 64 * 2 ** 20
"""Bytes of temporary memory that a call may take at any size."""
TEMPORARIES_PER_INPUT = 8
"""Multiple of the input's bytes that it may take where that is more."""
_ALIGNED = 8
"""Columns of a matrix are a multiple of this: tensor cores want it."""
_BLOCK, _TILE = 4, 64
"""Rows and columns of the output that a product makes at a time, on maps large enough."""


class Kernels(NamedTuple):
    """Kernels of a depthwise convolution, and where they lie.

    Attributes:
        weight: Kernels [C, rows, columns].
        row: Row that lies over the output's own position.
        column: Column that does.
        window: Columns of the windows that lie side by side in the kernel, of which those centred outside of the map
            are dropped, as ``padding='same'`` does; 0 drops none.
        turned: Whether the kernels are those of the gradient of the input.
        masks: What :func:`_kept` has made, to be shared by the kernels of one call that drop windows.
    """
    weight: Tensor
    row: int
    column: int
    window: int = 0
    turned: bool = False
    masks: dict[tuple[Any, ...], Tensor] | None = None

    def turn(self) -> 'Kernels':
        """The kernels that make the gradient of the input of that of the output."""
        _, rows, columns = self.weight.shape
        return self._replace(
            weight=self.weight.flip(1, 2), row=rows - 1 - self.row, column=columns - 1 - self.column, turned=True)


class _Layout(NamedTuple):
    """How a map is cut; counts of rows and columns.

    Attributes:
        height: H of the map.
        width: W of the map.
        rows: Rows of the kernels.
        row: Row of the kernels over the output's own position.
        block: Rows of the output in a block.
        blocks: Blocks.
        tile: Columns of the output in a tile.
        tiles: Tiles.
        seen: Columns of the map that a tile sees, beyond the border, too.
        before: Those of them that lie before the tile.
        matrices: Tiles that have a matrix of their own: all where windows are dropped, else 1.
    """
    height: int
    width: int
    rows: int
    row: int
    block: int
    blocks: int
    tile: int
    tiles: int
    seen: int
    before: int
    matrices: int


def default_block(height: int) -> int:
    """Rows of the output that a product makes at a time if nobody says: all of a low map, else 4.

    More rows are copied less often, (rows + N - 1) / rows times, but are more multiply-adds.
    """
    return height if height <= 2 * _BLOCK else _BLOCK


def convolve(
        inputs: Sequence[Tensor], kernels: Sequence[Sequence[Kernels]], outs: Sequence[Tensor],
        block: int | None = None, add: bool = False) -> None:
    """Convolve some inputs with kernels for each of some outputs, and write to each output the sum over the inputs.

    Args:
        inputs: Inputs, each [B, C, H, W].
        kernels: For each input its kernels for each output, all with the same rows.
        outs: Where to write, each [B, C, H, W].
        block: Rows of the output that a product makes at a time; None for :func:`default_block`.
        add: Whether to add to what ``outs`` hold.
    """
    layout = _layout(inputs[0].shape[2], inputs[0].shape[3], [each for row in kernels for each in row], block)
    for part in _parts(inputs[0], layout, len(inputs), len(outs)):
        _convolve_part([x[:, part] for x in inputs], kernels, [out[:, part] for out in outs], part, layout, add)


def _convolve_part(
        inputs: Sequence[Tensor], kernels: Sequence[Sequence[Kernels]], outs: Sequence[Tensor], part: slice,
        layout: _Layout, add: bool) -> None:
    product = torch.bmm(_windows(inputs, layout), _toeplitz(kernels, part, layout, inputs[0].dtype))
    batch, channels, height, width = inputs[0].shape
    product = product.view(channels, layout.tiles, batch, layout.blocks * layout.block, len(outs), layout.tile)
    for out, rows in zip(outs, product.unbind(4), strict=True):
        here = rows.permute(2, 0, 3, 1, 4)[:, :, :height].flatten(3)[..., :width]  # [B, C, H, W]
        if add:
            out.add_(here)
        else:
            out.copy_(here)


def kernel_gradients(
        x: Tensor, grads: Sequence[Tensor], kernels: Sequence[Kernels], block: int | None = None) -> list[Tensor]:
    """Gradients of the kernels that make several outputs of one input.

    Args:
        x: Input [B, C, H, W].
        grads: Gradients of the outputs, each [B, C, H, W].
        kernels: The kernels of each output.
        block: See :func:`convolve`.

    Returns:
        The gradient of each kernel, [C, rows, columns], in float32 at least.
    """
    layout = _layout(x.shape[2], x.shape[3], kernels, block)
    found = [
        _kernel_gradients_of(x[:, part], [grad[:, part] for grad in grads], kernels, layout)
        for part in _parts(x, layout, 1, len(grads))]
    return found[0] if len(found) == 1 else [torch.cat(parts) for parts in zip(*found, strict=True)]


def _kernel_gradients_of(
        x: Tensor, grads: Sequence[Tensor], kernels: Sequence[Kernels], layout: _Layout) -> list[Tensor]:
    own = layout._replace(rows=1, row=0, seen=layout.tile, before=0)  # a block sees its own rows, a tile its columns
    product = torch.bmm(_windows([x], layout).transpose(1, 2), _windows(grads, own)).view(
        x.shape[1], layout.matrices, layout.block + layout.rows - 1, layout.seen, layout.block, len(grads), layout.tile)
    sums = _at_rows(product, layout).sum(-1, dtype=torch.promote_types(x.dtype, torch.float32))
    del product
    gradients = []
    for each, kernel in zip(sums.unbind(3), kernels, strict=True):  # [C, matrices, seen, tile, rows]
        if kernel.window:
            each = each * _kept(kernel, layout, x.device).unsqueeze(-1)
        each = each.squeeze(1) if layout.matrices == 1 else each.sum(1)
        diagonals = each.permute(0, 3, 2, 1)  # [C, rows, tile, seen]
        gradients.append(diagonal_sums(diagonals, layout.before - kernel.column, kernel.weight.shape[2]))
    return gradients


@torch.library.custom_op('timm_shiftwise::tall_wide_conv2d', mutates_args=())
def tall_wide_conv2d(x: Tensor, tall: Tensor, wide: Tensor) -> Tensor:
    """Sum of a tall and a wide depthwise convolution, without derivatives.

    Args:
        x: Input [B, C, H, W].
        tall: Kernels [C, rows, columns] of odd sides.
        wide: Kernels [C, rows, columns] of odd sides.

    Returns:
        Output [B, C, H, W], laid out as ``x`` is.
    """
    out = torch.empty_like(x)
    convolve([x], [[Kernels(wide, wide.shape[1] // 2, wide.shape[2] // 2)]], [out])
    convolve([x.mT], [[Kernels(tall.mT, tall.shape[2] // 2, tall.shape[1] // 2)]], [out.mT], add=True)
    return out


@tall_wide_conv2d.register_fake
def _(x: Tensor, tall: Tensor, wide: Tensor) -> Tensor:
    return torch.empty_like(x)


def _layout(height: int, width: int, kernels: Sequence[Kernels], block: int | None) -> _Layout:
    before = max(each.column for each in kernels)
    beyond = before + max(each.weight.shape[2] - 1 - each.column for each in kernels)
    block = min(block or default_block(height), height)
    if _aligned(width) <= _aligned(_TILE + beyond):  # one tile, which sees the map alone
        tiles, before = 1, 0
        tile = seen = _aligned(width)
    else:
        tiles = -(-width // _TILE)
        tile = _aligned(-(-width // tiles))
        seen = _aligned(tile + beyond)
    matrices = tiles if any(each.window for each in kernels) else 1
    rows, row = kernels[0].weight.shape[1], kernels[0].row
    return _Layout(height, width, rows, row, block, -(-height // block), tile, tiles, seen, before, matrices)


def _aligned(columns: int) -> int:
    return -(-columns // _ALIGNED) * _ALIGNED


def _parts(x: Tensor, layout: _Layout, inputs: int, outputs: int) -> Iterator[slice]:
    """Channels that are worked on at a time, so that temporary memory stays bounded."""
    batch, channels, *_ = x.shape
    rows = layout.block + layout.rows - 1
    maps = batch * layout.blocks * layout.tiles
    planes = batch * (layout.blocks * layout.block + rows) * ((layout.tiles - 1) * layout.tile + layout.seen)
    windows, own = maps * rows * inputs * layout.seen, maps * layout.block * outputs * layout.tile
    columns = layout.matrices * layout.rows * layout.seen * layout.tile
    matrix = layout.matrices * rows * inputs * layout.seen * layout.block * outputs * layout.tile
    products = windows + max(planes, own + matrix + 2 * columns)
    sums = 3 * matrix + 2 * (outputs + 5) * columns  # of which half types have a copy in float32, as PyTorch sums
    needed = x.element_size() * max(products, sums)
    at_once = max(1, max(TEMPORARIES_PER_INPUT * x.nbytes, LEAST_TEMPORARIES) // needed)
    for first in range(0, channels, at_once):
        yield slice(first, min(first + at_once, channels))


def _windows(maps: Sequence[Tensor], layout: _Layout) -> Tensor:
    """What each block and tile sees of maps [B, C, H, W]: [C * matrices, the rest of tiles * B * blocks, rows seen]."""
    batch, channels, height, width = maps[0].shape
    rows = layout.block + layout.rows - 1
    out = maps[0].new_empty(channels, layout.tiles, batch, layout.blocks, rows, len(maps), layout.seen)
    right = (layout.tiles - 1) * layout.tile + layout.seen - layout.before - width
    below = (layout.blocks - 1) * layout.block + rows - layout.row - height
    for to, x in zip(out.unbind(5), maps, strict=True):
        # in one expression, so that the padded planes of one map are gone before those of the next are made
        to.copy_(
            F.pad(x.transpose(0, 1), [layout.before, right, layout.row, below])
            .unfold(2, rows, layout.block).unfold(3, layout.seen, layout.tile)  # [C, B, blocks, tiles, rows, seen]
            .permute(0, 3, 1, 2, 4, 5))
    products = layout.tiles // layout.matrices * batch * layout.blocks
    return out.view(channels * layout.matrices, products, rows * len(maps) * layout.seen)


def _toeplitz(
        kernels: Sequence[Sequence[Kernels]], part: slice, layout: _Layout, dtype: torch.dtype) -> Tensor:
    """The matrices by which :func:`_windows` are multiplied: [C * matrices, rows seen, rows made]."""
    inputs, outputs = len(kernels), len(kernels[0])
    rows = layout.block + layout.rows - 1
    channels = part.stop - part.start
    matrix = kernels[0][0].weight.new_zeros(
        channels, layout.matrices, rows, inputs, layout.seen, layout.block, outputs, layout.tile, dtype=dtype)
    for i, row in enumerate(kernels):
        places = _at_rows(matrix[:, :, :, i], layout)  # [C, matrices, seen, outputs, tile, rows, block]
        for to, kernel in zip(places.unbind(3), row, strict=True):
            # column i of what is seen and column j of the tile meet in the kernel's column i - j - before + its own
            columns = kernel.weight.shape[2]
            left = layout.tile - 1 + layout.before - kernel.column
            weight = F.pad(kernel.weight[part], [left, layout.seen + layout.tile - 1 - left - columns])
            diagonals = weight.unfold(2, layout.tile, 1).flip(3).unsqueeze(1)  # [C, 1, rows, seen, tile]
            if kernel.window:
                diagonals = diagonals * _kept(kernel, layout, weight.device).unsqueeze(-3)
            to.copy_(diagonals.permute(0, 1, 3, 4, 2).unsqueeze(-1))
    return matrix.view(channels * layout.matrices, -1, layout.block * outputs * layout.tile)


def _at_rows(matrix: Tensor, layout: _Layout) -> Tensor:
    """A view of where matrices [C, matrices, rows seen, seen, block, ...] have the rows of the kernels.

    Row y of a block meets them in the rows seen from the y-th on: [C, matrices, seen, ..., rows of the kernels, block].
    """
    return matrix.unfold(2, layout.rows, 1).diagonal(0, 2, 4)


def _kept(kernel: Kernels, layout: _Layout, device: torch.device) -> Tensor:
    """Which elements of the matrices belong to windows that are centred in the map: bool [matrices, seen, tile]."""
    masks = {} if kernel.masks is None else kernel.masks
    key = layout, kernel.column, kernel.turned
    if key not in masks:
        # column i of what is seen and column j of the tile; turned kernels have the forward convolution's j for i
        column = kernel.weight.shape[2] - 1 - kernel.column if kernel.turned else kernel.column
        seen = torch.arange(-layout.before, layout.seen - layout.before, device=device).view(-1, 1)
        own = torch.arange(layout.tile, device=device)
        place, other = (own, seen) if kernel.turned else (seen, own)
        centre = place - (place - (other - column)).remainder(kernel.window)
        if layout.matrices > 1:
            tiles = torch.arange(0, layout.tiles * layout.tile, layout.tile, device=device)
            centre = centre + tiles.view(-1, 1, 1)
        first = -small_padding(kernel.window, 'same')
        masks[key] = centre.clamp(first, first + map_size(layout.width, kernel.window, 'same') - 1) == centre
    return masks[key]

"""The fused way: small convolutions, shifts and additions in one Taichi kernel that makes only kept groups' maps.

Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3. Nothing K times as large as the input is written to memory, neither
here nor for backward, and the cost is in proportion to the share of kept groups.
"""
import torch
from torch import Tensor

from timm_shiftwise.geometry import shift
from timm_shiftwise.ops.shift_add.taichi_rows import list_length as gradient_list_length
from timm_shiftwise.ops.taichi_lanes import (
    MAX_ELEMENTS,
    kinds,
    most_vectors,
    num_tasks,
    pack_size,
    packed,
    scratch,
)
from timm_shiftwise.ops.taichi_runtime import launching, num_threads

from .taichi_rows import backward_kernel, backward_layout, forward_kernel, forward_layout, list_length


def kept_groups(weight: Tensor) -> Tensor:
    """Which small kernels [C, K, N, N] are not all zero: bool [C, K]."""
    return (weight.detach() != 0).flatten(2).any(2)


def _integers(table: Tensor) -> Tensor:
    return table.detach().to(torch.int32).contiguous().view(-1)


def fused_conv2d_taichi(
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        padding: str,
        mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kept small convolutions of every channel, shift their maps to their places and add them up.

    Args:
        x: Input [B, C, H, W] on the CPU; float64, float32, float16 or bfloat16, any memory format.
        weight: Small kernels [C, K, N, N].
        horizontal: Kernel index at every place of the wide branch, integer [R, C, G].
        vertical: The same for the tall branch, integer [R, C, G].
        identity: Kernel index of the centre branch, integer [R, C].
        focus_length: M in pixels.
        padding: ``'full'`` or ``'same'``.
        mask: Kept groups, bool [C, K]; the others count as zero. None keeps those that are not all zero.

    Returns:
        The horizontal, vertical and identity branches, each [B, C, H, W] in the dtype of ``x``.
    """
    out_h, out_v, out_i = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(3))
    _forward(x, weight, horizontal, vertical, identity, focus_length, padding, mask, (out_h, out_v, out_i))
    return out_h, out_v, out_i


def folded_conv2d_taichi(
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        padding: str,
        factors: Tensor,
        skip: bool,
        kept: Tensor,
        ghost: Tensor,
) -> Tensor:
    """The whole operator at inference: the branches of :func:`fused_conv2d_taichi` times a factor each, added up.

    Args:
        x: Input [B, dim, H, W], see :func:`fused_conv2d_taichi`.
        weight: Small kernels [C, K, N, N]; those that are all zero cost nothing.
        horizontal: See :func:`fused_conv2d_taichi`.
        vertical: See :func:`fused_conv2d_taichi`.
        identity: See :func:`fused_conv2d_taichi`.
        focus_length: See :func:`fused_conv2d_taichi`.
        padding: See :func:`fused_conv2d_taichi`.
        factors: What the horizontal, the vertical and the identity branch are multiplied by, and a bias; [4, C].
        skip: Whether the input itself is added.
        kept: Channels of ``x`` that are worked on, [C].
        ghost: The others, [dim - C].

    Returns:
        The channels worked on, then the ghosts: [B, dim, H, W] in the dtype of ``x``.
    """
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    if len(ghost) > 0:
        out[:, len(kept):] = x.index_select(1, ghost)
    unused = out.new_empty(0)
    _forward(
        x, weight, horizontal, vertical, identity, focus_length, padding, None, (out, unused, unused), kept, factors,
        skip)
    return out


def _forward(
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        padding: str,
        mask: Tensor | None,
        outs: tuple[Tensor, ...],
        read: Tensor | None = None,
        factors: Tensor | None = None,
        skip: bool = False,
) -> None:
    """Write the branches into three tensors, or, with ``factors``, their sum into the first of them."""
    batch, in_channels, height, width = x.shape
    channels, maps, size, _ = weight.shape
    shuffles, _, groups = horizontal.shape
    mask = kept_groups(weight) if mask is None else mask
    kind, real = kinds(x.dtype)
    summed = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights = weight.detach().to(summed).contiguous().view(-1)
    tables = _integers(mask), _integers(horizontal), _integers(vertical), _integers(identity)
    read = torch.arange(channels) if read is None else read
    folded = factors is not None
    factors = torch.empty(0, dtype=summed) if factors is None else factors.detach().to(summed).contiguous().view(-1)
    step = max(1, MAX_ELEMENTS // max(1, in_channels * height * width))
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        planes = (part.stop - part.start) * channels
        x_part, parts = x[part].contiguous(), [out[part] for out in outs]
        pack = pack_size(width, x_part, *parts)
        with launching(x.device):
            layout = forward_layout(maps, height, width, focus_length, size, padding, most_vectors())
            tasks = num_tasks(planes)
            stride = list_length(maps, groups, shuffles)
            forward_kernel(real, pack)(
                packed(x_part, pack), weights, *tables, layout.places, layout.classes, layout.inside, _integers(read),
                factors, torch.empty(channels * stride, dtype=torch.int32), scratch(tasks * layout.size, x.dtype),
                *(packed(out, pack) for out in parts), planes, channels, in_channels, outs[0].shape[1], maps, height,
                width, shuffles, groups, shift(0, focus_length, size, 'full'), layout.left, layout.row, layout.columns,
                layout.wide, layout.source, layout.size, stride, tasks, size, layout.made, layout.tile,
                padding == 'same', folded, skip, num_threads(), kind)


def fused_conv2d_backward_taichi(
        grad_h: Tensor,
        grad_v: Tensor,
        grad_i: Tensor,
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        padding: str,
        mask: Tensor | None = None,
        need_x: bool = True,
        need_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the small kernels of :func:`fused_conv2d_taichi`.

    Args:
        grad_h: Gradient of the horizontal branch, [B, C, H, W].
        grad_v: Gradient of the vertical branch, [B, C, H, W].
        grad_i: Gradient of the identity branch, [B, C, H, W].
        x: See :func:`fused_conv2d_taichi`.
        weight: See :func:`fused_conv2d_taichi`.
        horizontal: See :func:`fused_conv2d_taichi`.
        vertical: See :func:`fused_conv2d_taichi`.
        identity: See :func:`fused_conv2d_taichi`.
        focus_length: M in pixels.
        padding: ``'full'`` or ``'same'``.
        mask: Kept groups, bool [C, K]; the others have a gradient of zero. None means all: a kernel that happens to be
            zero has a gradient all the same.
        need_x: Whether the gradient of the input is wanted.
        need_weight: Whether the gradient of the kernels is wanted.

    Returns:
        The gradients of ``x`` and of ``weight`` in their dtypes, None where not wanted.
    """
    batch, channels, height, width = x.shape
    maps, size = weight.shape[1], weight.shape[2]
    shuffles, _, groups = horizontal.shape
    mask = torch.ones(channels, maps, dtype=torch.int32) if mask is None else mask
    kind, real = kinds(x.dtype)
    summed = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights = weight.detach().to(summed).contiguous().view(-1)
    tables = _integers(mask), _integers(horizontal), _integers(vertical), _integers(identity)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    grad_weight = torch.zeros(weight.shape if need_weight else [0], dtype=summed)
    part_weight = torch.empty_like(grad_weight)
    step = max(1, MAX_ELEMENTS // max(1, channels * height * width))
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        maps_read = [plane[part].to(x.dtype).contiguous() for plane in (grad_h, grad_v, grad_i, x)]
        grad_part = grad_x[part] if need_x else grad_x
        pack = pack_size(width, *maps_read, grad_part)
        with launching(x.device):
            layout = backward_layout(maps, height, width, focus_length, size, padding, most_vectors())
            inner = layout.gradients
            tasks = num_tasks(channels)
            lists = torch.empty(channels * gradient_list_length(maps, groups, shuffles), dtype=torch.int32)
            backward_kernel(real, pack)(
                *(packed(plane, pack) for plane in maps_read), weights, *tables,
                inner.places, inner.used, layout.inside, lists, scratch(tasks * layout.size, x.dtype),
                packed(grad_part, pack), part_weight.view(-1), part.stop - part.start, channels,
                maps, height, width, shuffles, groups, shift(0, focus_length, size, 'full'), inner.left, inner.row,
                inner.narrow, inner.vectors, inner.size, layout.wide, layout.source, layout.partial, layout.size, tasks,
                size, inner.tile, padding == 'same', need_x, need_weight, num_threads(), kind)
        grad_weight += part_weight
    return grad_x if need_x else None, grad_weight.to(weight.dtype) if need_weight else None

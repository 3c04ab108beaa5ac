"""The shift-add in Taichi, forward and backward.

Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3; :mod:`.torch_impl` is the definition. The kernels
(:mod:`.taichi_rows` for CPUs, :mod:`.taichi_gather` for GPUs) are in gather form: each output element is written once,
by one thread, without atomics. They sum in float32, or float64 where the maps have it. bfloat16, which Taichi does not
know, goes in and out as bits.

The CUDA side was written with care but not run: no CUDA machine was at hand.
"""
import torch
from torch import Tensor

from timm_shiftwise.geometry import crop, image_size, map_size, shift
from timm_shiftwise.ops.taichi_lanes import (
    LANES,
    MAX_ELEMENTS,
    flat,
    kinds,
    most_vectors,
    num_tasks,
    pack_size,
    packed,
    scratch,
)
from timm_shiftwise.ops.taichi_runtime import launching, num_threads

from .taichi_gather import backward_gather, forward_gather
from .taichi_rows import backward_kernel, backward_layout, forward_kernel, forward_layout, list_length


def _table(table: Tensor) -> Tensor:
    return table.detach().to(torch.int32).contiguous().view(-1)


def _parts(batch: int, elements: int) -> list[slice]:
    """Cut a batch into parts that Taichi can index; ``elements`` of the largest array belong to one image."""
    step = max(1, MAX_ELEMENTS // max(elements, 1))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _in_rows(device: torch.device) -> bool:
    """Whether the kernels that work on whole rows in vectors run, and not those with one thread an element."""
    return device.type == 'cpu'


def shift_add_taichi(
        y: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        kernel_size: int,
        padding: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shift the small convolutions' maps to their places and add them up; see :func:`.torch_impl.shift_add_torch`.

    Args:
        y: Maps, [B, C * K, map(H), map(W)], K maps a channel; float64, float32, float16 or bfloat16.
        horizontal: Map index at every place of the wide branch, integer [R, C, G].
        vertical: Map index at every place of the tall branch, integer [R, C, G].
        identity: Map index of the centre branch, integer [R, C].
        focus_length: M in pixels.
        kernel_size: N in pixels.
        padding: ``'full'`` or ``'same'``.

    Returns:
        The horizontal, vertical and identity branches, each [B, C, H, W] in the dtype of ``y``.
    """
    shuffles, channels, groups = horizontal.shape
    batch, rows, map_height, map_width = y.shape
    height = image_size(map_height, kernel_size, padding)
    width = image_size(map_width, kernel_size, padding)
    out_h, out_v, out_i = (y.new_empty([batch, channels, height, width]) for _ in range(3))
    tables = _table(horizontal), _table(vertical), _table(identity)
    kind, real = kinds(y.dtype)
    e = crop(kernel_size, padding)
    for part in _parts(batch, rows * map_height * map_width):
        branches = [out[part] for out in (out_h, out_v, out_i)]
        planes = (part.stop - part.start) * channels
        sizes = (
            channels, rows // channels, height, width, map_height, map_width, shuffles, groups,
            shift(0, focus_length, kernel_size, padding), kernel_size, e)
        with launching(y.device):
            if not _in_rows(y.device):
                forward_gather(flat(y[part]), *tables, *map(flat, branches), planes, *sizes, kind, real)
                continue
            pack = pack_size(width, *branches)
            layout = forward_layout(
                rows // channels, map_height, map_width, width, focus_length, kernel_size, padding, most_vectors())
            tasks = num_tasks(planes)
            entries = torch.empty(channels * (layout.places.shape[0] + groups + 1) * shuffles, dtype=torch.int32)
            forward_kernel(real, pack)(
                flat(y[part]), *tables, layout.places, layout.classes, entries, scratch(tasks * layout.size, y.dtype),
                *(packed(branch, pack) for branch in branches), planes, *sizes, layout.left, layout.row, layout.vectors,
                layout.size, tasks, layout.tile, layout.left % LANES, num_threads(), kind)
    return out_h, out_v, out_i


def shift_add_backward_taichi(
        grad_h: Tensor,
        grad_v: Tensor,
        grad_i: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        maps: int,
        focus_length: int,
        kernel_size: int,
        padding: str,
) -> Tensor:
    """The adjoint of :func:`shift_add_taichi`; see :func:`.torch_impl.shift_add_backward_torch`.

    Args:
        grad_h: Gradient of the horizontal branch, [B, C, H, W].
        grad_v: Gradient of the vertical branch, [B, C, H, W].
        grad_i: Gradient of the identity branch, [B, C, H, W].
        horizontal: See :func:`shift_add_taichi`.
        vertical: See :func:`shift_add_taichi`.
        identity: See :func:`shift_add_taichi`.
        maps: K, maps a channel.
        focus_length: M in pixels.
        kernel_size: N in pixels.
        padding: ``'full'`` or ``'same'``.

    Returns:
        Gradient of the maps, [B, C * K, map(H), map(W)] in the dtype of the gradients.
    """
    shuffles, channels, groups = horizontal.shape
    batch, _, height, width = grad_h.shape
    map_height, map_width = map_size(height, kernel_size, padding), map_size(width, kernel_size, padding)
    grad_y = grad_h.new_empty([batch, channels * maps, map_height, map_width])
    tables = _table(horizontal), _table(vertical), _table(identity)
    kind, real = kinds(grad_h.dtype)
    e = crop(kernel_size, padding)
    for part in _parts(batch, channels * maps * map_height * map_width):
        grads = [grad[part].contiguous() for grad in (grad_h, grad_v, grad_i)]
        planes = (part.stop - part.start) * channels
        sizes = (
            channels, maps, height, width, map_height, map_width, shuffles, groups,
            shift(0, focus_length, kernel_size, padding), kernel_size, e)
        with launching(grad_h.device):
            if not _in_rows(grad_h.device):
                backward_gather(*map(flat, grads), *tables, flat(grad_y[part]), planes, *sizes, kind, real)
                continue
            pack = pack_size(width, *grads)
            layout = backward_layout(height, width, map_width, focus_length, kernel_size, padding, most_vectors())
            tasks = num_tasks(planes)
            entries = torch.empty(channels * list_length(maps, groups, shuffles), dtype=torch.int32)
            backward_kernel(real, pack)(
                *(packed(grad, pack) for grad in grads), *tables, layout.places, layout.used, entries,
                scratch(tasks * layout.size, grad_h.dtype), flat(grad_y[part]), planes, *sizes, layout.left, layout.row,
                layout.narrow, layout.vectors, layout.size, tasks, layout.tile, e % LANES, num_threads(), kind)
    return grad_y

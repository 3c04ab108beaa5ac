"""The shift-add in Taichi, forward and backward.

Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3; :mod:`.torch_impl` is the definition. Every kernel is in gather form (each
output element is written once, by one thread, without atomics) and sums in float32, or float64 where the maps have it.
bfloat16, which Taichi does not know, goes in and out as bits.

The CUDA side was written with care but not run: no CUDA machine was at hand.
"""
from typing import Any

import torch
from torch import Tensor

from timm_shiftwise.geometry import crop, image_size, map_size, shift
from timm_shiftwise.ops.taichi_runtime import import_taichi, launching

ti = import_taichi()

_MAX_ELEMENTS = 2 ** 31 - 1  # of an array that Taichi can index


@ti.func
def _load(array: ti.template(), index, kind: ti.template(), real: ti.template()):
    value = ti.cast(0, real)
    if ti.static(kind == ti.i16):
        value = ti.bit_cast(ti.cast(array[index], ti.i32) << 16, ti.f32)
    else:
        value = ti.cast(array[index], real)
    return value


@ti.func
def _store(array: ti.template(), index, value, kind: ti.template()):
    if ti.static(kind == ti.i16):
        word = ti.bit_cast(value, ti.i32)
        rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16  # to nearest, ties to even
        if (word & 0x7fffffff) > 0x7f800000:  # rounding could turn a NaN into an infinity
            rounded = (word >> 16) | 0x40
        array[index] = ti.cast(rounded, ti.i16)
    else:
        array[index] = ti.cast(value, kind)


@ti.kernel
def _forward_gather(
        y: ti.types.ndarray(ndim=1),
        horizontal: ti.types.ndarray(dtype=ti.i32, ndim=1),
        vertical: ti.types.ndarray(dtype=ti.i32, ndim=1),
        identity: ti.types.ndarray(dtype=ti.i32, ndim=1),
        out_h: ti.types.ndarray(ndim=1),
        out_v: ti.types.ndarray(ndim=1),
        out_i: ti.types.ndarray(ndim=1),
        batch: ti.i32, channels: ti.i32, maps: ti.i32, height: ti.i32, width: ti.i32, map_height: ti.i32, map_width: ti.i32,
        shuffles: ti.i32, groups: ti.i32, first_shift: ti.i32, kernel_size: ti.i32, e: ti.i32,
        kind: ti.template(), real: ti.template(),
):
    for pixel in range(batch * channels * height * width):
        j = pixel % width
        i = pixel // width % height
        plane = pixel // (width * height)
        c = plane % channels
        area = ti.cast(map_height * map_width, ti.i64)
        first = plane * maps * area
        sum_h = ti.cast(0, real)
        sum_v = ti.cast(0, real)
        sum_i = ti.cast(0, real)
        for r in range(shuffles):
            entry = (r * channels + c) * groups
            for g in range(groups):
                s = first_shift - g * kernel_size
                if 0 <= j - s < map_width:
                    sum_h += _load(y, first + horizontal[entry + g] * area + (i + e) * map_width + j - s, kind, real)
                if 0 <= i - s < map_height:
                    sum_v += _load(y, first + vertical[entry + g] * area + (i - s) * map_width + j + e, kind, real)
            sum_i += _load(y, first + identity[r * channels + c] * area + (i + e) * map_width + j + e, kind, real)
        _store(out_h, pixel, sum_h, kind)
        _store(out_v, pixel, sum_v, kind)
        _store(out_i, pixel, sum_i, kind)


@ti.kernel
def _backward_gather(
        grad_h: ti.types.ndarray(ndim=1),
        grad_v: ti.types.ndarray(ndim=1),
        grad_i: ti.types.ndarray(ndim=1),
        horizontal: ti.types.ndarray(dtype=ti.i32, ndim=1),
        vertical: ti.types.ndarray(dtype=ti.i32, ndim=1),
        identity: ti.types.ndarray(dtype=ti.i32, ndim=1),
        grad_y: ti.types.ndarray(ndim=1),
        batch: ti.i32, channels: ti.i32, maps: ti.i32, height: ti.i32, width: ti.i32, map_height: ti.i32, map_width: ti.i32,
        shuffles: ti.i32, groups: ti.i32, first_shift: ti.i32, kernel_size: ti.i32, e: ti.i32,
        kind: ti.template(), real: ti.template(),
):
    for pixel in range(batch * channels * maps * map_height * map_width):
        q = pixel % map_width
        p = pixel // map_width % map_height
        k = pixel // (map_width * map_height) % maps
        plane = pixel // (map_width * map_height * maps)
        c = plane % channels
        first = ti.cast(plane, ti.i64) * height * width
        row_inside = 0 <= p - e < height
        column_inside = 0 <= q - e < width
        total = ti.cast(0, real)
        for r in range(shuffles):
            entry = (r * channels + c) * groups
            for g in range(groups):
                s = first_shift - g * kernel_size
                if row_inside and horizontal[entry + g] == k and 0 <= q + s < width:
                    total += _load(grad_h, first + (p - e) * width + q + s, kind, real)
                if column_inside and vertical[entry + g] == k and 0 <= p + s < height:
                    total += _load(grad_v, first + (p + s) * width + q - e, kind, real)
            if row_inside and column_inside and identity[r * channels + c] == k:
                total += _load(grad_i, first + (p - e) * width + q - e, kind, real)
        _store(grad_y, pixel, total, kind)


def _flat(tensor: Tensor) -> Tensor:
    # a kernel must not see requires_grad (Taichi would make a .grad) and knows bfloat16 as bits only
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).view(-1)


def _table(table: Tensor) -> Tensor:
    return table.detach().to(torch.int32).contiguous().view(-1)


def _kinds(dtype: torch.dtype) -> tuple[Any, Any]:
    """Taichi's types of the elements of a flat array (see :func:`_flat`) and of sums of them."""
    return {
        torch.float64: (ti.f64, ti.f64),
        torch.float32: (ti.f32, ti.f32),
        torch.float16: (ti.f16, ti.f32),
        torch.bfloat16: (ti.i16, ti.f32),
    }[dtype]


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
    outs = tuple(y.new_empty([batch, channels, height, width]) for _ in range(3))
    tables = _table(horizontal), _table(vertical), _table(identity)
    step = max(1, _MAX_ELEMENTS // (rows * map_height * map_width))
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        with launching(y.device):
            _forward_gather(
                _flat(y[part]), *tables, *(_flat(out[part]) for out in outs), part.stop - part.start, channels,
                rows // channels, height, width, map_height, map_width, shuffles, groups,
                shift(0, focus_length, kernel_size, padding), kernel_size, crop(kernel_size, padding),
                *_kinds(y.dtype))
    return outs


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
    step = max(1, _MAX_ELEMENTS // (channels * maps * map_height * map_width))
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        with launching(grad_h.device):
            _backward_gather(
                *(_flat(grad[part]) for grad in (grad_h, grad_v, grad_i)), *tables, _flat(grad_y[part]),
                part.stop - part.start, channels, maps, height, width, map_height, map_width, shuffles, groups,
                shift(0, focus_length, kernel_size, padding), kernel_size, crop(kernel_size, padding),
                *_kinds(grad_h.dtype))
    return grad_y

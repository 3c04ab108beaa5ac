"""The shift-add for GPUs: one thread an output element, each reading what it sums.

Written with care but not run on CUDA: no CUDA machine was at hand. (The tests run these kernels on the CPU.)
"""
# mypy: disable-error-code="valid-type, name-defined"
from timm_shiftwise.ops.taichi.lanes import load, store
from timm_shiftwise.ops.taichi.runtime import import_taichi

ti = import_taichi()


@ti.kernel
def forward_gather(
        y: ti.types.ndarray(ndim=1),
        wiring: ti.types.ndarray(dtype=ti.i32, ndim=1),
        out_h: ti.types.ndarray(ndim=1),
        out_v: ti.types.ndarray(ndim=1),
        out_i: ti.types.ndarray(ndim=1),
        planes: ti.i32, channels: ti.i32, maps: ti.i32, height: ti.i32, width: ti.i32, map_height: ti.i32,
        map_width: ti.i32, shuffles: ti.i32, groups: ti.i32, first_shift: ti.i32, kernel_size: ti.i32, e: ti.i32,
        kind: ti.template(), real: ti.template(),
):
    """The three branches, one thread an output pixel."""
    for pixel in range(planes * height * width):
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
            entry = (r * channels + c) * (2 * groups + 1)
            for g in range(groups):
                s = first_shift - g * kernel_size
                if 0 <= j - s < map_width:
                    sum_h += load(y, first + wiring[entry + g] * area + (i + e) * map_width + j - s, kind, real)
                if 0 <= i - s < map_height:
                    at = first + wiring[entry + groups + g] * area
                    sum_v += load(y, at + (i - s) * map_width + j + e, kind, real)
            sum_i += load(y, first + wiring[entry + 2 * groups] * area + (i + e) * map_width + j + e, kind, real)
        store(out_h, pixel, sum_h, kind)
        store(out_v, pixel, sum_v, kind)
        store(out_i, pixel, sum_i, kind)


@ti.kernel
def backward_gather(
        grad_h: ti.types.ndarray(ndim=1),
        grad_v: ti.types.ndarray(ndim=1),
        grad_i: ti.types.ndarray(ndim=1),
        wiring: ti.types.ndarray(dtype=ti.i32, ndim=1),
        grad_y: ti.types.ndarray(ndim=1),
        planes: ti.i32, channels: ti.i32, maps: ti.i32, height: ti.i32, width: ti.i32, map_height: ti.i32,
        map_width: ti.i32, shuffles: ti.i32, groups: ti.i32, first_shift: ti.i32, kernel_size: ti.i32, e: ti.i32,
        kind: ti.template(), real: ti.template(),
):
    """The gradient of the maps, one thread an element of a map."""
    for pixel in range(planes * maps * map_height * map_width):
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
            entry = (r * channels + c) * (2 * groups + 1)
            for g in range(groups):
                s = first_shift - g * kernel_size
                if row_inside and wiring[entry + g] == k and 0 <= q + s < width:
                    total += load(grad_h, first + (p - e) * width + q + s, kind, real)
                if column_inside and wiring[entry + groups + g] == k and 0 <= p + s < height:
                    total += load(grad_v, first + (p + s) * width + q - e, kind, real)
            if row_inside and column_inside and wiring[entry + 2 * groups] == k:
                total += load(grad_i, first + (p - e) * width + q - e, kind, real)
        store(grad_y, pixel, total, kind)

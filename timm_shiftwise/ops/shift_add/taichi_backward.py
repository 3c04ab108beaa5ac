"""The adjoint of :mod:`.taichi_forward`: every map gathers from the branches' gradients what was read of it, for CPUs.

The three gradients of a plane are copied into scratch memory, the wide branch's once for each misalignment that occurs.
For the shift-add the gradients of the maps are written out; for the fused convolution those of the image and of the
small kernels are made of them, for kept groups only.
"""
# mypy: disable-error-code="valid-type, name-defined"
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_shiftwise.geometry import crop, num_groups, shift
from timm_shiftwise.ops.taichi.lanes import (
    joined,
    lane_sum,
    load_row,
    packed_type,
    store_row,
    store_vector,
    tile,
    zeros,
)
from timm_shiftwise.ops.taichi.runtime import LANES, import_taichi

from .taichi_forward import inside_of_maps, load_image, zero_outside

ti = import_taichi()


class BackwardLayout(NamedTuple):
    """Where things lie in scratch, in vectors.

    Attributes:
        left: Vectors of zeros before a row of the wide branch's gradient.
        row: Vectors in a row of the wide branch's gradient.
        narrow: Vectors in a row of the other two, in which column j of the image is lane E + j.
        vectors: Vectors that hold a row of a map, a multiple of ``chunk``.
        wide_vectors: Vectors that hold a row of the image.
        source: Vectors in a row of the padded image.
        partial: Vectors in a row of the gradient of the image, of which there is one for every column of a kernel.
        gradients_at: First vector of the branches' gradients.
        maps_at: First vector of the maps' gradients.
        size: Vectors that a task needs.
        chunk: Vectors that are summed at once.
        places: int32 [G, 2]: for every place, the misalignment of its reads and the vector of a row where it reads for
            the first column of a map; misalignment -1 if it never touches the image.
        used: int32 [LANES]: whether a misalignment occurs.
        inside: int32 [4]: first and last row, and first and last column, of a map that are not zero by its padding.
    """
    left: int
    row: int
    narrow: int
    vectors: int
    wide_vectors: int
    source: int
    partial: int
    gradients_at: int
    maps_at: int
    size: int
    chunk: int
    places: Tensor
    used: Tensor
    inside: Tensor


@lru_cache(maxsize=256)
def backward_layout(
        maps: int, height: int, width: int, focus_length: int, kernel_size: int, padding: str, most: int,
        convolved: bool) -> BackwardLayout:
    """The layout for K maps a channel and images of one size; see :func:`.taichi_forward.forward_layout`."""
    def up(value: int) -> int:
        return -(-value // LANES)

    extra = kernel_size - 1
    map_width = width + extra
    groups = num_groups(focus_length, kernel_size)
    shifts = {place: shift(place, focus_length, kernel_size, 'full') for place in range(groups)}
    touching = {place: s for place, s in shifts.items() if -map_width < s < width}
    left = up(max([0, *(-s for s in touching.values())]))
    count = tile(up(map_width), most)
    vectors = -(-up(map_width) // count) * count
    row = up(left * LANES + max(width, vectors * LANES + max([*touching.values(), 0]))) + 1
    narrow = max(up(crop(kernel_size, 'full') + width), vectors)
    starts = {place: [s % LANES, left + s // LANES] for place, s in touching.items()}
    places = torch.tensor([starts.get(place, [-1, 0]) for place in range(groups)], dtype=torch.int32)
    used = torch.tensor([bool((places[:, 0] == m).any()) for m in range(LANES)], dtype=torch.int32)
    source = vectors + 1 + up(kernel_size)
    partial = max(vectors, up(width)) + 1 + up(kernel_size)
    gradients_at = kernel_size * (height + 2 * extra) * source if convolved else 0  # behind the image
    maps_at = gradients_at + (LANES * row + 2 * narrow) * height + 2 * vectors
    if convolved:  # all maps of a channel, the kernels, and a row of the image
        size = maps_at + maps * ((height + extra) * vectors + kernel_size ** 2) + kernel_size * partial + up(width)
    else:  # a row of a map
        size = maps_at + vectors + 1
    return BackwardLayout(
        left, row, narrow, vectors, up(width), source, partial, gradients_at, maps_at, size, count, places, used,
        inside_of_maps(height, width, kernel_size, padding))


def write_list_length(maps: int, groups: int, shuffles: int) -> int:
    """Integers that the lists of one channel take; see :func:`_list_writes`."""
    return 2 * (maps + 1) + 2 * groups * shuffles + maps


@ti.func
def _list_writes(
        lists: ti.template(), at, c, channels, maps, height, row, shuffles, groups, first_shift, kernel_size,
        wiring: ti.template(), places: ti.template()):
    """List what each map of one channel gathers: where the entries of each map begin, wide then tall, and the entries.

    An entry of the wide branch is the vector of its gradient that the map's first column reads, one of the tall branch
    a shift. The uses of each map as identity come last.
    """
    h = at + 2 * (maps + 1)
    v = h + groups * shuffles
    for k in range(maps):
        lists[at + k] = h
        lists[at + maps + 1 + k] = v
        uses = 0
        for r in range(shuffles):
            entry = (r * channels + c) * (2 * groups + 1)
            for g in range(groups):
                if wiring[entry + g] == k and places[g, 0] >= 0:
                    lists[h] = places[g, 0] * height * row + places[g, 1]
                    h += 1
                if wiring[entry + groups + g] == k:
                    lists[v] = first_shift - g * kernel_size
                    v += 1
            if wiring[entry + 2 * groups] == k:
                uses += 1
        lists[at + 2 * (maps + 1) + 2 * groups * shuffles + k] = uses
    lists[at + maps] = h
    lists[at + 2 * maps + 1] = v


@ti.func
def _load_gradients(
        memory: ti.template(), wide, tall, centre, grad_h: ti.template(), grad_v: ti.template(), grad_i: ti.template(),
        source, height, width, left, row, narrow, e, used: ti.template(), crop_lane: ti.template(),
        pack: ti.template(), kind: ti.template(), real: ti.template(), vector: ti.template()):
    """Copy the gradients of a plane into scratch, that of the wide branch once for each misalignment that occurs."""
    for i in range(height):
        line = source + ti.cast(i, ti.i64) * width
        load_row(memory, wide + i * row + left, 0, grad_h, line, width, pack, kind, real, vector)
        load_row(
            memory, tall + i * narrow + e // LANES, crop_lane, grad_v, line, width, pack, kind, real, vector)
        load_row(
            memory, centre + i * narrow + e // LANES, crop_lane, grad_i, line, width, pack, kind, real, vector)
    for m in ti.static(range(1, LANES)):
        if used[m] > 0:
            copy = wide + m * height * row
            for n in range(height * row - 1):
                memory[copy + n] = joined(memory[wide + n], memory[wide + n + 1], m, vector)


@ti.func
def _gather_row(
        memory: ti.template(), target, wide, tall, centre, p, k, lists: ti.template(), at, maps, height, row, narrow,
        vectors, reads, e, count: ti.template(), real: ti.template(), vector: ti.template()):
    """Gather row ``p`` of the gradient of map ``k`` into scratch; ``reads`` is the length of the lists of entries."""
    uses = ti.cast(lists[at + 2 * (maps + 1) + reads + k], real)
    inside = 0 <= p - e < height
    column = 0  # in vectors
    while column < vectors:
        sums = ti.static(zeros(count, vector))
        here = ti.cast(column, ti.i64)
        if inside:
            for entry in range(lists[at + k], lists[at + k + 1]):
                near = wide + lists[entry] + (p - e) * row + here
                for n in ti.static(range(count)):
                    sums[n] += memory[near + n]
            if uses > 0:
                near = centre + (p - e) * narrow + here
                for n in ti.static(range(count)):
                    sums[n] += uses * memory[near + n]
        for entry in range(lists[at + maps + 1 + k], lists[at + maps + 2 + k]):
            line = p + lists[entry]
            if 0 <= line < height:
                near = tall + line * narrow + here
                for n in ti.static(range(count)):
                    sums[n] += memory[near + n]
        for n in ti.static(range(count)):
            memory[target + column + n] = sums[n]
        column += count


@ti.func
def _store_from(
        target: ti.template(), start, count, source: ti.template(), at, lane: ti.template(), kind: ti.template(),
        real: ti.template(), vector: ti.template()):
    """Copy ``count`` elements of a row of scratch, from lane ``lane`` of vector ``at`` on, to a flat array."""
    near = at + lane // LANES
    for v in range((count + LANES - 1) // LANES):
        value = source[near + v]
        if ti.static(lane % LANES > 0):
            value = joined(value, source[near + v + 1], ti.static(lane % LANES), vector)
        store_vector(target, start, count, v, value, 1, kind, real)


@cache
def backward_kernel(real: Any, pack: int, convolved: bool) -> Any:
    """The kernel that gathers the maps' gradients; it sums in a type of Taichi's.

    Args:
        real: That type.
        pack: Numbers of a row that are read and written at once, see
            :func:`timm_shiftwise.ops.taichi.lanes.pack_size`.
        convolved: Whether to make of them the gradients of the image, into ``grad_x`` in packs, and of the kernels;
            else they are written to ``grad_x``, flat, as they are.
    """
    vector, array = ti.types.vector(LANES, real), packed_type(real, pack)
    target_type = array if convolved else ti.types.ndarray(ndim=1)

    @ti.kernel
    def shift_backward_rows(
            grad_h: array,
            grad_v: array,
            grad_i: array,
            x: array,
            weight: ti.types.ndarray(dtype=real, ndim=1),
            mask: ti.types.ndarray(dtype=ti.i32, ndim=1),
            wiring: ti.types.ndarray(dtype=ti.i32, ndim=1),
            places: ti.types.ndarray(dtype=ti.i32, ndim=2),
            used: ti.types.ndarray(dtype=ti.i32, ndim=1),
            inside: ti.types.ndarray(dtype=ti.i32, ndim=1),
            lists: ti.types.ndarray(dtype=ti.i32, ndim=1),
            memory: ti.types.ndarray(dtype=vector, ndim=1),
            grad_x: target_type,
            grad_weight: ti.types.ndarray(dtype=real, ndim=1),
            batch: ti.i32, channels: ti.i32, maps: ti.i32, height: ti.i32, width: ti.i32, shuffles: ti.i32,
            groups: ti.i32, first_shift: ti.i32, left: ti.i32, row: ti.i32, narrow: ti.i32, vectors: ti.i32,
            wide_vectors: ti.i32, source: ti.i32, partial: ti.i32, gradients_at: ti.i32, maps_at: ti.i32,
            size: ti.i32, tasks: ti.i32,
            n: ti.template(), chunk: ti.template(), masked: ti.template(), want_x: ti.template(), want_w: ti.template(),
            threads: ti.template(), kind: ti.template(),
    ):
        e = ti.static(n - 1 - n // 2)
        map_height = height + n - 1
        reads = 2 * groups * shuffles
        stride = 2 * (maps + 1) + reads + maps
        ti.loop_config(parallelize=threads)
        for c in range(channels):
            _list_writes(
                lists, c * stride, c, channels, maps, height, row, shuffles, groups, first_shift, n, wiring, places)

        ti.loop_config(parallelize=threads)
        for task in range(tasks):
            image = ti.cast(task, ti.i64) * size
            for v in range(size):
                memory[image + v] = vector(0)
            lines = (height + 2 * (n - 1)) * source  # vectors of one copy of the image
            wide = image + gradients_at
            tall = wide + LANES * height * row
            centre = tall + height * narrow
            base = image + maps_at
            kernels = base + maps * map_height * vectors
            parts = kernels + maps * n * n
            done = parts + n * partial
            begin = ti.cast(ti.cast(task, ti.i64) * channels // tasks, ti.i32)
            end = ti.cast(ti.cast(task + 1, ti.i64) * channels // tasks, ti.i32)
            for c in range(begin, end):
                if ti.static(want_w):
                    for t in range(maps * n * n):
                        memory[kernels + t] = vector(0)
                for sample in range(batch):
                    first = (ti.cast(sample, ti.i64) * channels + c) * height * width
                    _load_gradients(
                        memory, wide, tall, centre, grad_h, grad_v, grad_i, first, height, width, left, row, narrow, e,
                        used, ti.static(e % LANES), pack, kind, real, vector)
                    if ti.static(want_w):
                        load_image(memory, image, x, first, height, width, source, n, pack, kind, real, vector)
                    for k in range(maps):
                        if mask[c * maps + k] > 0:
                            for p in range(inside[0], inside[1]):
                                to = base
                                if ti.static(convolved):
                                    to += ti.cast((k * map_height + p) * vectors, ti.i64)
                                _gather_row(
                                    memory, to, wide, tall, centre, p, k, lists, c * stride, maps, height, row, narrow,
                                    vectors, reads, e, chunk, real, vector)
                                if ti.static(not convolved):
                                    plane = (ti.cast(sample, ti.i64) * channels + c) * maps + k
                                    line = plane * (inside[1] - inside[0]) + p - inside[0]
                                    _store_from(
                                        grad_x, line * (inside[3] - inside[2]), inside[3] - inside[2], memory, to,
                                        ti.static(e if masked else 0), kind, real, vector)
                                elif ti.static(masked):
                                    zero_outside(memory, to, vectors, inside[2], inside[3])
                            if ti.static(want_w):
                                for b in ti.static(range(n)):
                                    sums = ti.static(zeros(n, vector))
                                    for p in range(inside[0], inside[1]):
                                        near = base + ti.cast((k * map_height + p) * vectors, ti.i64)
                                        seen = image + b * lines + ti.cast(p * source, ti.i64)
                                        for v in range(vectors):
                                            grad = memory[near + v]
                                            for a in ti.static(range(n)):
                                                sums[a] += grad * memory[seen + a * source + v]
                                    for a in ti.static(range(n)):
                                        # written out: += on an array is atomic, which vectors cannot be
                                        at = kernels + (k * n + a) * n + b
                                        memory[at] = memory[at] + sums[a]
                    if ti.static(want_x):
                        for i in range(height):
                            for v in range(vectors):
                                sums = ti.static(zeros(n, vector))
                                for k in range(maps):
                                    if mask[c * maps + k] > 0:
                                        near = base + ti.cast((k * map_height + i) * vectors + v, ti.i64)
                                        for a in ti.static(range(n)):
                                            grad = memory[near + (n - 1 - a) * vectors]
                                            for b in ti.static(range(n)):
                                                sums[b] += weight[((c * maps + k) * n + a) * n + b] * grad
                                for b in ti.static(range(n)):
                                    memory[parts + b * partial + v] = sums[b]
                            for v in range(wide_vectors):
                                total = vector(0)
                                for b in ti.static(range(n)):
                                    near = parts + b * partial + v + (n - 1 - b) // LANES
                                    lane = ti.static((n - 1 - b) % LANES)
                                    if ti.static(lane == 0):
                                        total += memory[near]
                                    else:
                                        total += joined(memory[near], memory[near + 1], lane, vector)
                                memory[done + v] = total
                            store_row(
                                grad_x, first + ti.cast(i, ti.i64) * width, width, memory, done, pack, kind, real)
                if ti.static(want_w):
                    for t in range(maps * n * n):
                        grad_weight[c * maps * n * n + t] = lane_sum(memory[kernels + t], real)

    return shift_backward_rows

"""Small convolutions, shifts and additions in one pass over each plane (one channel of one image), for CPUs.

A map of a small convolution never leaves the cache: it lies in scratch memory of the thread that made it, and only
those of kept groups are made. So the cost is in proportion to the density.

The kernels know one geometry, that of full padding. A map of 'same' padding is that of full padding without its outer
windows: they are zero.
"""
# mypy: disable-error-code="valid-type, name-defined"
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_shiftwise.geometry import map_size, num_groups, shift, small_padding
from timm_shiftwise.ops.shift_add.taichi_rows import BackwardLayout as GradientLayout
from timm_shiftwise.ops.shift_add.taichi_rows import backward_layout as gradient_layout
from timm_shiftwise.ops.shift_add.taichi_rows import gather_row, list_writes, load_gradients
from timm_shiftwise.ops.taichi_lanes import (
    LANES,
    joined,
    lane_sum,
    load_row,
    packed_type,
    store_row,
    store_vector,
    tile,
    zeros,
)
from timm_shiftwise.ops.taichi_runtime import import_taichi

ti = import_taichi()


class ForwardLayout(NamedTuple):
    """Where things lie in scratch, in vectors.

    Attributes:
        left: Vectors of zeros before a row of a map.
        row: Vectors in a row of a map with its zeros.
        columns: Vectors that hold a row of a map, a multiple of ``made``.
        wide: Vectors that hold a row of the image, a multiple of ``tile``.
        source: Vectors in a row of the padded image.
        size: Vectors that a task needs.
        made: Vectors of a map that are made at once.
        tile: Vectors of the image that are summed at once.
        places: int32 [places, 2]: places of the wide branch that touch the image, sorted by misalignment, and the
            vector of a row where each reads the first output.
        classes: int32 [LANES + 1]: the first of them in every misalignment.
        inside: int32 [4]: first and last row, and first and last column, of a map that are not zero by its padding.
    """
    left: int
    row: int
    columns: int
    wide: int
    source: int
    size: int
    made: int
    tile: int
    places: Tensor
    classes: Tensor
    inside: Tensor


def _up(value: int) -> int:
    return -(-value // LANES)


def _inside(height: int, width: int, kernel_size: int, padding: str) -> Tensor:
    """First and last row, and first and last column, of a map of full padding that the padding policy has too."""
    border = kernel_size - 1 - small_padding(kernel_size, padding)
    rows, columns = map_size(height, kernel_size, padding), map_size(width, kernel_size, padding)
    return torch.tensor([border, border + rows, border, border + columns], dtype=torch.int32)


@lru_cache(maxsize=256)
def forward_layout(
        maps: int,
        height: int,
        width: int,
        focus_length: int,
        kernel_size: int,
        padding: str,
        most: int,
) -> ForwardLayout:
    """The layout for K kernels a channel and images of one size; ``most`` is the largest tile allowed."""
    extra = kernel_size - 1
    map_height, map_width = height + extra, width + extra
    shifts = {g: shift(g, focus_length, kernel_size, 'full') for g in range(num_groups(focus_length, kernel_size))}
    touching = {g: s for g, s in shifts.items() if -map_width < s < width}
    left = _up(max([0, *touching.values()]))
    count, wide_tile = tile(_up(map_width), most), tile(_up(width), most)
    columns = -(-_up(map_width) // count) * count
    wide = -(-_up(width) // wide_tile) * wide_tile
    row = left + max(columns, wide + 1 + _up(kernel_size), _up(width + max([0, *(-s for s in touching.values())])))
    source = columns + 1 + _up(kernel_size)
    starts = sorted(((-s) % LANES, left + (-s) // LANES, place) for place, s in touching.items())
    places = torch.tensor([[place, vector] for _, vector, place in starts] or [[0, 0]], dtype=torch.int32)
    classes = torch.tensor([sum(lane < m for lane, *_ in starts) for m in range(LANES + 1)], dtype=torch.int32)
    inside = _inside(height, width, kernel_size, padding)
    size = (
        kernel_size * (height + 2 * extra) * source  # the image, once for every column of a kernel
        + maps * map_height * row + wide + 1)  # the maps, and what the last reads may touch beyond them
    return ForwardLayout(left, row, columns, wide, source, size, count, wide_tile, places, classes, inside)


_CLASSES = 2 + 2 * LANES
"""Integers of the list of the misalignments that occur; see :func:`_list_reads`."""


def list_length(maps: int, groups: int, shuffles: int) -> int:
    """Integers that the lists of one channel take; see :func:`_list_reads`."""
    return 1 + maps + _CLASSES + groups * shuffles + groups + 1 + groups * shuffles + 1 + shuffles


@ti.func
def _list_reads(
        lists: ti.template(), at, c, channels, maps, map_height, row, left, shuffles, groups, first_shift, kernel_size,
        e, mask: ti.template(), horizontal: ti.template(), vertical: ti.template(), identity: ti.template(),
        places: ti.template(), classes: ti.template(),
):
    """List what the branches of one channel read, as vectors from the start of its maps; pruned groups are left out.

    The lists lie one after another: the number of kept maps and which they are; the number of misalignments of the wide
    branch that occur, each with the start of its reads, the end of all, and the reads; the starts of the places of the
    tall branch and its reads; the number of the reads of the identity branch and those.
    """
    kept = 0
    for k in range(maps):
        if mask[c * maps + k] > 0:
            lists[at + 1 + kept] = k
            kept += 1
    lists[at] = kept
    start = at + 1 + maps
    entry = start + _CLASSES
    found = 0
    for m in range(LANES):
        begin = entry
        for place in range(classes[m], classes[m + 1]):
            for r in range(shuffles):
                k = horizontal[(r * channels + c) * groups + places[place, 0]]
                for slot in range(kept):
                    if lists[at + 1 + slot] == k:
                        lists[entry] = (slot * map_height + e) * row + places[place, 1]
                        entry += 1
        if entry > begin:
            lists[start + 1 + 2 * found] = begin
            lists[start + 2 + 2 * found] = m
            found += 1
    lists[start] = found
    lists[start + 1 + 2 * found] = entry
    start += _CLASSES + groups * shuffles
    entry = start + groups + 1
    for g in range(groups):
        lists[start + g] = entry
        for r in range(shuffles):
            k = vertical[(r * channels + c) * groups + g]
            for slot in range(kept):
                if lists[at + 1 + slot] == k:
                    lists[entry] = (slot * map_height - first_shift + g * kernel_size) * row + left + e // LANES
                    entry += 1
    lists[start + groups] = entry
    start += groups + 1 + groups * shuffles
    uses = 0
    for r in range(shuffles):
        for slot in range(kept):
            if lists[at + 1 + slot] == identity[r * channels + c]:
                lists[start + 1 + uses] = (slot * map_height + e) * row + left + e // LANES
                uses += 1
    lists[start] = uses


@ti.func
def _load_image(
        memory: ti.template(), base, source: ti.template(), first, height, width, row, n: ti.template(),
        pack: ti.template(), kind: ti.template(), real: ti.template(), vector: ti.template(),
):
    """Copy an image into scratch, padded by N - 1, once for every column b of a kernel: moved b columns to the left.

    The copies lie one after another, each [H + 2 (N - 1), row]; what is padding must hold zeros and keeps them.
    """
    lines = height + 2 * (n - 1)
    for i in range(height):
        at = base + ti.cast((i + n - 1) * row, ti.i64)
        start = first + ti.cast(i, ti.i64) * width
        load_row(
            memory, at + (n - 1) // LANES, ti.static((n - 1) % LANES), source, start, width, pack, kind, real, vector)
        for b in ti.static(range(1, n)):
            for v in range(row - 1 - b // LANES):
                near = at + v + b // LANES
                moved = memory[near]
                if ti.static(b % LANES > 0):
                    moved = joined(memory[near], memory[near + 1], ti.static(b % LANES), vector)
                memory[at + b * lines * row + v] = moved


@ti.func
def _zero_outside(memory: ti.template(), at, vectors, first, last):
    """Set the lanes of a row before ``first`` and from ``last`` on to zero."""
    for v in range(vectors):
        if v * LANES < first or (v + 1) * LANES > last:
            value = memory[at + v]
            for lane in ti.static(range(LANES)):
                if v * LANES + lane < first or v * LANES + lane >= last:
                    value[lane] = 0
            memory[at + v] = value


@cache
def forward_kernel(real: Any, pack: int) -> Any:
    """The forward kernel that sums in a type of Taichi's; input and output come in packs.

    It writes the three branches, or, ``folded``, into ``out_h`` alone their sum, each times a factor of its channel,
    with a bias and the input itself.
    """
    vector, array = ti.types.vector(LANES, real), packed_type(real, pack)

    @ti.kernel
    def shiftwise_conv_rows(
            x: array,
            weight: ti.types.ndarray(dtype=real, ndim=1),
            mask: ti.types.ndarray(dtype=ti.i32, ndim=1),
            horizontal: ti.types.ndarray(dtype=ti.i32, ndim=1),
            vertical: ti.types.ndarray(dtype=ti.i32, ndim=1),
            identity: ti.types.ndarray(dtype=ti.i32, ndim=1),
            places: ti.types.ndarray(dtype=ti.i32, ndim=2),
            classes: ti.types.ndarray(dtype=ti.i32, ndim=1),
            inside: ti.types.ndarray(dtype=ti.i32, ndim=1),
            read: ti.types.ndarray(dtype=ti.i32, ndim=1),
            factors: ti.types.ndarray(dtype=real, ndim=1),
            lists: ti.types.ndarray(dtype=ti.i32, ndim=1),
            memory: ti.types.ndarray(dtype=vector, ndim=1),
            out_h: array,
            out_v: array,
            out_i: array,
            planes: ti.i32, channels: ti.i32, in_channels: ti.i32, out_channels: ti.i32, maps: ti.i32, height: ti.i32,
            width: ti.i32, shuffles: ti.i32, groups: ti.i32, first_shift: ti.i32, left: ti.i32, row: ti.i32,
            columns: ti.i32, wide: ti.i32, source: ti.i32, size: ti.i32, stride: ti.i32, tasks: ti.i32,
            n: ti.template(), count: ti.template(), across: ti.template(), masked: ti.template(),
            folded: ti.template(), skip: ti.template(), threads: ti.template(), kind: ti.template(),
    ):
        e = ti.static(n - 1 - n // 2)
        map_height = height + n - 1
        ti.loop_config(parallelize=threads)
        for c in range(channels):
            _list_reads(
                lists, c * stride, c, channels, maps, map_height, row, left, shuffles, groups, first_shift, n, e, mask,
                horizontal, vertical, identity, places, classes)

        ti.loop_config(parallelize=threads)
        for task in range(tasks):
            image = ti.cast(task, ti.i64) * size
            for v in range(size):
                memory[image + v] = vector(0)
            lines = (height + 2 * (n - 1)) * source  # vectors of one copy of the image
            base = image + n * lines
            begin = ti.cast(ti.cast(task, ti.i64) * planes // tasks, ti.i32)
            end = ti.cast(ti.cast(task + 1, ti.i64) * planes // tasks, ti.i32)
            for plane in range(begin, end):
                c = plane % channels
                kept_at = c * stride
                h_at = kept_at + 1 + maps
                v_at = h_at + _CLASSES + groups * shuffles
                i_at = v_at + groups + 1 + groups * shuffles
                sample = plane // channels
                if skip or lists[kept_at] > 0:
                    first = (ti.cast(sample, ti.i64) * in_channels + read[c]) * height * width
                    _load_image(memory, image, x, first, height, width, source, n, pack, kind, real, vector)
                for slot in range(lists[kept_at]):
                    first = (c * maps + lists[kept_at + 1 + slot]) * n * n
                    for p in range(inside[0], inside[1]):
                        to = base + ti.cast((slot * map_height + p) * row + left, ti.i64)
                        column = 0
                        while column < columns:
                            sums = ti.static(zeros(count, vector))
                            for a in ti.static(range(n)):
                                for b in ti.static(range(n)):
                                    w = weight[first + a * n + b]
                                    at = image + b * lines + ti.cast((p + a) * source + column, ti.i64)
                                    for v in ti.static(range(count)):
                                        sums[v] += w * memory[at + v]
                            for v in ti.static(range(count)):
                                memory[to + column + v] = sums[v]
                            column += count
                        if ti.static(masked):
                            _zero_outside(memory, to, columns, inside[2], inside[3])

                for i in range(height):
                    low = ti.min(groups, ti.max(0, (first_shift - i + n - 1) // n))
                    high = ti.max(low, ti.min(groups, (map_height + first_shift - i + n - 1) // n))
                    start = ((ti.cast(sample, ti.i64) * out_channels + c) * height + i) * width
                    column = 0
                    while column < wide:
                        here = base + ti.cast(i * row + column, ti.i64)
                        total = ti.static(zeros(across, vector))
                        for j in range(lists[h_at]):
                            part = ti.static(zeros(across + 1, vector))
                            for entry in range(lists[h_at + 1 + 2 * j], lists[h_at + 3 + 2 * j]):
                                at = here + lists[entry]
                                for v in ti.static(range(across + 1)):
                                    part[v] += memory[at + v]
                            m = lists[h_at + 2 + 2 * j]
                            for quarter in ti.static(range(0, LANES, 4)):  # in two steps: fewer comparisons
                                if m // 4 * 4 == quarter:
                                    for known in ti.static(range(quarter, quarter + 4)):
                                        if m == known:
                                            for v in ti.static(range(across)):
                                                total[v] += joined(part[v], part[v + 1], known, vector)
                        for v in ti.static(range(across)):
                            if ti.static(folded):
                                total[v] = factors[c] * total[v] + factors[3 * channels + c]
                            else:
                                store_vector(out_h, start, width, column + v, total[v], pack, kind, real)
                            if ti.static(skip):
                                near = image + (n - 1) * lines + ti.cast((i + n - 1) * source + column + v, ti.i64)
                                total[v] += memory[near]
                        tall = ti.static(zeros(across + 1, vector))
                        for entry in range(lists[v_at + low], lists[v_at + high]):
                            at = here + lists[entry]
                            for v in ti.static(range(across + 1)):
                                tall[v] += memory[at + v]
                        centre = ti.static(zeros(across + 1, vector))
                        for entry in range(i_at + 1, i_at + 1 + lists[i_at]):
                            at = here + lists[entry]
                            for v in ti.static(range(across + 1)):
                                centre[v] += memory[at + v]
                        for v in ti.static(range(across)):
                            upright = joined(tall[v], tall[v + 1], ti.static(e % LANES), vector)
                            middle = joined(centre[v], centre[v + 1], ti.static(e % LANES), vector)
                            if ti.static(folded):
                                total[v] += factors[channels + c] * upright + factors[2 * channels + c] * middle
                                store_vector(out_h, start, width, column + v, total[v], pack, kind, real)
                            else:
                                store_vector(out_v, start, width, column + v, upright, pack, kind, real)
                                store_vector(out_i, start, width, column + v, middle, pack, kind, real)
                        column += across

    return shiftwise_conv_rows


class BackwardLayout(NamedTuple):
    """Where things lie in scratch, in vectors.

    Attributes:
        gradients: Where the gradients of the branches lie, the vectors of a map's row, and how many to make at once.
        wide: Vectors that hold a row of the image.
        source: Vectors in a row of the padded image.
        partial: Vectors in a row of the gradient of the image, of which there is one for every column of a kernel.
        size: Vectors that a task needs.
        inside: int32 [4]: first and last row, and first and last column, of a map that are not zero by its padding.
    """
    gradients: GradientLayout
    wide: int
    source: int
    partial: int
    size: int
    inside: Tensor


@lru_cache(maxsize=256)
def backward_layout(
        maps: int,
        height: int,
        width: int,
        focus_length: int,
        kernel_size: int,
        padding: str,
        most: int,
) -> BackwardLayout:
    """The layout for K kernels a channel and images of one size; ``most`` is the largest tile allowed."""
    extra = kernel_size - 1
    gradients = gradient_layout(height, width, width + extra, focus_length, kernel_size, 'full', most)
    source = gradients.vectors + 1 + _up(kernel_size)
    partial = max(gradients.vectors, _up(width)) + 1 + _up(kernel_size)
    size = (
        kernel_size * (height + 2 * extra) * source  # the image, once for every column of a kernel
        + gradients.size
        + maps * (height + extra) * gradients.vectors  # the gradients of the maps
        + maps * kernel_size ** 2  # those of the kernels
        + kernel_size * partial + _up(width))  # a row of that of the image
    return BackwardLayout(gradients, _up(width), source, partial, size, _inside(height, width, kernel_size, padding))


@cache
def backward_kernel(real: Any, pack: int) -> Any:
    """The backward kernel that sums in a type of Taichi's; images and gradients come in packs."""
    vector, array = ti.types.vector(LANES, real), packed_type(real, pack)

    @ti.kernel
    def shiftwise_conv_backward_rows(
            grad_h: array,
            grad_v: array,
            grad_i: array,
            x: array,
            weight: ti.types.ndarray(dtype=real, ndim=1),
            mask: ti.types.ndarray(dtype=ti.i32, ndim=1),
            horizontal: ti.types.ndarray(dtype=ti.i32, ndim=1),
            vertical: ti.types.ndarray(dtype=ti.i32, ndim=1),
            identity: ti.types.ndarray(dtype=ti.i32, ndim=1),
            places: ti.types.ndarray(dtype=ti.i32, ndim=2),
            used: ti.types.ndarray(dtype=ti.i32, ndim=1),
            inside: ti.types.ndarray(dtype=ti.i32, ndim=1),
            lists: ti.types.ndarray(dtype=ti.i32, ndim=1),
            memory: ti.types.ndarray(dtype=vector, ndim=1),
            grad_x: array,
            grad_weight: ti.types.ndarray(dtype=real, ndim=1),
            batch: ti.i32, channels: ti.i32, maps: ti.i32, height: ti.i32, width: ti.i32, shuffles: ti.i32,
            groups: ti.i32, first_shift: ti.i32, left: ti.i32, row: ti.i32, narrow: ti.i32, vectors: ti.i32,
            gradients: ti.i32, wide_vectors: ti.i32, source: ti.i32, partial: ti.i32, size: ti.i32, tasks: ti.i32,
            n: ti.template(), count: ti.template(), masked: ti.template(), want_x: ti.template(), want_w: ti.template(),
            threads: ti.template(), kind: ti.template(),
    ):
        e = ti.static(n - 1 - n // 2)
        map_height = height + n - 1
        reads = 2 * groups * shuffles
        stride = 2 * (maps + 1) + reads + maps
        ti.loop_config(parallelize=threads)
        for c in range(channels):
            list_writes(
                lists, c * stride, c, channels, maps, height, row, shuffles, groups, first_shift, n, horizontal,
                vertical, identity, places)

        ti.loop_config(parallelize=threads)
        for task in range(tasks):
            image = ti.cast(task, ti.i64) * size
            for v in range(size):
                memory[image + v] = vector(0)
            lines = (height + 2 * (n - 1)) * source  # vectors of one copy of the image
            wide = image + n * lines
            tall = wide + LANES * height * row
            centre = tall + height * narrow
            base = wide + gradients
            kernels = base + maps * map_height * vectors
            parts = kernels + maps * n * n
            done = parts + n * partial
            begin = ti.cast(ti.cast(task, ti.i64) * channels // tasks, ti.i32)
            end = ti.cast(ti.cast(task + 1, ti.i64) * channels // tasks, ti.i32)
            for c in range(begin, end):
                for t in range(maps * n * n):
                    memory[kernels + t] = vector(0)
                for sample in range(batch):
                    first = (ti.cast(sample, ti.i64) * channels + c) * height * width
                    load_gradients(
                        memory, wide, tall, centre, grad_h, grad_v, grad_i, first, height, width, left, row, narrow, e,
                        used, ti.static(e % LANES), pack, kind, real, vector)
                    if ti.static(want_w):
                        _load_image(memory, image, x, first, height, width, source, n, pack, kind, real, vector)
                    for k in range(maps):
                        if mask[c * maps + k] > 0:
                            for p in range(inside[0], inside[1]):
                                to = base + ti.cast((k * map_height + p) * vectors, ti.i64)
                                gather_row(
                                    memory, to, wide, tall, centre, p, k, lists, c * stride, maps, height, row, narrow,
                                    vectors, reads, e, count, real, vector)
                                if ti.static(masked):
                                    _zero_outside(memory, to, vectors, inside[2], inside[3])
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

    return shiftwise_conv_backward_rows

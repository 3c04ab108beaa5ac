"""Maps shifted to their places and added up in one pass over each plane (one channel of one image), for CPUs.

The maps lie in scratch memory of the thread that works on the plane, padded with zeros. A shift along the height moves
whole rows, which stay aligned. A shift along the width does not, so the places of the wide branch are sorted by their
misalignment, shift modulo the lanes: those of one class are summed aligned, and each class is moved into place once.

For the shift-add the maps are loaded. For the fused convolution they are made there, of kept groups only: they never
leave the cache, and the cost is in proportion to the share of kept groups.

The kernel knows one geometry, that of full padding. A map of 'same' padding is that of full padding without its outer
windows: they are zero.
"""
# mypy: disable-error-code="valid-type, name-defined"
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_shiftwise.geometry import map_size, num_groups, shift, small_padding
from timm_shiftwise.ops.taichi.lanes import joined, load_row, packed_type, store_vector, tile, zeros
from timm_shiftwise.ops.taichi.runtime import LANES, import_taichi

ti = import_taichi()


class ForwardLayout(NamedTuple):
    """Where things lie in scratch, in vectors.

    Attributes:
        left: Vectors of zeros before a row of a map.
        row: Vectors in a row of a map with its zeros.
        columns: Vectors that hold a row of a map, a multiple of ``made``.
        wide: Vectors that hold a row of the image, a multiple of ``across``.
        source: Vectors in a row of the padded image.
        maps_at: First vector of the maps.
        size: Vectors that a task needs.
        made: Vectors of a map that are made at once.
        across: Vectors of the image that are summed at once.
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
    maps_at: int
    size: int
    made: int
    across: int
    places: Tensor
    classes: Tensor
    inside: Tensor


def _up(value: int) -> int:
    return -(-value // LANES)


def inside_of_maps(height: int, width: int, kernel_size: int, padding: str) -> Tensor:
    """First and last row, and first and last column, of a map of full padding that the padding policy has too."""
    border = kernel_size - 1 - small_padding(kernel_size, padding)
    rows, columns = map_size(height, kernel_size, padding), map_size(width, kernel_size, padding)
    return torch.tensor([border, border + rows, border, border + columns], dtype=torch.int32)


@lru_cache(maxsize=256)
def forward_layout(
        maps: int, height: int, width: int, focus_length: int, kernel_size: int, padding: str, most: int,
        convolved: bool) -> ForwardLayout:
    """The layout for K maps a channel and images of one size.

    Args:
        maps: K.
        height: H of the image.
        width: W of the image.
        focus_length: M in pixels.
        kernel_size: N in pixels.
        padding: ``'full'`` or ``'same'``.
        most: The largest tile allowed, in vectors.
        convolved: Whether the maps are made of an image, which then lies in scratch, too.
    """
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
    maps_at = kernel_size * (height + 2 * extra) * source if convolved else 0  # once for every column of a kernel
    size = maps_at + maps * map_height * row + wide + 1  # and what the last reads may touch beyond the maps
    inside = inside_of_maps(height, width, kernel_size, padding)
    return ForwardLayout(left, row, columns, wide, source, maps_at, size, count, wide_tile, places, classes, inside)


_CLASSES = 2 + 2 * LANES
"""Integers of the list of the misalignments that occur; see :func:`_list_reads`."""


def read_list_length(maps: int, groups: int, shuffles: int) -> int:
    """Integers that the lists of one channel take; see :func:`_list_reads`."""
    return 1 + maps + _CLASSES + groups * shuffles + groups + 1 + groups * shuffles + 1 + shuffles


@ti.func
def _list_reads(
        lists: ti.template(), at, c, channels, maps, map_height, row, left, shuffles, groups, first_shift, kernel_size,
        e, mask: ti.template(), wiring: ti.template(), places: ti.template(), classes: ti.template()):
    """List what the branches of one channel read, as vectors from the start of its maps; pruned groups are left out.

    The lists lie one after another: the number of kept maps and which they are; the number of misalignments of the wide
    branch that occur, each with the start of its reads, the end of all, and the reads; the starts of the places of the
    tall branch and its reads; the number of the reads of the centre branch and those.
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
                k = wiring[(r * channels + c) * (2 * groups + 1) + places[place, 0]]
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
            k = wiring[(r * channels + c) * (2 * groups + 1) + groups + g]
            for slot in range(kept):
                if lists[at + 1 + slot] == k:
                    lists[entry] = (slot * map_height - first_shift + g * kernel_size) * row + left + e // LANES
                    entry += 1
    lists[start + groups] = entry
    start += groups + 1 + groups * shuffles
    uses = 0
    for r in range(shuffles):
        for slot in range(kept):
            if lists[at + 1 + slot] == wiring[(r * channels + c) * (2 * groups + 1) + 2 * groups]:
                lists[start + 1 + uses] = (slot * map_height + e) * row + left + e // LANES
                uses += 1
    lists[start] = uses


@ti.func
def load_image(
        memory: ti.template(), base, source: ti.template(), first, height, width, row, n: ti.template(),
        pack: ti.template(), kind: ti.template(), real: ti.template(), vector: ti.template()):
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
def zero_outside(memory: ti.template(), at, vectors, first, last):
    """Set the lanes of a row before ``first`` and from ``last`` on to zero."""
    for v in range(vectors):
        if v * LANES < first or (v + 1) * LANES > last:
            value = memory[at + v]
            for lane in ti.static(range(LANES)):
                if v * LANES + lane < first or v * LANES + lane >= last:
                    value[lane] = 0
            memory[at + v] = value


@cache
def forward_kernel(real: Any, pack: int, convolved: bool) -> Any:
    """The kernel that shifts maps to their places and adds them up; it sums in a type of Taichi's.

    Args:
        real: That type.
        pack: Numbers of a row that are written at once, see :func:`timm_shiftwise.ops.taichi.lanes.pack_size`.
        convolved: Whether ``x`` is an image, in packs, of which kept groups' kernels make the maps; else it is the maps
            themselves, flat, of which none is pruned.
    """
    vector, array = ti.types.vector(LANES, real), packed_type(real, pack)
    source_type = array if convolved else ti.types.ndarray(ndim=1)

    @ti.kernel
    def shift_rows(
            x: source_type,
            weight: ti.types.ndarray(dtype=real, ndim=1),
            mask: ti.types.ndarray(dtype=ti.i32, ndim=1),
            wiring: ti.types.ndarray(dtype=ti.i32, ndim=1),
            places: ti.types.ndarray(dtype=ti.i32, ndim=2),
            classes: ti.types.ndarray(dtype=ti.i32, ndim=1),
            inside: ti.types.ndarray(dtype=ti.i32, ndim=1),
            lists: ti.types.ndarray(dtype=ti.i32, ndim=1),
            memory: ti.types.ndarray(dtype=vector, ndim=1),
            out_h: array,
            out_v: array,
            out_i: array,
            planes: ti.i32, channels: ti.i32, maps: ti.i32, height: ti.i32, width: ti.i32, shuffles: ti.i32,
            groups: ti.i32, first_shift: ti.i32, left: ti.i32, row: ti.i32, columns: ti.i32, wide: ti.i32,
            source: ti.i32, maps_at: ti.i32, size: ti.i32, stride: ti.i32, tasks: ti.i32,
            n: ti.template(), made: ti.template(), across: ti.template(), masked: ti.template(),
            threads: ti.template(), kind: ti.template(),
    ):
        e = ti.static(n - 1 - n // 2)
        map_height = height + n - 1
        ti.loop_config(parallelize=threads)
        for c in range(channels):
            _list_reads(
                lists, c * stride, c, channels, maps, map_height, row, left, shuffles, groups, first_shift, n, e, mask,
                wiring, places, classes)

        ti.loop_config(parallelize=threads)
        for task in range(tasks):
            image = ti.cast(task, ti.i64) * size
            for v in range(size):
                memory[image + v] = vector(0)
            lines = (height + 2 * (n - 1)) * source  # vectors of one copy of the image
            base = image + maps_at
            begin = ti.cast(ti.cast(task, ti.i64) * planes // tasks, ti.i32)
            end = ti.cast(ti.cast(task + 1, ti.i64) * planes // tasks, ti.i32)
            for plane in range(begin, end):
                c = plane % channels
                kept_at = c * stride
                h_at = kept_at + 1 + maps
                v_at = h_at + _CLASSES + groups * shuffles
                i_at = v_at + groups + 1 + groups * shuffles
                if ti.static(convolved):
                    load_image(
                        memory, image, x, ti.cast(plane, ti.i64) * height * width, height, width, source, n, pack, kind,
                        real, vector)
                for slot in range(lists[kept_at]):
                    if ti.static(convolved):
                        first = (c * maps + lists[kept_at + 1 + slot]) * n * n
                        for p in range(inside[0], inside[1]):
                            to = base + ti.cast((slot * map_height + p) * row + left, ti.i64)
                            column = 0
                            while column < columns:
                                sums = ti.static(zeros(made, vector))
                                for a in ti.static(range(n)):
                                    for b in ti.static(range(n)):
                                        w = weight[first + a * n + b]
                                        at = image + b * lines + ti.cast((p + a) * source + column, ti.i64)
                                        for v in ti.static(range(made)):
                                            sums[v] += w * memory[at + v]
                                for v in ti.static(range(made)):
                                    memory[to + column + v] = sums[v]
                                column += made
                            if ti.static(masked):
                                zero_outside(memory, to, columns, inside[2], inside[3])
                    else:
                        border = ti.static(e if masked else 0)
                        for p in range(inside[0], inside[1]):
                            to = base + ti.cast((slot * map_height + p) * row + left, ti.i64) + border // LANES
                            first = (ti.cast(plane, ti.i64) * maps + slot) * (inside[1] - inside[0]) + p - inside[0]
                            load_row(
                                memory, to, ti.static(border % LANES), x, first * (inside[3] - inside[2]),
                                inside[3] - inside[2], 1, kind, real, vector)

                for i in range(height):
                    low = ti.min(groups, ti.max(0, (first_shift - i + n - 1) // n))
                    high = ti.max(low, ti.min(groups, (map_height + first_shift - i + n - 1) // n))
                    start = (ti.cast(plane, ti.i64) * height + i) * width
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
                            store_vector(out_h, start, width, column + v, total[v], pack, kind, real)
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
                            store_vector(out_v, start, width, column + v, upright, pack, kind, real)
                            store_vector(out_i, start, width, column + v, middle, pack, kind, real)
                        column += across

    return shift_rows

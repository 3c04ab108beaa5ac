"""The shift-add for CPUs: a plane (one channel of one image) at a time, row by row, a vector of lanes at a time.

Forward: the K maps of a plane are copied into scratch memory that is padded with zeros. A shift along the height moves
whole rows, which stay aligned. A shift along the width does not, so the places of the wide branch are sorted by their
misalignment, shift modulo the lanes: those of one class are summed aligned, and each class is moved into place once.

Backward: the three gradients of a plane are copied into scratch, the wide branch's once for each misalignment that
occurs, and every map gathers from them what was read of it.
"""
# mypy: disable-error-code="valid-type, name-defined"
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_shiftwise.geometry import crop, num_groups, shift
from timm_shiftwise.ops.taichi_lanes import LANES, joined, load_row, packed_type, store_row, tile, zeros
from timm_shiftwise.ops.taichi_runtime import import_taichi

ti = import_taichi()


class ForwardLayout(NamedTuple):
    """Where the maps of one size lie in scratch, in vectors; rows hold ``left`` zeros, a map's row, and zeros.

    Attributes:
        left: Zeros before a row; chosen so that column E of a map is the first lane of a vector.
        row: Vectors in a row.
        vectors: Vectors that hold a row of the image, a multiple of ``tile``.
        size: Vectors of all maps of a plane, of what the last reads may touch beyond them, and of a finished row of
        each branch. tile: Vectors that are summed at once.
        places: int32 [places, 2]: places of the wide branch that touch the image, sorted by misalignment, and the
            vector of a row where each reads the first output.
        classes: int32 [LANES + 1]: the first of them in every misalignment.
    """
    left: int
    row: int
    vectors: int
    size: int
    tile: int
    places: Tensor
    classes: Tensor


class BackwardLayout(NamedTuple):
    """Where the gradients lie in scratch, in vectors.

    Attributes:
        left: Zeros before a row of the wide branch's gradient.
        row: Vectors in a row of the wide branch's gradient.
        narrow: Vectors in a row of the other two, in which column j of the image is lane E + j.
        vectors: Vectors that hold a row of a map, a multiple of ``tile``.
        size: Vectors of the wide branch's gradient in all its misalignments, of the other two, of what the last
            reads may touch beyond them, and of a finished row.
        tile: Vectors that are summed at once.
        places: int32 [G, 2]: for every place, the misalignment of its reads and the vector of a row where it reads for
            the first column of a map; misalignment -1 if it never touches the image.
        used: int32 [LANES]: whether a misalignment occurs.
    """
    left: int
    row: int
    narrow: int
    vectors: int
    size: int
    tile: int
    places: Tensor
    used: Tensor


def _up(value: int) -> int:
    return -(-value // LANES) * LANES


def _vectors(width: int, count: int) -> int:
    """Vectors that a row of ``width`` takes when ``count`` of them are worked on at once."""
    return -(-width // (LANES * count)) * count


def _touching(width: int, map_width: int, focus_length: int, kernel_size: int, padding: str) -> dict[int, int]:
    """Places of the wide branch at which a map overlaps the image, with their shifts."""
    groups = num_groups(focus_length, kernel_size)
    shifts = {place: shift(place, focus_length, kernel_size, padding) for place in range(groups)}
    return {place: s for place, s in shifts.items() if -map_width < s < width}


@lru_cache(maxsize=256)
def forward_layout(
        maps: int,
        map_height: int,
        map_width: int,
        width: int,
        focus_length: int,
        kernel_size: int,
        padding: str,
        most: int,
) -> ForwardLayout:
    """The layout of K maps of one size; ``most`` is the largest tile allowed."""
    e = crop(kernel_size, padding)
    touching = _touching(width, map_width, focus_length, kernel_size, padding)
    shifts = list(touching.values()) or [0]
    left = _up(max([*shifts, 0]) + e) - e
    count = tile(-(-width // LANES), most)
    vectors = _vectors(width, count)
    row = _up(max(left + map_width, left + width - min(shifts), left + e + width)) // LANES
    starts = sorted(((left - s) % LANES, (left - s) // LANES, place) for place, s in touching.items())
    places = torch.tensor([[place, vector] for _, vector, place in starts] or [[0, 0]], dtype=torch.int32)
    classes = torch.tensor([sum(lane < m for lane, *_ in starts) for m in range(LANES + 1)], dtype=torch.int32)
    size = maps * map_height * row + vectors + 1 + 3 * vectors
    return ForwardLayout(left, row, vectors, size, count, places, classes)


@lru_cache(maxsize=256)
def backward_layout(
        height: int,
        width: int,
        map_width: int,
        focus_length: int,
        kernel_size: int,
        padding: str,
        most: int,
) -> BackwardLayout:
    """The layout of the gradients of one size; ``most`` is the largest tile allowed."""
    groups = num_groups(focus_length, kernel_size)
    touching = _touching(width, map_width, focus_length, kernel_size, padding)
    left = _up(max([0, *(-s for s in touching.values())]))
    count = tile(-(-map_width // LANES), most)
    vectors = _vectors(map_width, count)
    row = _up(left + max(width, vectors * LANES + max([*touching.values(), 0]))) // LANES + 1
    narrow = max(_up(crop(kernel_size, padding) + width) // LANES, vectors)
    size = (LANES * row + 2 * narrow) * height + 2 * vectors
    starts = {place: [(left + s) % LANES, (left + s) // LANES] for place, s in touching.items()}
    places = torch.tensor([starts.get(place, [-1, 0]) for place in range(groups)], dtype=torch.int32)
    used = torch.tensor([bool((places[:, 0] == m).any()) for m in range(LANES)], dtype=torch.int32)
    return BackwardLayout(left, row, narrow, vectors, size, count, places, used)


@cache
def forward_kernel(real: Any, pack: int) -> Any:
    """The forward kernel that sums in a type of Taichi's; the branches come in packs."""
    vector, array = ti.types.vector(LANES, real), packed_type(real, pack)

    @ti.kernel
    def shift_add_rows(
            y: ti.types.ndarray(ndim=1),
            horizontal: ti.types.ndarray(dtype=ti.i32, ndim=1),
            vertical: ti.types.ndarray(dtype=ti.i32, ndim=1),
            identity: ti.types.ndarray(dtype=ti.i32, ndim=1),
            places: ti.types.ndarray(dtype=ti.i32, ndim=2),
            classes: ti.types.ndarray(dtype=ti.i32, ndim=1),
            entries: ti.types.ndarray(dtype=ti.i32, ndim=1),
            memory: ti.types.ndarray(dtype=vector, ndim=1),
            out_h: array,
            out_v: array,
            out_i: array,
            planes: ti.i32, channels: ti.i32, maps: ti.i32, height: ti.i32, width: ti.i32, map_height: ti.i32,
            map_width: ti.i32, shuffles: ti.i32, groups: ti.i32, first_shift: ti.i32, kernel_size: ti.i32, e: ti.i32,
            left: ti.i32, row: ti.i32, vectors: ti.i32, size: ti.i32, tasks: ti.i32,
            count: ti.template(), lane: ti.template(), threads: ti.template(), kind: ti.template(),
    ):
        # what every channel reads, as vectors from the start of its maps: wide, tall, identity
        wide = classes[LANES] * shuffles
        tall = groups * shuffles
        stride = wide + tall + shuffles
        ti.loop_config(parallelize=threads)
        for c in range(channels):
            for place in range(classes[LANES]):
                for r in range(shuffles):
                    k = horizontal[(r * channels + c) * groups + places[place, 0]]
                    entries[c * stride + place * shuffles + r] = (k * map_height + e) * row + places[place, 1]
            for g in range(groups):
                for r in range(shuffles):
                    k = vertical[(r * channels + c) * groups + g]
                    entries[c * stride + wide + g * shuffles + r] = (
                        (k * map_height - first_shift + g * kernel_size) * row + (left + e) // LANES)
            for r in range(shuffles):
                k = identity[r * channels + c]
                entries[c * stride + wide + tall + r] = (k * map_height + e) * row + (left + e) // LANES

        ti.loop_config(parallelize=threads)
        for task in range(tasks):
            base = ti.cast(task, ti.i64) * size
            done = base + maps * map_height * row + vectors + 1  # finished rows: wide, tall, identity
            for n in range(size):
                memory[base + n] = vector(0)
            begin = ti.cast(ti.cast(task, ti.i64) * planes // tasks, ti.i32)
            end = ti.cast(ti.cast(task + 1, ti.i64) * planes // tasks, ti.i32)
            for plane in range(begin, end):
                list_h = plane % channels * stride
                list_v = list_h + wide
                list_i = list_v + tall
                first = ti.cast(plane, ti.i64) * maps * map_height * map_width
                for line in range(maps * map_height):
                    at = base + ti.cast(line, ti.i64) * row + left // LANES
                    load_row(
                        memory, at, lane, y, first + ti.cast(line, ti.i64) * map_width, map_width, 1, kind, real,
                        vector)
                for i in range(height):
                    # rows of a map that the tall branch reads must exist: 0 <= i - shift < map_height
                    low = ti.max(0, (first_shift - i + kernel_size - 1) // kernel_size)
                    high = ti.min(groups, (map_height + first_shift - i + kernel_size - 1) // kernel_size)
                    start = (ti.cast(plane, ti.i64) * height + i) * width
                    column = 0  # in vectors
                    while column < vectors:
                        here = base + ti.cast(i * row + column, ti.i64)
                        sums = ti.static(zeros(count, vector))
                        for entry in range(list_v + low * shuffles, list_v + high * shuffles):
                            at = here + entries[entry]
                            for n in ti.static(range(count)):
                                sums[n] += memory[at + n]
                        for n in ti.static(range(count)):
                            memory[done + vectors + column + n] = sums[n]

                        centre = ti.static(zeros(count, vector))
                        for entry in range(list_i, list_i + shuffles):
                            at = here + entries[entry]
                            for n in ti.static(range(count)):
                                centre[n] += memory[at + n]
                        for n in ti.static(range(count)):
                            memory[done + 2 * vectors + column + n] = centre[n]

                        total = ti.static(zeros(count, vector))
                        for m in range(LANES):
                            if classes[m] < classes[m + 1]:
                                part = ti.static(zeros(count + 1, vector))
                                for entry in range(list_h + classes[m] * shuffles, list_h + classes[m + 1] * shuffles):
                                    at = here + entries[entry]
                                    for n in ti.static(range(count + 1)):
                                        part[n] += memory[at + n]
                                for known in ti.static(range(LANES)):
                                    if m == known:
                                        for n in ti.static(range(count)):
                                            total[n] += joined(part[n], part[n + 1], known, vector)
                        for n in ti.static(range(count)):
                            memory[done + column + n] = total[n]
                        column += count
                    store_row(out_h, start, width, memory, done, pack, kind, real)
                    store_row(out_v, start, width, memory, done + vectors, pack, kind, real)
                    store_row(out_i, start, width, memory, done + 2 * vectors, pack, kind, real)

    return shift_add_rows


def list_length(maps: int, groups: int, shuffles: int) -> int:
    """Integers that the lists of one channel take; see :func:`list_writes`."""
    return 2 * (maps + 1) + 2 * groups * shuffles + maps


@ti.func
def list_writes(
        lists: ti.template(), at, c, channels, maps, height, row, shuffles, groups, first_shift, kernel_size,
        horizontal: ti.template(), vertical: ti.template(), identity: ti.template(), places: ti.template(),
):
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
            for g in range(groups):
                if horizontal[(r * channels + c) * groups + g] == k and places[g, 0] >= 0:
                    lists[h] = places[g, 0] * height * row + places[g, 1]
                    h += 1
                if vertical[(r * channels + c) * groups + g] == k:
                    lists[v] = first_shift - g * kernel_size
                    v += 1
            if identity[r * channels + c] == k:
                uses += 1
        lists[at + 2 * (maps + 1) + 2 * groups * shuffles + k] = uses
    lists[at + maps] = h
    lists[at + 2 * maps + 1] = v


@ti.func
def load_gradients(
        memory: ti.template(), wide, tall, centre, grad_h: ti.template(), grad_v: ti.template(), grad_i: ti.template(),
        source, height, width, left, row, narrow, e, used: ti.template(), crop_lane: ti.template(),
        pack: ti.template(), kind: ti.template(), real: ti.template(), vector: ti.template(),
):
    """Copy the gradients of a plane into scratch, that of the wide branch once for each misalignment that occurs."""
    for i in range(height):
        line = source + ti.cast(i, ti.i64) * width
        load_row(memory, wide + i * row + left // LANES, 0, grad_h, line, width, pack, kind, real, vector)
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
def gather_row(
        memory: ti.template(), target, wide, tall, centre, p, k, lists: ti.template(), at, maps, height, row, narrow,
        vectors, reads, e, count: ti.template(), real: ti.template(), vector: ti.template(),
):
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


@cache
def backward_kernel(real: Any, pack: int) -> Any:
    """The backward kernel that sums in a type of Taichi's; the branches' gradients come in packs."""
    vector, array = ti.types.vector(LANES, real), packed_type(real, pack)

    @ti.kernel
    def shift_add_backward_rows(
            grad_h: array,
            grad_v: array,
            grad_i: array,
            horizontal: ti.types.ndarray(dtype=ti.i32, ndim=1),
            vertical: ti.types.ndarray(dtype=ti.i32, ndim=1),
            identity: ti.types.ndarray(dtype=ti.i32, ndim=1),
            places: ti.types.ndarray(dtype=ti.i32, ndim=2),
            used: ti.types.ndarray(dtype=ti.i32, ndim=1),
            entries: ti.types.ndarray(dtype=ti.i32, ndim=1),
            memory: ti.types.ndarray(dtype=vector, ndim=1),
            grad_y: ti.types.ndarray(ndim=1),
            planes: ti.i32, channels: ti.i32, maps: ti.i32, height: ti.i32, width: ti.i32, map_height: ti.i32,
            map_width: ti.i32, shuffles: ti.i32, groups: ti.i32, first_shift: ti.i32, kernel_size: ti.i32, e: ti.i32,
            left: ti.i32, row: ti.i32, narrow: ti.i32, vectors: ti.i32, size: ti.i32, tasks: ti.i32,
            count: ti.template(), crop_lane: ti.template(), threads: ti.template(), kind: ti.template(),
    ):
        reads = 2 * groups * shuffles
        stride = 2 * (maps + 1) + reads + maps
        ti.loop_config(parallelize=threads)
        for c in range(channels):
            list_writes(
                entries, c * stride, c, channels, maps, height, row, shuffles, groups, first_shift, kernel_size,
                horizontal, vertical, identity, places)

        ti.loop_config(parallelize=threads)
        for task in range(tasks):
            wide = ti.cast(task, ti.i64) * size
            for n in range(size):
                memory[wide + n] = vector(0)
            tall = wide + LANES * height * row
            centre = tall + height * narrow
            done = centre + height * narrow + vectors  # a finished row
            begin = ti.cast(ti.cast(task, ti.i64) * planes // tasks, ti.i32)
            end = ti.cast(ti.cast(task + 1, ti.i64) * planes // tasks, ti.i32)
            for plane in range(begin, end):
                first = plane % channels * stride
                load_gradients(
                    memory, wide, tall, centre, grad_h, grad_v, grad_i, ti.cast(plane, ti.i64) * height * width, height,
                    width, left, row, narrow, e, used, crop_lane, pack, kind, real, vector)
                for k in range(maps):
                    for p in range(map_height):
                        gather_row(
                            memory, done, wide, tall, centre, p, k, entries, first, maps, height, row, narrow, vectors,
                            reads, e, count, real, vector)
                        start = ((ti.cast(plane, ti.i64) * maps + k) * map_height + p) * map_width
                        store_row(grad_y, start, map_width, memory, done, 1, kind, real)

    return shift_add_backward_rows

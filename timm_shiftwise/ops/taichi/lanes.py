"""Vectors of eight or sixteen lanes in Taichi: what the CPU kernels are written in.

LLVM turns a Taichi vector of that many into machine vectors if the program keeps vectors (see :mod:`.runtime`)
and if what is read and written is an array of such vectors, which must be aligned. So the CPU kernels work on scratch
memory of their own, aligned and padded with zeros, and an unaligned read is put together from the lanes of two aligned
ones.
"""
# mypy: disable-error-code="valid-type, name-defined"
from typing import Any

import torch
from torch import Tensor

from .runtime import LANES, PACKS, import_taichi, num_threads, scalarizes

ti = import_taichi()

MAX_ELEMENTS = 2 ** 31 - 1  # of an array that Taichi can index


def kinds(dtype: torch.dtype) -> tuple[Any, Any]:
    """Taichi's types of the elements of a flat array (see :func:`flat`) and of sums of them."""
    return {
        torch.float64: (ti.f64, ti.f64),
        torch.float32: (ti.f32, ti.f32),
        torch.float16: (ti.f16, ti.f32),
        torch.bfloat16: (ti.i16, ti.f32),
    }[dtype]


def flat(tensor: Tensor) -> Tensor:
    """A tensor as a kernel takes it: one-dimensional, bfloat16 as bits, detached (else Taichi makes a .grad for it)."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).view(-1)


def pack_size(width: int, *tensors: Tensor) -> int:
    """Numbers of contiguous tensors with rows of ``width`` that can be read and written at once, else 1.

    A row is whole packs of them, and each is aligned.
    """
    return next((
        pack for pack in PACKS if width % pack == 0 and all(
            tensor.dtype in (torch.float64, torch.float32) and tensor.data_ptr() % (pack * tensor.element_size()) == 0
            for tensor in tensors)), 1)


def packed(tensor: Tensor, pack: int) -> Tensor:
    """A tensor as a kernel takes it: as :func:`flat` has it, or in packs [elements / pack, pack]."""
    array = flat(tensor)
    return array.view(len(array) // pack, pack) if pack > 1 else array


def packed_type(real: Any, pack: int) -> Any:
    """The type of an argument that :func:`packed` makes, for a kernel that sums in ``real``."""
    return ti.types.ndarray(dtype=ti.types.vector(pack, real), ndim=1) if pack > 1 else ti.types.ndarray(ndim=1)


def summed_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which elements of a type are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scratch(vectors: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for a CPU kernel, [vectors, LANES] of the type that ``dtype`` is summed in, at 64 bytes."""
    dtype = summed_dtype(dtype)
    memory = torch.empty(LANES * vectors + LANES, dtype=dtype)
    start = -memory.data_ptr() % 64 // memory.element_size()
    return memory[start:start + LANES * vectors].view(vectors, LANES)


def integers(table: Tensor) -> Tensor:
    """A table of integers, or of booleans, as a kernel takes it: int32, one-dimensional."""
    return table.detach().to(torch.int32).contiguous().view(-1)


def image_parts(batch: int, elements: int) -> list[slice]:
    """Cut a batch into parts that Taichi can index; ``elements`` of the largest array belong to one image."""
    step = max(1, MAX_ELEMENTS // max(elements, 1))
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def num_tasks(work: int) -> int:
    """Into how many tasks, each with scratch memory of its own, so many equal pieces of work are cut."""
    return max(1, min(work, 2 * num_threads()))


def most_vectors() -> int:
    """Local vectors that a loop over a row may sum in at once."""
    if scalarizes():
        return 2  # such a program compiles many of them very slowly
    return 4  # as many as fit into the registers of AVX2 beside what is read


def tile(vectors: int, most: int) -> int:
    """Vectors, at most ``most``, that a loop over a row of so many should take at once so that few are wasted."""
    steps = -(-vectors // most)
    return -(-vectors // steps)


def zeros(count: int, vector: Any) -> list[Any]:
    """New local vectors in a kernel; call it as ``ti.static(zeros(...))``."""
    return [ti.lang.impl.expr_init(vector(0)) for _ in range(count)]


@ti.func
def load(array: ti.template(), index, kind: ti.template(), real: ti.template()):
    """Read an element of a flat array as the type of sums."""
    value = ti.cast(0, real)
    if ti.static(kind == ti.i16):
        value = ti.bit_cast(ti.cast(array[index], ti.i32) << 16, ti.f32)
    else:
        value = ti.cast(array[index], real)
    return value


@ti.func
def store(array: ti.template(), index, value, kind: ti.template()):
    """Write a sum to an element of a flat array, rounded to its type."""
    if ti.static(kind == ti.i16):
        word = ti.bit_cast(value, ti.i32)
        rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16  # to nearest, ties to even
        if (word & 0x7fffffff) > 0x7f800000:  # rounding could turn a NaN into an infinity
            rounded = (word >> 16) | 0x40
        array[index] = ti.cast(rounded, ti.i16)
    else:
        array[index] = ti.cast(value, kind)


@ti.func
def joined(first, second, lane: ti.template(), vector: ti.template()):
    """The lanes from ``lane`` on, as many as a vector has, of two vectors side by side."""
    return vector([first[n] for n in range(lane, LANES)] + [second[n] for n in range(lane)])


@ti.func
def lane_sum(value, real: ti.template()):
    """The sum of a vector's lanes."""
    total = ti.cast(0, real)
    for lane in ti.static(range(LANES)):
        total += value[lane]
    return total


@ti.func
def load_row(
        target: ti.template(), at, lane: ti.template(), source: ti.template(), start, count,
        pack: ti.template(), kind: ti.template(), real: ti.template(), vector: ti.template()):
    """Copy ``count`` elements of an array (see :func:`packed`), from the element ``start`` on, into a row of scratch
    that holds zeros, from vector ``at``, lane ``lane`` on.

    Every vector that is touched is written whole, zeros outside of the row.
    """
    if ti.static(pack > 1):
        _load_packs(target, at, lane, source, start // pack, count // pack, pack, real, vector)
    else:
        _load_numbers(target, at, lane, source, start, count, kind, real, vector)


@ti.func
def _load_packs(
        target: ti.template(), at, lane: ti.template(), source: ti.template(), start, packs, pack: ti.template(),
        real: ti.template(), vector: ti.template()):
    moved = ti.static(-lane % pack)  # lanes of the first pack that the vector before holds
    used = ti.static(-(-(moved + LANES) // pack))
    for v in range((lane + packs * pack + LANES - 1) // LANES):
        first = v * (LANES // pack) + ti.static(-lane // pack)
        found = ti.static(zeros(used, ti.types.vector(pack, real)))
        for k in ti.static(range(used)):
            if first + k >= 0 and first + k < packs:
                found[k] = source[start + first + k]
        target[at + v] = vector([found[(moved + n) // pack][(moved + n) % pack] for n in range(LANES)])


@ti.func
def _load_numbers(
        target: ti.template(), at, lane: ti.template(), source: ti.template(), start, count,
        kind: ti.template(), real: ti.template(), vector: ti.template()):
    head = ti.static((LANES - lane) % LANES)
    if ti.static(head > 0):
        value = vector(0)
        for n in ti.static(range(head)):
            if n < count:
                value[lane + n] = load(source, start + n, kind, real)
        target[at] = value
    first = ti.static(1 if head > 0 else 0)
    whole = ti.max(count - head, 0) // LANES
    for v in range(whole):
        b = start + head + v * LANES
        target[at + first + v] = vector([load(source, b + n, kind, real) for n in range(LANES)])
    done = head + whole * LANES
    if done < count:
        value = vector(0)
        for n in ti.static(range(LANES)):
            if done + n < count:
                value[n] = load(source, start + done + n, kind, real)
        target[at + first + whole] = value


@ti.func
def store_vector(
        target: ti.template(), start, count, v, value, pack: ti.template(), kind: ti.template(), real: ti.template()):
    """Write vector ``v`` of a row of ``count`` elements to an array (see :func:`packed`) in which the row begins at the
    element ``start``; what is beyond the row is left out.
    """
    begin = v * LANES
    if ti.static(pack > 1):
        for k in ti.static(range(LANES // pack)):
            if begin + k * pack < count:
                target[start // pack + begin // pack + k] = ti.Vector(
                    [value[k * pack + n] for n in range(pack)], dt=real)
    else:
        if begin + LANES <= count:
            for n in ti.static(range(LANES)):
                store(target, start + begin + n, value[n], kind)
        else:
            for n in ti.static(range(LANES)):
                if begin + n < count:
                    store(target, start + begin + n, value[n], kind)


@ti.func
def store_row(
        target: ti.template(), start, count, source: ti.template(), at, pack: ti.template(), kind: ti.template(),
        real: ti.template()):
    """Copy ``count`` elements of a row of scratch, from vector ``at`` on, to an array (see :func:`packed`)."""
    for v in range((count + LANES - 1) // LANES):
        store_vector(target, start, count, v, source[at + v], pack, kind, real)

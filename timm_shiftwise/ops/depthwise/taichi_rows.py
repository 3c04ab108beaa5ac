"""Gradients of a tall, a wide and a square depthwise convolution in one pass over each plane, for CPUs.

A plane (one channel of one image) is copied into scratch memory, the wide kernel's one transposed, so that every large
kernel is a tall one: its rows are whole rows of the plane, which stay aligned, and its few columns are put together
from the lanes of two neighbouring vectors.
"""
# mypy: disable-error-code="valid-type, name-defined"
from functools import cache, lru_cache
from typing import Any, NamedTuple

from timm_shiftwise.ops.taichi.lanes import joined, lane_sum, load, store, tile, zeros
from timm_shiftwise.ops.taichi.runtime import LANES, import_taichi

ti = import_taichi()

ROWS = 3
"""Rows that are summed at once, of the output or of a kernel's gradient: measured to be the best of 2 to 8."""
PAD = ROWS - 1
"""Rows of zeros before and behind what is read ``ROWS`` at once."""


class Layout(NamedTuple):
    """Where things lie in scratch, in vectors; a turned (transposed) plane has a row for every column of the image.

    Attributes:
        columns: Vectors that hold a row of a plane and what a kernel reaches beside it.
        turned_columns: The same for a turned plane.
        chunk: Vectors of a row that are summed at once.
        turned_chunk: The same for a turned plane.
        turned_sums_at: First vector of the gradient of the input by the wide kernel, turned.
        sums_at: That of the gradient of the input by the other kernels.
        plane_v_at: That of the tall kernel's gradient of the output; the next two of the square and of the wide one.
        plane_i_at: See ``plane_v_at``.
        plane_h_at: See ``plane_v_at``; turned.
        seen_at: That of the input.
        turned_seen_at: That of the turned input.
        kernel_v_at: That of the tall kernel; the next two of the wide and of the square one.
        kernel_h_at: See ``kernel_v_at``.
        kernel_i_at: See ``kernel_v_at``.
        products_v_at: That of the products for the tall kernel's gradient; the next two of the wide and the square one.
        products_h_at: See ``products_v_at``.
        products_i_at: See ``products_v_at``.
        size: Vectors that a task needs.
    """
    columns: int
    turned_columns: int
    chunk: int
    turned_chunk: int
    turned_sums_at: int
    sums_at: int
    plane_v_at: int
    plane_i_at: int
    plane_h_at: int
    seen_at: int
    turned_seen_at: int
    kernel_v_at: int
    kernel_h_at: int
    kernel_i_at: int
    products_v_at: int
    products_h_at: int
    products_i_at: int
    size: int


@lru_cache(maxsize=256)
def large_layout(height: int, width: int, rows: int, turned_rows: int, n: int) -> Layout:
    """The layout for images of one size, a tall kernel of ``rows`` x n, a wide one of n x ``turned_rows``."""
    def line(length: int) -> tuple[int, int]:
        vectors = -(-(length + n // 2) // LANES)
        count = tile(vectors, 2)
        return -(-vectors // count) * count, count

    columns, count = line(width)
    turned_columns, turned_count = line(height)
    upright = (height + 2 * PAD) * (columns + 1)  # a vector of zeros behind every row
    turned = (width + 2 * PAD) * (turned_columns + 1)

    def kernel(length: int) -> int:
        return -(-(length + 2 * PAD) * n // LANES)

    sizes = dict(
        turned_sums_at=(width + PAD) * turned_columns,
        sums_at=(height + PAD) * columns,
        plane_v_at=upright,
        plane_i_at=upright,
        plane_h_at=turned,
        seen_at=upright,
        turned_seen_at=turned,
        kernel_v_at=kernel(rows),
        kernel_h_at=kernel(turned_rows),
        kernel_i_at=kernel(n),
        products_v_at=(rows + PAD) * n,
        products_h_at=(turned_rows + PAD) * n,
        products_i_at=(n + PAD) * n,
    )
    starts, size = {}, 0
    for name, vectors in sizes.items():
        starts[name] = size
        size += vectors
    return Layout(columns, turned_columns, count, turned_count, **starts, size=size)


@ti.func
def _load_plane(
        cells: ti.template(), at, row, lane, source: ti.template(), first, lines, count, line_step, step,
        kind: ti.template(), real: ti.template()):
    """Copy a plane of a flat array into rows of scratch, from vector ``at``, lane ``lane`` of each row on."""
    for i in range(lines):
        to = (at + ti.cast(i * row, ti.i64)) * LANES + lane
        start = first + ti.cast(i * line_step, ti.i64)
        for j in range(count):
            cells[to + j] = load(source, start + ti.cast(j * step, ti.i64), kind, real)


@ti.func
def _load_turned(cells: ti.template(), at, source: ti.template(), channel, count):
    """Copy the elements of a channel's kernel into scratch backwards: the kernel is turned by half a turn."""
    first = ti.cast(channel, ti.i64) * count
    for t in range(count):
        cells[at + count - 1 - t] = source[first + t]


@ti.func
def _correlate(
        memory: ti.template(), cells: ti.template(), plane, row, lines, columns, kernel, rows, target,
        add: ti.template(), n: ti.template(), count: ti.template(), vector: ti.template()):
    """Correlate a plane with a kernel [rows, n] of which the first element is ``cells[kernel]``."""
    reach = rows // 2
    y = 0
    while y < lines:
        low = ti.max(0, y - reach)
        high = ti.min(lines, y + ROWS + reach)
        v = 0
        while v < columns:
            to = target + ti.cast(y * columns + v, ti.i64)
            sums = ti.static(zeros(ROWS * count, vector))
            if ti.static(add):
                for j in ti.static(range(ROWS)):
                    for t in ti.static(range(count)):
                        sums[j * count + t] = memory[to + j * columns + t]
            for r in range(low, high):
                near = plane + ti.cast(r * row + v, ti.i64)
                weights = kernel + ti.cast((r - y + reach) * n, ti.i64)
                left = memory[near]
                for t in ti.static(range(count)):
                    right = memory[near + t + 1]
                    for b in ti.static(range(n)):
                        seen = left
                        if ti.static(b > 0):
                            seen = joined(left, right, b, vector)
                        for j in ti.static(range(ROWS)):
                            sums[j * count + t] += cells[weights - j * n + b] * seen
                    left = right
            for j in ti.static(range(ROWS)):
                for t in ti.static(range(count)):
                    memory[to + j * columns + t] = sums[j * count + t]
            v += count
        y += ROWS


@ti.func
def _add_products(
        memory: ti.template(), seen, grad, row, lines, columns, rows, target, n: ti.template(), vector: ti.template()):
    """Add what a plane of the input and one of a branch's gradient give to the gradient of a kernel [rows, n]."""
    reach = rows // 2
    a = 0
    while a < rows:
        sums = ti.static(zeros(ROWS * n, vector))
        for r in range(ti.max(0, a - reach), ti.min(lines, lines + a + PAD - reach)):
            near = seen + ti.cast(r * row, ti.i64)
            far = grad + ti.cast((r - a + reach) * row, ti.i64)
            left = memory[near]
            for v in range(columns):
                right = memory[near + v + 1]
                for b in ti.static(range(n)):
                    here = left
                    if ti.static(b > 0):
                        here = joined(left, right, b, vector)
                    for j in ti.static(range(ROWS)):
                        sums[j * n + b] += memory[far - j * row + v] * here
                left = right
        for t in ti.static(range(ROWS * n)):
            at = target + ti.cast(a * n + t, ti.i64)
            memory[at] = memory[at] + sums[t]  # written out: += on an array is atomic, which vectors cannot be
        a += ROWS


@ti.func
def _store_products(memory: ti.template(), at, out: ti.template(), channel, count, real: ti.template()):
    """Sum the lanes of every product into a flat gradient."""
    first = ti.cast(channel, ti.i64) * count
    for t in range(count):
        out[first + t] = lane_sum(memory[at + t], real)


@cache
def large_backward_kernel(real: Any) -> Any:
    """The kernel that sums in a type of Taichi's; the large kernels are flat [channels, rows, n], the wide transposed.

    The gradient of the input is what the branches' gradients give with the kernels turned by half a turn; that of a
    kernel is what the input gives with its branch's gradient.
    """
    vector = ti.types.vector(LANES, real)

    @ti.kernel
    def large_depthwise_backward_rows(
            grad_h: ti.types.ndarray(ndim=1),
            grad_v: ti.types.ndarray(ndim=1),
            grad_i: ti.types.ndarray(ndim=1),
            x: ti.types.ndarray(ndim=1),
            wide: ti.types.ndarray(dtype=real, ndim=1),
            tall: ti.types.ndarray(dtype=real, ndim=1),
            square: ti.types.ndarray(dtype=real, ndim=1),
            memory: ti.types.ndarray(dtype=vector, ndim=1),
            cells: ti.types.ndarray(dtype=real, ndim=1),  # the same memory, number by number
            grad_x: ti.types.ndarray(ndim=1),
            grad_wide: ti.types.ndarray(dtype=real, ndim=1),
            grad_tall: ti.types.ndarray(dtype=real, ndim=1),
            grad_square: ti.types.ndarray(dtype=real, ndim=1),
            batch: ti.i32, channels: ti.i32, height: ti.i32, width: ti.i32, rows: ti.i32, turned_rows: ti.i32,
            columns: ti.i32, turned_columns: ti.i32, size: ti.i32, tasks: ti.i32, turned_sums_at: ti.i32,
            sums_at: ti.i32, plane_v_at: ti.i32, plane_i_at: ti.i32, plane_h_at: ti.i32, seen_at: ti.i32,
            turned_seen_at: ti.i32, kernel_v_at: ti.i32, kernel_h_at: ti.i32, kernel_i_at: ti.i32,
            products_v_at: ti.i32, products_h_at: ti.i32, products_i_at: ti.i32,
            n: ti.template(), chunk: ti.template(), turned_chunk: ti.template(), want_x: ti.template(),
            want_w: ti.template(), threads: ti.template(), kind: ti.template(),
    ):
        before = ti.static(n // 2)  # lanes of zeros before a row
        row = columns + 1
        turned_row = turned_columns + 1
        ti.loop_config(parallelize=threads)
        for task in range(tasks):
            base = ti.cast(task, ti.i64) * size
            for v in range(size):
                memory[base + v] = vector(0)
            turned_sums = base + turned_sums_at
            sums = base + sums_at
            plane_v = base + plane_v_at + PAD * row
            plane_i = base + plane_i_at + PAD * row
            plane_h = base + plane_h_at + PAD * turned_row
            seen = base + seen_at
            turned_seen = base + turned_seen_at
            kernel_v = (base + kernel_v_at) * LANES + PAD * n
            kernel_h = (base + kernel_h_at) * LANES + PAD * n
            kernel_i = (base + kernel_i_at) * LANES + PAD * n
            products_v = base + products_v_at
            products_h = base + products_h_at
            products_i = base + products_i_at
            begin = ti.cast(ti.cast(task, ti.i64) * channels // tasks, ti.i32)
            end = ti.cast(ti.cast(task + 1, ti.i64) * channels // tasks, ti.i32)
            for c in range(begin, end):
                if ti.static(want_x):
                    _load_turned(cells, kernel_v, tall, c, rows * n)
                    _load_turned(cells, kernel_h, wide, c, turned_rows * n)
                    _load_turned(cells, kernel_i, square, c, n * n)
                if ti.static(want_w):
                    for t in range((rows + turned_rows + n + 3 * PAD) * n):
                        memory[products_v + t] = vector(0)
                for sample in range(batch):
                    first = (ti.cast(sample, ti.i64) * channels + c) * height * width
                    _load_plane(cells, plane_v, row, before, grad_v, first, height, width, width, 1, kind, real)
                    _load_plane(cells, plane_i, row, before, grad_i, first, height, width, width, 1, kind, real)
                    _load_plane(cells, plane_h, turned_row, before, grad_h, first, width, height, 1, width, kind, real)
                    if ti.static(want_w):
                        # as far to the right again, so that equal lanes are those of an element of the kernel
                        _load_plane(cells, seen, row, 2 * before, x, first, height, width, width, 1, kind, real)
                        _load_plane(
                            cells, turned_seen, turned_row, 2 * before, x, first, width, height, 1, width, kind, real)
                        _add_products(memory, seen, plane_v, row, height, columns, rows, products_v, n, vector)
                        _add_products(memory, seen, plane_i, row, height, columns, n, products_i, n, vector)
                        _add_products(
                            memory, turned_seen, plane_h, turned_row, width, turned_columns, turned_rows, products_h, n,
                            vector)
                    if ti.static(want_x):
                        _correlate(
                            memory, cells, plane_h, turned_row, width, turned_columns, kernel_h, turned_rows,
                            turned_sums, False, n, turned_chunk, vector)
                        _correlate(
                            memory, cells, plane_v, row, height, columns, kernel_v, rows, sums, False, n, chunk, vector)
                        _correlate(
                            memory, cells, plane_i, row, height, columns, kernel_i, n, sums, True, n, chunk, vector)
                        for i in range(height):
                            upright = (sums + ti.cast(i * columns, ti.i64)) * LANES
                            for j in range(width):
                                across = (turned_sums + ti.cast(j * turned_columns, ti.i64)) * LANES + i
                                to = first + ti.cast(i * width + j, ti.i64)
                                store(grad_x, to, cells[upright + j] + cells[across], kind)
                if ti.static(want_w):
                    _store_products(memory, products_v, grad_tall, c, rows * n, real)
                    _store_products(memory, products_h, grad_wide, c, turned_rows * n, real)
                    _store_products(memory, products_i, grad_square, c, n * n, real)

    return large_depthwise_backward_rows

"""Triton kernels of a wide, a tall and a square depthwise convolution of one input, and of their gradients.

*Lines* are the rows of the map for the wide and the square kernel, and its columns for the tall one: with the strides
exchanged, one function serves all three. Kernels that lie along the lines, [rows, taps], are matrix products with
Toeplitz matrices,

    out[line, j] = sum_n sum_i x[line + n - rows // 2, i] * T_n[i, j],   T_n[i, j] = taps[n, i - j + reach],

which are built on the fly, of taps that have zeros before and behind, so that none is out of bounds. Sums are float32.
"""
import triton
import triton.language as tl


@triton.jit
def _kept(offset, position, columns, focus_length: tl.constexpr, size: tl.constexpr):
    """Whether ``padding='same'`` keeps a tap, by its offset from the output's position: its window is in the map."""
    window = (offset + focus_length // 2) // size * size + position - focus_length // 2 + size // 2
    return (window >= 0) & (window < columns + 2 * (size // 2) - size + 1)


@triton.jit
def _tile(
        program, channels, height, width, images: tl.constexpr, block_height: tl.constexpr, block_width: tl.constexpr):
    """Channel, first image, row and column; neighbours differ by the channel: some layouts have these side by side."""
    across = tl.cdiv(width, block_width)
    down = tl.cdiv(height, block_height)
    tile = program // channels
    return (
        program % channels, tile // (across * down) * images, tile // across % down * block_height,
        tile % across * block_width)


@triton.jit
def _convolved(
        sums, x, taps, channel, image, first_line, first_column, batch, lines, columns, stride_image, stride_channel,
        stride_line, stride_column, reach, rows: tl.constexpr, zeros: tl.constexpr, focus_length: tl.constexpr,
        size: tl.constexpr, same: tl.constexpr, turned: tl.constexpr, upcast: tl.constexpr, precision: tl.constexpr,
        images: tl.constexpr, block_lines: tl.constexpr, block_columns: tl.constexpr, depth: tl.constexpr):
    """Add to a tile [images * block_lines, block_columns] a convolution or, of turned taps, its input's gradient."""
    length = 2 * (reach + zeros) + 1
    taps += channel * rows * length + reach + zeros
    x += image.to(tl.int64) * stride_image + channel.to(tl.int64) * stride_channel
    number = tl.arange(0, images * block_lines)
    line = first_line + number % block_lines
    column = first_column + tl.arange(0, block_columns)
    lies = number // block_lines * stride_image
    first = tl.maximum(first_column - reach, 0) // depth
    blocks = tl.cdiv(tl.minimum(first_column + block_columns + reach, columns), depth) - first
    for step in range(rows * blocks):
        n = step // blocks
        i = (first + step % blocks) * depth + tl.arange(0, depth)
        source = line + n - rows // 2
        inside = (image + number // block_lines < batch) & (source >= 0) & (source < lines)
        part = tl.load(
            x + (lies + source * stride_line)[:, None] + i[None, :] * stride_column,
            mask=inside[:, None] & (i < columns)[None, :], other=0.)
        if turned:
            offset = column[None, :] - i[:, None]
            toeplitz = tl.load(taps + (rows - 1 - n) * length + offset)
            if same:
                toeplitz = tl.where(_kept(offset, i[:, None], columns, focus_length, size), toeplitz, 0.)
        else:
            offset = i[:, None] - column[None, :]
            toeplitz = tl.load(taps + n * length + offset)
            if same:
                toeplitz = tl.where(_kept(offset, column[None, :], columns, focus_length, size), toeplitz, 0.)
        if upcast:
            part, toeplitz = part.to(tl.float32), toeplitz.to(tl.float32)
        sums = tl.dot(part, toeplitz, sums, input_precision=precision)
    return sums


@triton.jit
def _store(
        out, sums, channel, image, first_line, first_column, batch, channels, lines, columns, stride_line,
        stride_column, images: tl.constexpr, block_lines: tl.constexpr, block_columns: tl.constexpr):
    """Write a tile of :func:`_convolved` to a contiguous map."""
    out += (image.to(tl.int64) * channels + channel) * lines * columns
    number = tl.arange(0, images * block_lines)
    line = first_line + number % block_lines
    column = first_column + tl.arange(0, block_columns)
    lies = number // block_lines * channels * lines * columns + line * stride_line
    inside = (image + number // block_lines < batch) & (line < lines)
    tl.store(
        out + lies[:, None] + column[None, :] * stride_column, sums,
        mask=inside[:, None] & (column < columns)[None, :])


@triton.jit
def forward_kernel(
        x, wide, tall, square, out_wide, out_tall, out_square, batch, channels, height, width, stride_image,
        stride_channel, stride_row, stride_column, reach_wide, reach_tall, align: tl.constexpr, rows: tl.constexpr,
        zeros: tl.constexpr, focus_length: tl.constexpr, size: tl.constexpr, same: tl.constexpr, upcast: tl.constexpr,
        precision: tl.constexpr, images: tl.constexpr, block_height: tl.constexpr, block_width: tl.constexpr,
        depth: tl.constexpr):
    """One of the three branches of a tile of a channel of some images."""
    # tells the compiler that rows are aligned, so that it loads vectors
    width, stride_row = width // align * align, stride_row // align * align
    stride_image, stride_channel = stride_image // align * align, stride_channel // align * align
    # the branches of a tile run at about the same time, so that what they read is in the cache
    program = tl.program_id(0)
    branch = program // channels % 3
    program = program // channels // 3 * channels + program % channels
    channel, image, row, column = _tile(program, channels, height, width, images, block_height, block_width)
    if branch == 0:
        sums = tl.zeros([images * block_height, block_width], tl.float32)
        sums = _convolved(
            sums, x, wide, channel, image, row, column, batch, height, width, stride_image, stride_channel, stride_row,
            stride_column, reach_wide, rows, zeros, focus_length, size, same, False, upcast, precision, images,
            block_height, block_width, depth)
        _store(
            out_wide, sums, channel, image, row, column, batch, channels, height, width, width, 1, images, block_height,
            block_width)
    elif branch == 1:
        turned = tl.zeros([images * block_width, block_height], tl.float32)
        turned = _convolved(
            turned, x, tall, channel, image, column, row, batch, width, height, stride_image, stride_channel,
            stride_column, stride_row, reach_tall, rows, zeros, focus_length, size, same, False, upcast, precision,
            images, block_width, block_height, depth)
        _store(
            out_tall, turned, channel, image, column, row, batch, channels, width, height, 1, width, images,
            block_width, block_height)
    else:
        sums = tl.zeros([images * block_height, block_width], tl.float32)
        sums = _convolved(
            sums, x, square, channel, image, row, column, batch, height, width, stride_image, stride_channel,
            stride_row, stride_column, rows // 2, rows, zeros, focus_length, size, False, False, upcast, precision,
            images, block_height, block_width, depth)
        _store(
            out_square, sums, channel, image, row, column, batch, channels, height, width, width, 1, images,
            block_height, block_width)


@triton.jit
def input_gradient_kernel(
        grad_wide, grad_tall, grad_square, wide, tall, square, grad_x, batch, channels, height, width, stride_image,
        stride_channel, stride_row, stride_column, reach_wide, reach_tall, align: tl.constexpr, rows: tl.constexpr,
        zeros: tl.constexpr, focus_length: tl.constexpr, size: tl.constexpr, same: tl.constexpr, upcast: tl.constexpr,
        precision: tl.constexpr, images: tl.constexpr, block_height: tl.constexpr, block_width: tl.constexpr,
        depth: tl.constexpr):
    """The gradient of the input: what comes from the three branches, added in float32."""
    width, stride_row = width // align * align, stride_row // align * align
    stride_image, stride_channel = stride_image // align * align, stride_channel // align * align
    channel, image, row, column = _tile(
        tl.program_id(0), channels, height, width, images, block_height, block_width)
    sums = tl.zeros([images * block_width, block_height], tl.float32)
    sums = _convolved(
        sums, grad_tall, tall, channel, image, column, row, batch, width, height, stride_image, stride_channel,
        stride_column, stride_row, reach_tall, rows, zeros, focus_length, size, same, True, upcast, precision, images,
        block_width, block_height, depth)
    sums = tl.reshape(sums, [images, block_width, block_height])
    sums = tl.reshape(tl.permute(sums, [0, 2, 1]), [images * block_height, block_width])
    sums = _convolved(
        sums, grad_wide, wide, channel, image, row, column, batch, height, width, stride_image, stride_channel,
        stride_row, stride_column, reach_wide, rows, zeros, focus_length, size, same, True, upcast, precision, images,
        block_height, block_width, depth)
    sums = _convolved(
        sums, grad_square, square, channel, image, row, column, batch, height, width, stride_image, stride_channel,
        stride_row, stride_column, rows // 2, rows, zeros, focus_length, size, False, True, upcast, precision, images,
        block_height, block_width, depth)
    _store(
        grad_x, sums, channel, image, row, column, batch, channels, height, width, width, 1, images, block_height,
        block_width)


@triton.jit
def tap_products_kernel(
        x, grad, products, batch, channels, height, width, x_image, x_channel, x_row, x_column, grad_image,
        grad_channel, grad_row, grad_column, tiles, span, lead, align: tl.constexpr, tall: tl.constexpr,
        rows: tl.constexpr, focus_length: tl.constexpr, size: tl.constexpr, same: tl.constexpr, upcast: tl.constexpr,
        precision: tl.constexpr, images: tl.constexpr, block_lines: tl.constexpr, block_columns: tl.constexpr):
    """What the gradient of the taps is made of, for one row of them: columns of the gradient times those of the input.

    Element [channel, n, tile, j, i] of ``products`` is the sum over images and lines of the gradient at column j of a
    tile of them times the input, n - rows // 2 lines on, at column i - lead of the same tile; taps are the sums along
    diagonals.
    """
    width, x_row, grad_row = width // align * align, x_row // align * align, grad_row // align * align
    x_image, x_channel = x_image // align * align, x_channel // align * align
    grad_image, grad_channel = grad_image // align * align, grad_channel // align * align
    if tall:
        lines, columns, x_line, x_column, grad_line, grad_column = width, height, x_column, x_row, grad_column, grad_row
    else:
        lines, columns, x_line, grad_line = height, width, x_row, grad_row
    program = tl.program_id(0)
    channel = program % channels
    n = program // channels % rows
    tile = program // channels // rows % tiles
    blocks = tl.cdiv(lines, block_lines)
    j = tl.arange(0, block_columns)
    local = program // channels // rows // tiles * block_columns + tl.arange(0, block_columns)
    column = tile * block_columns + j
    i = tile * block_columns + local - lead
    number = tl.arange(0, images * block_lines)
    sums = tl.zeros([block_columns, block_columns], tl.float32)
    x += channel.to(tl.int64) * x_channel
    grad += channel.to(tl.int64) * grad_channel
    for step in range(tl.cdiv(batch, images) * blocks):
        image = step // blocks * images
        line = step % blocks * block_lines + number % block_lines
        source = line + n - rows // 2
        inside = (image + number // block_lines < batch) & (line < lines)
        met = inside & (source >= 0) & (source < lines)
        left = tl.load(
            x + image.to(tl.int64) * x_image + (number // block_lines * x_image + source * x_line)[None, :]
            + i[:, None] * x_column, mask=((i >= 0) & (i < columns))[:, None] & met[None, :], other=0.)
        right = tl.load(
            grad + image.to(tl.int64) * grad_image + (number // block_lines * grad_image + line * grad_line)[:, None]
            + column[None, :] * grad_column, mask=inside[:, None] & (column < columns)[None, :], other=0.)
        if upcast:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision=precision)
    if same:
        offset = i[:, None] - column[None, :]
        sums = tl.where(_kept(offset, column[None, :], columns, focus_length, size), sums, 0.)
    products += ((channel.to(tl.int64) * rows + n) * tiles + tile) * block_columns * span
    tl.store(products + j[None, :] * span + local[:, None], sums, mask=(local < span)[:, None])

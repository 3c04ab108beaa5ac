"""Draw docs/how_it_works.png: how the shift-wise operator works, computed by the package's own code.

    python docs/make_figure.py [FILE]

Besides this package it needs the extra "quickstart".
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from sklearn.datasets import load_digits
from torch import Tensor

from timm_shiftwise.geometry import crop, num_groups, shift, small_padding
from timm_shiftwise.layers import ShiftwiseConv2d
from timm_shiftwise.layers.wiring import released_wiring
from timm_shiftwise.models.variants import SHIFTWISE
from timm_shiftwise.ops import shift_add
from timm_shiftwise.sparsity.masks import random_mask

SETTINGS = SHIFTWISE['sw_tiny']
M, N = SETTINGS['focus_lengths'][0], SETTINGS['kernel_size']
PATHS, SHUFFLES = SETTINGS['num_paths'], SETTINGS['num_shuffles']
GROUPS = num_groups(M, N)
SIZE = 64  # side of the image in pixels

WIDTH, HEIGHT, DPI = 14., 13.75, 110  # inches, the units of everything drawn, and dots an inch
INK, SOFT, FAINT, PALE, ACCENT = '#1f2328', '#57606a', '#8c959f', '#d0d7de', '#0969da'
TITLE = dict(fontsize=12.5, fontweight='bold', va='baseline')
HUES = [to_rgb(colormaps['turbo'](0.06 + 0.88 * g / (GROUPS - 1))) for g in range(GROUPS)]


def digit_image() -> Tensor:
    """A handwritten five, [1, 1, SIZE, SIZE], 0 to 1."""
    digits = load_digits()
    strokes = torch.tensor(digits.images[15], dtype=torch.float32)[None, None] / 16
    enlarged = F.interpolate(strokes, size=SIZE - 8, mode='bicubic', align_corners=False).clamp(0, 1)
    return F.pad(enlarged, [4, 4, 4, 4])


def in_powers_of_ten(number: float) -> str:
    """A small number as people write it."""
    mantissa, exponent = f'{number:.0e}'.split('e')
    return f'${mantissa} \\times 10^{{{int(exponent)}}}$'


def by(*sides: int) -> str:
    """Sides as people write them, with multiplication signs."""
    return ' \N{MULTIPLICATION SIGN} '.join(map(str, sides))


def wave_kernel() -> Tensor:
    """A wide kernel in which one sees where a piece comes from, [N, M]."""
    columns = torch.arange(M) - M // 2
    rows = torch.arange(N) - N // 2
    wave = torch.cos(2 * torch.pi * (columns[None, :] + rows[:, None]) / 13)
    envelope = torch.exp(-(columns[None, :] / (0.45 * M)) ** 2 - (rows[:, None] / N) ** 2)
    return wave * envelope


def cut(kernel: Tensor) -> Tensor:
    """The pieces of a wide kernel [N, M], the last one filled up with zeros: [G, N, N]."""
    padded = F.pad(kernel, [0, GROUPS * N - M])
    return padded.view(N, GROUPS, N).permute(1, 0, 2).contiguous()


def tinted(values: Tensor, group: int, largest: float) -> np.ndarray:
    """An RGB picture of signed values: from white over the group's hue to nearly black."""
    level = (values / largest).clamp(-1, 1).numpy()[..., None]
    hue = np.array(HUES[group])
    pale, dark = 0.25 * hue + 0.75, 0.35 * hue
    up, down = level.clip(0) ** 0.8, (-level).clip(0)
    return pale + (dark - pale) * up + (1 - pale) * down


class Canvas:
    """One axes over the whole figure, in inches from the upper left corner."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH, HEIGHT), facecolor='white')
        FigureCanvasAgg(self.figure)
        self.ax: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.ax.axis('off')

    def save(self, path: Path) -> None:
        self.ax.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0), aspect='equal')  # pictures have moved the limits
        self.figure.savefig(path, dpi=DPI, metadata={'Software': None})

    def picture(self, values, x: float, y: float, width: float, height: float, **kwargs) -> None:
        extent = (x, x + width, y + height, y)
        self.ax.imshow(np.asarray(values), extent=extent, interpolation='nearest', zorder=2, **kwargs)

    def box(self, x: float, y: float, width: float, height: float, color: str | tuple = INK, **kwargs) -> None:
        style = dict(fill=False, linewidth=1, zorder=3)
        self.ax.add_patch(Rectangle((x, y), width, height, edgecolor=color, **{**style, **kwargs}))

    def text(self, x: float, y: float, words: str, **kwargs) -> None:
        style = dict(fontsize=11, color=INK, ha='center', va='center', zorder=5, linespacing=1.35)
        self.ax.text(x, y, words, **{**style, **kwargs})

    def heading(self, y: float, number: str, words: str, explanation: str) -> None:
        self.text(0.35, y, number, fontsize=22, fontweight='bold', color=ACCENT, ha='left')
        self.text(0.8, y, words, fontsize=17, fontweight='bold', ha='left')
        self.text(0.8, y + 0.42, explanation, fontsize=12, color=SOFT, ha='left')

    def arrow(self, start: tuple[float, float], end: tuple[float, float], **kwargs) -> None:
        style = dict(arrowstyle='-|>', mutation_scale=13, linewidth=1.3, color=FAINT, zorder=4, shrinkA=0, shrinkB=0)
        self.ax.add_patch(FancyArrowPatch(start, end, **{**style, **kwargs}))

    def line(self, xs: list[float], ys: list[float], **kwargs) -> None:
        self.ax.plot(xs, ys, **{**dict(color=FAINT, linewidth=1.3, zorder=1, solid_capstyle='butt'), **kwargs})

    def tile(self, kernel: Tensor, group: int, x: float, y: float, side: float, largest: float) -> None:
        """A small kernel in the hue of its group; one that is all zero is crossed out."""
        if kernel.any():
            self.picture(tinted(kernel, group, largest), x, y, side, side)
            self.box(x, y, side, side, HUES[group], linewidth=1.4)
        else:
            self.box(x, y, side, side, PALE, linewidth=1)
            for rise in (0, side):
                self.line([x, x + side], [y + rise, y + side - rise], color=PALE, linewidth=1)


def draw_equality(canvas: Canvas, top: float) -> None:
    """One large kernel, its pieces, their maps, the maps moved, and the sum."""
    image, kernel = digit_image(), wave_kernel()
    pieces = cut(kernel)  # [G, N, N]
    padding = small_padding(N, 'full')
    maps = F.conv2d(image, pieces[:, None], padding=padding)[0]  # [G, map, map]
    of_one_large = F.conv2d(image, kernel[None, None], padding=(N // 2, M // 2))[0, 0]
    added = wide_branch(maps)
    difference = (added - of_one_large).abs().max().item() / of_one_large.abs().max().item()
    if difference > 1e-5:
        raise AssertionError(f'the shifted sum differs from the large kernel by {difference} of its largest value')

    canvas.heading(
        top, '1', 'One large kernel = small kernels, shifted and added',
        f'Cut a {by(N, M)} kernel into {GROUPS} pieces of {by(N, N)}. Each piece is a small convolution of its own. '
        'Move its map sideways by where the piece sat, and add.')

    left, pitch, side = 1.85, 1.07, 0.94
    y_kernel = top + 0.85
    y_maps = y_kernel + side + 0.38
    y_moved = y_maps + side + 0.62
    y_sum = y_moved + side + 0.85
    for y, label in (
            (y_kernel, f'{by(N, M)} kernel,\nin pieces of {by(N, N)}'),
            (y_maps, f'{by(N, N)} convolution\nof the image'),
            (y_moved, 'moved\n(white: zero)'),
    ):
        canvas.text(left - 0.18, y + side / 2, label, ha='right', fontsize=11.5)
    largest, brightest = kernel.abs().max().item(), maps.abs().max().item()
    for g in range(GROUPS):
        x = left + g * pitch
        middle = x + side / 2
        canvas.tile(pieces[g], g, x, y_kernel, side, largest)
        canvas.arrow((middle, y_kernel + side + 0.06), (middle, y_maps - 0.05))
        canvas.picture(tinted(maps[g], g, brightest), x, y_maps, side, side)
        canvas.box(x, y_maps, side, side, HUES[g], linewidth=1.4)

        s = shift(g, M, N, 'full')
        way = side * abs(s) / SIZE
        y_shift = y_maps + side + 0.2
        canvas.arrow((middle - np.sign(s) * way / 2, y_shift), (middle + np.sign(s) * way / 2, y_shift),
                     color=HUES[g], linewidth=2, mutation_scale=10)
        canvas.text(middle, y_shift + 0.2, f'{s:+d} px'.replace('-', '\N{MINUS SIGN}'), fontsize=10.5)

        moved, covered = moved_map(maps[g], s)
        picture = tinted(moved, g, brightest)
        picture[~covered.numpy()] = 1
        canvas.picture(picture, x, y_moved, side, side)
        canvas.box(x, y_moved, side, side, HUES[g], linewidth=1.4)
        canvas.line([middle, middle], [y_moved + side + 0.04, y_moved + side + 0.2])

    # everything above flows into the sum, which the one large convolution beside it equals
    first, last = left + side / 2, left + (GROUPS - 1) * pitch + side / 2
    y_bus, big = y_moved + side + 0.2, 1.5
    middle, below = y_sum + big / 2, y_sum + big + 0.3
    x_sum = left + 8.3 * pitch
    canvas.line([first, last], [y_bus, y_bus])
    canvas.arrow((x_sum + big / 2, y_bus), (x_sum + big / 2, y_sum - 0.06))
    canvas.text(x_sum + big / 2 + 0.16, (y_bus + y_sum) / 2 - 0.03, 'added', ha='left', fontsize=12, fontweight='bold')
    grey = dict(cmap='gray', vmin=of_one_large.min().item(), vmax=of_one_large.max().item())
    canvas.picture(added, x_sum, y_sum, big, big, **grey)
    canvas.box(x_sum, y_sum, big, big)
    canvas.text(x_sum + big / 2, below, 'small ones, shifted and added', va='baseline')

    x_large = x_sum - 1.75 - big
    canvas.picture(of_one_large, x_large, y_sum, big, big, **grey)
    canvas.box(x_large, y_sum, big, big)
    canvas.text(x_large + big / 2, below, 'one large convolution', va='baseline')
    between = (x_sum + x_large + big) / 2
    canvas.text(between, middle - 0.18, '=', fontsize=30, fontweight='bold', color=ACCENT)
    canvas.text(between, middle + 0.3, f'largest difference\n{in_powers_of_ten(difference)} of\nthe maximum',
                fontsize=10.5, color=SOFT)

    x_image = left - 0.6
    canvas.picture(image[0, 0], x_image, y_sum, big, big, cmap='gray')
    canvas.box(x_image, y_sum, big, big)
    canvas.text(x_image + big / 2, below, 'the image', va='baseline')
    pixel = 2.6 / M
    x_strip = x_image + big + 0.5
    canvas.text((x_image + big + x_strip) / 2, middle + 0.06, '*', fontsize=24)
    for g in range(GROUPS):
        columns = min(N, M - g * N)
        canvas.picture(tinted(pieces[g, :, :columns], g, largest), x_strip + g * N * pixel, middle - N * pixel / 2,
                       columns * pixel, N * pixel)
    canvas.box(x_strip, middle - N * pixel / 2, M * pixel, N * pixel)
    canvas.text(x_strip + M * pixel / 2, below, f'the {by(N, M)} kernel', va='baseline')
    canvas.arrow((x_strip + M * pixel + 0.1, middle), (x_large - 0.1, middle))


def wide_branch(maps: Tensor) -> Tensor:
    """The package's operator on the maps [G, map, map] of a wide kernel's pieces: [SIZE, SIZE]."""
    # kernels of its own for each branch; the tall and the centre one get maps of nothing
    wiring = released_wiring('eq_slak', 1, M, N, 1)
    nothing = torch.zeros(GROUPS + 1, *maps.shape[1:])
    return shift_add(torch.cat([maps, nothing])[None], wiring, M, N)[0][0, 0]


def moved_map(small_map: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """What the operator reads of a map at the image's positions, and where it finds something: [SIZE, SIZE] both."""
    rows = torch.arange(SIZE) + crop(N, 'full')
    columns = torch.arange(SIZE) - s
    inside = (columns >= 0) & (columns < small_map.shape[1])
    covered = inside[None].expand(SIZE, SIZE)
    return small_map[rows][:, columns.clamp(0, small_map.shape[1] - 1)] * covered, covered


def draw_operator(canvas: Canvas, top: float) -> None:
    """Paths, masks, shared kernels in several orders, the three branches, and what an output pixel sees."""
    layer = example_layer()
    channel = 5
    canvas.heading(
        top, '2', 'The shift-wise operator shares its small kernels among three branches',
        f'Every branch reads the same {GROUPS} maps of a channel, in orders of its own, drawn once and kept. '
        'Small kernels that matter least are pruned while it trains.')

    kernels = layer.kernels.detach()[:, channel] * layer.group_mask[:, channel, :, None, None]  # [P, G, N, N]
    summed = kernels.sum(0)
    largest = 2.2 * kernels.std().item()
    y_title, y_top = top + 1.08, top + 1.25

    # the kernels of one channel
    side, pitch, left = 0.29, 0.33, 0.85
    right = left + GROUPS * pitch - (pitch - side)
    y = y_top
    canvas.text((left + right) / 2, y_title, f'one channel\'s {GROUPS} small kernels', **TITLE)
    for path in range(PATHS):
        for g in range(GROUPS):
            canvas.tile(kernels[path, g], g, left + g * pitch, y, side, largest)
        canvas.text(right + 0.12, y + side / 2, f'path {path + 1}', ha='left', color=SOFT)
        canvas.text(left - 0.22, y + side / 2, '+' if path else '', fontsize=15, fontweight='bold')
        y += side + 0.13
    canvas.line([left, right], [y - 0.02, y - 0.02], color=INK)
    y += 0.1
    canvas.text(left - 0.22, y + side / 2, '=', fontsize=15, fontweight='bold')
    for g in range(GROUPS):
        canvas.tile(summed[g], g, left + g * pitch, y, side, 1.4 * largest)
    x_wide = 5.95
    canvas.arrow((right + 0.12, y + side / 2), (x_wide - 0.2, y + side / 2))
    canvas.text((left + right) / 2, y + side + 0.24, 'crossed out: pruned, on both paths', color=SOFT)
    draw_ghosts(canvas, layer, left, right, top + 3.35)

    # the branches that read their maps
    side, pitch = 0.24, 0.265
    long, short = GROUPS * pitch - (pitch - side), SHUFFLES * pitch - (pitch - side)
    x_tall, x_centre, y_centre = x_wide + long + 0.4, x_wide + (long - short) / 2, y_top + long - side - 0.32
    for r, wired in enumerate(layer.wiring[:, channel].tolist()):
        across = r * pitch
        tiles = [(wired[2 * GROUPS], x_centre + across, y_centre)]
        for place in range(GROUPS):
            tiles.append((wired[place], x_wide + place * pitch, y_top + across))
            tiles.append((wired[GROUPS + place], x_tall + across, y_top + place * pitch))
        for g, x, y in tiles:
            canvas.tile(summed[g], g, x, y, side, 1.4 * largest)
    canvas.text(x_wide + long / 2, y_title, 'wide', **TITLE)
    canvas.text(x_wide + long / 2, y_top + short + 0.3, f'{SHUFFLES} orders, added;\nthe place is the shift',
                color=SOFT)
    canvas.text(x_tall + short / 2, y_title, 'tall', **TITLE)
    canvas.text(x_centre + short / 2, y_centre - 0.16, 'centre', **TITLE)
    canvas.text(x_centre + short / 2, y_centre + side + 0.2, 'one of each order, not shifted', color=SOFT)

    # what it all amounts to
    field = seen_by_centre(layer, channel)
    big = long
    x_field = WIDTH - 0.4 - big
    extreme = field.abs().flatten().sort().values[-2].item()  # the largest is the skip inside
    canvas.arrow((x_tall + short + 0.1, y_top + long / 2), (x_field - 0.1, y_top + long / 2))
    canvas.text(x_field + big / 2, y_title, 'what one output pixel sees', **TITLE)
    canvas.picture(field, x_field, y_top, big, big, cmap='RdBu_r', vmin=-extreme, vmax=extreme)
    canvas.box(x_field, y_top, big, big)
    canvas.text(x_field + big / 2, y_top + big + 0.3,
                'the branches, each normalised, added to\nthe input (red adds, blue takes away)', color=SOFT)

    shared, separate = GROUPS * N * N, 2 * M * N
    canvas.text(
        left, top + 5.05,
        f'Weights a channel: {by(GROUPS, N, N)} = {shared}, shared, where a wide {by(N, M)} and a tall {by(M, N)} '
        f'kernel have {by(2, M, N)} = {separate}: {separate / shared:.2f} times fewer, before pruning.',
        ha='left', fontsize=12)


def draw_ghosts(canvas: Canvas, layer: ShiftwiseConv2d, left: float, right: float, y: float) -> None:
    """The channels that are worked on, and after them those that pass by, in and out."""
    width, height, fall = (right - left) / layer.dim, 0.2, 0.75
    split = left + (layer.num_worked - 0.25) * width
    for channel in range(layer.dim):
        color, x = ACCENT if channel < layer.num_worked else FAINT, left + channel * width
        for row in (y, y + fall):
            canvas.box(x, row, width * 0.75, height, fill=True, facecolor=color, linewidth=0)
        canvas.line([x + width * 0.375] * 2, [y + height, y + fall], color=color, linewidth=0.7)
    canvas.box(left, y + height + 0.12, split - left, fall - height - 0.24, ACCENT, fill=True, facecolor='white')
    canvas.text((left + split) / 2, y + (height + fall) / 2, 'wide + tall + centre', color=ACCENT)
    for row, words in ((y, 'in'), (y + fall, 'out')):
        canvas.text(right + 0.12, row + height / 2, words, ha='left', color=SOFT)
    canvas.text((left + right) / 2, y - 0.17, f'the {layer.dim} channels of the layer', **TITLE)
    y_words = y + fall + height + 0.23
    canvas.text(left, y_words, f'{layer.num_worked} worked on', ha='left', va='baseline', color=ACCENT)
    canvas.text(right, y_words, f'{layer.num_ghost} ghosts pass by', ha='right', va='baseline', color=SOFT)


def example_layer() -> ShiftwiseConv2d:
    """The operator of sw_tiny's first stage with fresh weights and a mask of the default sparsity."""
    torch.manual_seed(0)
    layer = ShiftwiseConv2d(
        SETTINGS['dims'][0], M, N,
        operator=SETTINGS['operator'],
        num_paths=PATHS,
        num_shuffles=SHUFFLES,
        ghost_ratio=SETTINGS['ghost_ratio'],
    )
    mask = layer.group_mask
    kept = round((1 - SETTINGS['sparsity']) * mask[0].numel())
    mask.copy_(random_mask(tuple(mask.shape[1:]), kept, seed=0, step=0, layer=0))  # the same on all paths
    return layer.eval()


def seen_by_centre(layer: ShiftwiseConv2d, channel: int) -> Tensor:
    """Gradient of a channel's central output with respect to its input, [side, side]."""
    side = 2 * GROUPS * N - M + 4  # G * N is more than M, so a wide kernel reaches farther to the right
    x = torch.zeros(1, layer.dim, side, side, requires_grad=True)
    gradient, = torch.autograd.grad(layer(x)[0, channel, side // 2, side // 2], x)
    return gradient[0, channel]


def draw(path: Path) -> None:
    """Draw both parts into a PNG file."""
    canvas = Canvas()
    draw_equality(canvas, 0.45)
    draw_operator(canvas, 8.4)
    canvas.save(path)


if __name__ == '__main__':
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name('how_it_works.png'))

"""Pictures of a run, each as HTML: curves as SVG in the page's own colours, maps of cells as small PNGs."""
import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from .changes import Fate

_INK, _FAINT, _GRID = '#010101', '#020202', '#030303'
_THEME = {_INK: 'var(--ink)', _FAINT: 'var(--faint)', _GRID: 'var(--grid)'}
"""Colours that the page sets, by what stands for them while a picture is drawn."""
# of Okabe and Ito's palette, which the colour-blind can tell apart, what is seen on white and on black
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7')
_MARKERS = 'os^D'
_SIZE = (5.2, 3)  # inches
FATES = {
    Fate.KEPT: ('kept throughout', '#0072b2'),
    Fate.GROWN: ('grown, and kept', '#56b4e9'),
    Fate.PRUNED: ('pruned, and gone', '#e69f00'),
    Fate.OFTEN: ('exchanged more than once', '#d55e00'),
    Fate.NEVER: ('never kept', '#8c8c8c40'),
}
"""What a group can have become, and its colour."""


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: What it shows; nothing where the legend shall not name it.
        values: Its value at every epoch that is known.
        style: Which colour and marker it has.
        dashed: Whether it is drawn dashed.
        since: The epoch since which the value of an epoch counts; nothing where it is a state, not a change.
    """
    name: str
    values: Mapping[int, float]
    style: int
    dashed: bool = False
    since: Mapping[int, int] = field(default_factory=dict)


def draw_lines(lines: Sequence[Line], unit: str, description: str, scale: str = 'linear') -> Markup:
    """Draw curves over the epochs, with no line between epochs that do not follow each other.

    Args:
        lines: The curves, each of at least one value.
        unit: What the values are.
        description: What somebody is told who does not see the picture.
        scale: Of the values: ``'linear'``, ``'log'`` if none is zero, or ``'share'``, for people in percent.
    """
    figure, axes = _axes(unit)
    for line in lines:
        colour = COLOURS[line.style % len(COLOURS)]
        epochs = np.arange(min(line.values), max(line.values) + 1)
        values = [line.values.get(int(epoch), math.nan) for epoch in epochs]
        axes.plot(
            epochs, values, color=colour, label=line.name or None, linestyle='--' if line.dashed else '-',
            linewidth=1.2 if line.dashed else 1.8,
            marker=None if line.dashed else _MARKERS[line.style % len(_MARKERS)], markersize=3.5)
        for epoch, start in line.since.items():
            if epoch - start > 1:
                axes.hlines(line.values[epoch], start, epoch, color=colour, linewidth=1.8)
    if scale == 'share':
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=' %'))
        axes.set_ylim(bottom=0)
    elif scale == 'log' and all(value > 0 for line in lines for value in line.values.values()):
        axes.set_yscale('log')
    return _svg(figure, axes, description)


def draw_fates(cells: np.ndarray, description: str) -> Markup:
    """Draw what became of each group: values of :class:`.Fate` [C, K], a column for each channel."""
    palette = np.array([_rgba(FATES[fate][1]) for fate in sorted(FATES)], dtype=np.uint8)
    return _cells(palette[cells.T], description, 'fates')


def draw_kept(mask: np.ndarray, description: str) -> Markup:
    """Draw which groups of a channel are kept, bool [P, K], a row for each path."""
    kept, pruned = _rgba(FATES[Fate.KEPT][1]), _rgba(FATES[Fate.NEVER][1])
    pixels = np.where(mask[..., None], kept, pruned).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    pixels[7::8], pixels[:, 7::8] = 0, 0  # lines between neighbours
    return _cells(pixels, description, 'kept')


def draw_kernel(kernel: np.ndarray, largest: float, description: str) -> Markup:
    """Draw a kernel [rows, columns]: blue below zero, white at zero, red above, to the largest value either way."""
    shares = (kernel / largest + 1) / 2 if largest else np.full(kernel.shape, .5)
    return _cells(np.round(255 * matplotlib.colormaps['RdBu_r'](shares)).astype(np.uint8), description, 'kernel')


def _axes(unit: str) -> tuple[Figure, Axes]:
    # a Figure of its own: pyplot, and with it the backend of whoever calls, is left alone
    figure = Figure(figsize=_SIZE, layout='constrained', facecolor='none')
    axes = figure.add_subplot(facecolor='none')
    axes.set_xlabel('epoch', color=_FAINT)
    axes.set_ylabel(unit, color=_FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color=_GRID, linewidth=.6)
    axes.tick_params(which='both', color=_GRID, labelcolor=_FAINT)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ('left', 'bottom'), color=_GRID)
    return figure, axes


def _svg(figure: Figure, axes: Axes, description: str) -> Markup:
    axes.legend(
        loc='lower center', bbox_to_anchor=(.5, 1), ncols=4, frameon=False, labelcolor=_INK, fontsize=9,
        handlelength=1.6, columnspacing=1.2)
    stream = io.StringIO()
    # text stays text, which readers can read out and search; names within a picture are the same in every call
    with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': description}):
        FigureCanvasSVG(figure).print_svg(
            stream, metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')))
    text = stream.getvalue()
    for stand_in, colour in _THEME.items():
        text = text.replace(stand_in, colour)
    start = text.index('<svg') + len('<svg')  # what is before is for a file of its own
    return Markup('<svg role="img" aria-label="{}"').format(description) + Markup(text[start:])


def _cells(pixels: np.ndarray, description: str, kind: str) -> Markup:
    """Cells [rows, columns, 4] as a picture of a pixel each, which the page enlarges."""
    rows, columns, _ = pixels.shape
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, 'PNG', optimize=True)
    return Markup(
        '<img class="{}" alt="{}" style="--rows: {}; --columns: {}" src="data:image/png;base64,{}">').format(
            kind, description, rows, columns, base64.b64encode(stream.getvalue()).decode())


def _rgba(colour: str) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in to_rgba(colour))

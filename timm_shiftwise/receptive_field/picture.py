"""A picture of effective receptive fields, a panel for each network."""
import io
import math
from collections.abc import Sequence
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .effective import SHARES, ReceptiveField

_PANEL, _GAP, _ABOVE, _BELOW, _LINE = 3.2, 0.35, 1.0, 0.2, 0.147  # inches; the last two are of the caption
_MOST_COLUMNS = 4
_INK, _FAINT, _REACH = '#222222', '#6b6b70', '#d9680d'
_DPI = 150


def draw_receptive_fields(fields: Sequence[ReceptiveField], shares: Sequence[float] = SHARES) -> bytes:
    """Draw receptive fields side by side, their squares and the exact reach drawn in.

    Args:
        fields: What was measured, of images of one size each.
        shares: Shares whose squares are drawn.

    Returns:
        A PNG file.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not fields:
        raise ValueError('There must be at least one receptive field to draw, got none.')
    columns = min(len(fields), _MOST_COLUMNS)
    rows = math.ceil(len(fields) / columns)
    width = columns * _PANEL + (columns + 1) * _GAP
    panel = _PANEL + _ABOVE
    caption = _caption(fields, shares, round(width * 15))
    height = rows * panel + _BELOW + _LINE * len(caption)
    # a Figure of its own: pyplot, and with it the backend of whoever calls, is left alone
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor='white')
    for index, field in enumerate(fields):
        row, column = divmod(index, columns)
        left, bottom = _GAP + column * (_PANEL + _GAP), height - (row + 1) * panel
        axes = figure.add_axes((left / width, bottom / height, _PANEL / width, _PANEL / height))
        _draw(axes, field, shares)
    figure.text(
        _GAP / width, 0.1 / height, '\n'.join(caption), ha='left', va='bottom', fontsize=7.5, color=_FAINT,
        linespacing=1.4)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def _draw(axes: Axes, field: ReceptiveField, shares: Sequence[float]) -> None:
    scores = field.log_scores
    height, width = scores.shape
    # the fourth root lets what is faint be seen; the squares are of the scores themselves
    axes.imshow(scores ** 0.25, cmap='Greens', vmin=0, vmax=1, interpolation='nearest', aspect='equal')
    lines = []
    for square in field.squares(shares):
        margin = square.side / 2
        axes.add_patch(Rectangle(
            (width // 2 - margin, height // 2 - margin), square.side, square.side, fill=False, edgecolor=_INK,
            linewidth=0.8))
        lines.append(f'{100 * square.share:g} %: {square.side} px')
    if field.reach is not None and not field.reach.all():
        axes.contour(field.reach.astype(float), levels=[.5], colors=_REACH, linewidths=1, linestyles='dashed')
    axes.set_xlim(-.5, width - .5)
    axes.set_ylim(height - .5, -.5)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(_FAINT)
    facts = '\n'.join(fill(fact, 52) for fact in (*_halves(lines), f'weights: {field.weights}'))
    axes.annotate(
        facts, (0, 1), xytext=(0, 4), xycoords='axes fraction',
        textcoords='offset points', va='bottom', fontsize=7.5, color=_FAINT, linespacing=1.3)
    axes.annotate(
        field.model, (0, 1), xytext=(0, 22 + 10 * facts.count('\n')), xycoords='axes fraction',
        textcoords='offset points', va='bottom', fontsize=11, fontweight='bold', color=_INK)


def _halves(lines: list[str]) -> list[str]:
    middle = math.ceil(len(lines) / 2)
    return ['   '.join(part) for part in (lines[:middle], lines[middle:]) if part]


def _caption(fields: Sequence[ReceptiveField], shares: Sequence[float], columns: int) -> list[str]:
    sizes = sorted({field.scores.shape for field in fields})
    seen = sorted({f'{field.images} x {field.seen}' for field in fields})
    listed = ', '.join(f'{100 * share:g}' for share in shares)
    text = (
        f'Darker pixels matter more to the middle of the feature map. Squares: the smallest around the middle that '
        f'hold {listed} % of log10(scores + 1). Images: {"; ".join(seen)}, '
        f'{" and ".join(f"{height} x {width}" for height, width in sizes)} pixels.')
    if any(field.reach is not None and not field.reach.all() for field in fields):
        text += ' Dashed: beyond it no kept kernel reaches.'
    if any(field.sees_all for field in fields):
        text += ' Layers that pool over the whole map let every pixel through besides.'
    if any(field.weights.startswith('random') for field in fields):
        text += ' Untrained networks rank differently from trained ones.'
    return fill(text, columns).splitlines()

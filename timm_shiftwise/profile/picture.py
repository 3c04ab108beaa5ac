"""A picture of which groups a network keeps: a bar and a map of channels and groups for every layer."""
import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from timm_shiftwise.ops.files import replacing

from .kept import NetworkGroups, StageGroups, percent

_COLOURS = ('#1f6fb4', '#d9680d', '#2c8a4b', '#8a4fb0')
_PRUNED, _INK, _FAINT = '#e9e9ec', '#222222', '#6b6b70'
_LAYER = 0.42  # inches a layer takes at least
_STAGE = 1.75  # inches a stage takes at least, so that its heading fits
_LEAST = 4 * _STAGE  # inches all stages take at least
_GAP = 0.16  # inches between stages
_BARS, _BETWEEN, _MAPS = 1.8, 0.15, 4.6  # inches, from top to bottom
_MAP = 0.84  # of the room of a layer that its bar and its map take
_RULED = 60  # channels of a stage up to which lines part the cells of its maps
_DPI = 150


def draw_groups(groups: NetworkGroups, name: str, path: str | Path) -> None:
    """Draw the kept groups of a network into a PNG file, which is written beside its place and renamed when whole.

    Args:
        groups: The kept groups.
        name: What the network is called in the title.
        path: The file; one that is there is replaced.

    Raises:
        OSError: If the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_bytes(groups_picture(groups, name))


def groups_picture(groups: NetworkGroups, name: str) -> bytes:
    """As :func:`draw_groups`, the PNG file's bytes."""
    stream = io.BytesIO()
    FigureCanvasAgg(_figure(groups, name)).print_png(stream)
    return stream.getvalue()


def _figure(groups: NetworkGroups, name: str) -> Figure:
    # a Figure of its own: pyplot, and with it the backend of whoever calls, is left alone
    widths = [max(_LAYER * len(stage.layers), _STAGE) for stage in groups.stages]
    widths = [inches * max(1., _LEAST / sum(widths)) for inches in widths]
    left, right, bottom, top = 0.85, 0.2, 0.95, 2.2
    width = left + sum(widths) + _GAP * (len(widths) - 1) + right
    height = bottom + _MAPS + _BETWEEN + _BARS + top
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor='white')
    x = left
    for index, (stage, inches) in enumerate(zip(groups.stages, widths, strict=True)):
        colour = _COLOURS[index % len(_COLOURS)]
        at, of = x / width, inches / width
        upper = figure.add_axes((at, (bottom + _MAPS + _BETWEEN) / height, of, _BARS / height))
        lower = figure.add_axes((at, bottom / height, of, _MAPS / height))
        _draw_bars(upper, stage, colour, first=index == 0)
        _draw_maps(lower, stage, colour, first=index == 0)
        _draw_heading(upper, index, stage, colour)
        x += inches + _GAP
    _describe(figure, groups, name, width, height)
    return figure


def _draw_heading(axes: Axes, index: int, stage: StageGroups, colour: str) -> None:
    ghosts = f' of {stage.dim}' if stage.dim > stage.channels else ''
    groups = '1 group' if stage.maps == 1 else f'{stage.maps} groups'
    facts = f'focus length {stage.focus_length}\n{groups} a channel\n{stage.channels}{ghosts} channels'
    heading = f'Stage {index + 1}: {percent(stage.density)} kept'
    for text, above, weight in ((facts, 17, 'normal'), (heading, 53, 'bold')):
        axes.annotate(
            text, (0, 1), xytext=(0, above), xycoords='axes fraction', textcoords='offset points', va='bottom',
            fontsize=8.5, fontweight=weight, color=colour, linespacing=1.3)


def _draw_bars(axes: Axes, stage: StageGroups, colour: str, first: bool) -> None:
    densities = [100 * layer.density for layer in stage.layers]
    places = range(len(densities))
    axes.bar(places, [100] * len(densities), width=_MAP, color=_PRUNED)
    axes.bar(places, densities, width=_MAP, color=colour)
    axes.axhline(100 * stage.density, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    for place, density in zip(places, densities, strict=True):
        axes.text(place, 102, f'{density:.0f} %', ha='center', va='bottom', fontsize=8, color=_INK)
    axes.set_xlim(-_MAP / 2, len(densities) - 1 + _MAP / 2)
    axes.set_ylim(0, 100)
    axes.set_xticks([])
    if first:
        axes.set_ylabel('kept groups, %', fontsize=9)
        axes.tick_params(axis='y', labelsize=8)
    else:
        axes.set_yticks([])
    _bare(axes)


def _draw_maps(axes: Axes, stage: StageGroups, colour: str, first: bool) -> None:
    for place, layer in enumerate(stage.layers):
        axes.imshow(
            _map_pixels(layer.mask, colour), extent=(place - _MAP / 2, place + _MAP / 2, 0, 1), aspect='auto',
            interpolation='nearest')
        if stage.channels <= _RULED:
            axes.vlines(place + _MAP * (np.arange(1, stage.maps) / stage.maps - .5), 0, 1, color='white', linewidth=.6)
    axes.set_xlim(-_MAP / 2, len(stage.layers) - 1 + _MAP / 2)
    if stage.channels <= _RULED:
        axes.hlines(np.arange(1, stage.channels) / stage.channels, *axes.get_xlim(), color='white', linewidth=.6)
    axes.set_ylim(0, 1)
    axes.set_xticks(range(len(stage.layers)), [str(place + 1) for place in range(len(stage.layers))])
    axes.tick_params(axis='x', labelsize=8, length=0)
    axes.set_yticks([])
    if first:
        axes.set_ylabel('channels, sorted by how many groups they keep', fontsize=9)
    _bare(axes)


def _map_pixels(mask: Tensor, colour: str) -> np.ndarray:
    """Colours [rows, K, 3] of a mask [C, K]; where there are more channels than pixels, neighbours are averaged."""
    kept = mask.numpy()
    kept = kept[np.argsort(-kept.sum(axis=1), kind='stable')]
    pixels = np.where(kept[..., None], to_rgb(colour), to_rgb(_PRUNED))
    rows = min(len(kept), int(_MAPS * _DPI))
    starts = np.arange(rows) * len(kept) // rows
    return np.add.reduceat(pixels, starts, axis=0) / np.diff([*starts, len(kept)])[:, None, None]


def _bare(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)


def _describe(figure: Figure, groups: NetworkGroups, name: str, width: float, height: float) -> None:
    say = 'every group is kept (dense)' if groups.is_dense else f'{percent(groups.density)} of the groups are kept'
    figure.text(
        0.2 / width, 1 - 0.2 / height, f'{name}: {say}', ha='left', va='top', fontsize=14, fontweight='bold',
        color=_INK)
    steps = f', after {groups.step:,} optimiser steps' if groups.step else ''
    lines = [
        f'{groups.kept:,} of {groups.total:,}{steps}. A group is one small kernel of one channel.',
        'Bars: the share of its groups that each layer keeps. Maps: a row for each channel, a column for each group.',
    ]
    if any(stage.dim > stage.channels for stage in groups.stages):
        lines.append('Channels that pass through untouched have no groups and are not shown.')
    figure.text(
        0.2 / width, 1 - 0.52 / height, '\n'.join(lines), ha='left', va='top', fontsize=9, color=_FAINT,
        linespacing=1.4)
    figure.text(0.5, 0.5 / height, 'block of the stage', ha='center', va='bottom', fontsize=9, color=_INK)
    figure.legend(
        handles=[
            *(
                Patch(color=_COLOURS[i % len(_COLOURS)], label=f'kept, stage {i + 1}')
                for i in range(len(groups.stages))
            ),
            Patch(color=_PRUNED, label='pruned'),
            Line2D([], [], color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="the stage's share"),
        ],
        loc='lower center', bbox_to_anchor=(0.5, 0.05 / height), ncols=len(groups.stages) + 2, frameon=False,
        fontsize=8.5, handlelength=1.6)

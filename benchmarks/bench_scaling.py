"""How the cost grows with the focus length M, the resolution, the batch and the share of kept groups.

    python benchmarks/bench_scaling.py

One of the four varies at a time; the others stay at M = 51, maps of 56 x 56, a batch of 4 (1 while the resolution
varies) and all groups kept. Everything works on the same 96 channels: the operator in the form that trains, in the way
that it chooses, beside SLaK's pair (on contiguous maps as ours, and on channels-last ones, on which PyTorch is faster)
and ConvNeXt's 7 x 7 as PyTorch runs them. What is timed is checked first. The slope is that of a straight line through
the logarithms: 1 means in proportion, 0 that the cost stays; by the side of the map, 2 means in proportion to its
pixels.
"""
from typing import Any

import numpy as np
import torch
from _common import COLOURS, PHASES, console, logarithmic, measure, new_figure, parser, show, start, write_results
from _operators import SHUFFLES, Call, Operator, SlakPair, noise, seven, shiftwise_layer

from timm_shiftwise.layers import LargeKernelConv2d

CHANNELS, KERNEL_SIZE = 96, 5
AXES = {
    'focus length M': ('focus_length', (13, 25, 51, 101)),
    'side of the map (batch 1)': ('side', (14, 28, 56, 112, 224, 448)),
    'batch': ('batch', (1, 2, 4, 8)),
    'share of kept groups': ('density', (1., .6, .3, .2, .1, .05)),
}
DENSE, SPARSE, PAIR, SEVEN = 'ours, all groups', 'ours, a tenth of the groups', "SLaK's pair", "ConvNeXt's 7 x 7"
PAIR_LAST = "SLaK's pair, channels last"
OURS = 'ours, that share of the groups'
LOOKS = {
    DENSE: COLOURS[0], OURS: COLOURS[0], SPARSE: COLOURS[2], PAIR: COLOURS[1], PAIR_LAST: COLOURS[4], SEVEN: '#777777'}


def problem(
        name: str,
        device: torch.device,
        focus_length: int = 51,
        side: int = 56,
        batch: int = 4,
        density: float = 1.,
) -> Call:
    """Something to time, checked.

    Raises:
        AssertionError: If it computes something else than its definition.
    """
    if name == SEVEN:
        return seven(noise(batch, CHANNELS, side, side, device=device))
    if name in (PAIR, PAIR_LAST):
        layer = LargeKernelConv2d(CHANNELS, focus_length, KERNEL_SIZE).to(device)
        x = noise(batch, CHANNELS, side, side, device=device)
        pair = SlakPair(layer, x if name == PAIR else x.to(memory_format=torch.channels_last))
        pair.check()
        return pair.call
    shiftwise = shiftwise_layer(CHANNELS, focus_length, KERNEL_SIZE, density, device, ghost_ratio=0.)
    operator = Operator(shiftwise, batch, side)
    operator.check(f'M = {focus_length}, {side} px, batch {batch}, density {density}')
    return operator.call


def run(axis: str, args: Any, device: torch.device) -> list[dict]:
    """Time everything along an axis."""
    key, values = AXES[axis]
    fixed: dict[str, Any] = {'batch': args.batch}
    if key == 'side':
        fixed['batch'] = 1
        values = [value for value in values if value <= args.largest]
    rows = []
    for value in values:
        setting = {**fixed, key: value}
        names = {OURS: setting}
        if key != 'density':
            names = {DENSE: setting, SPARSE: {**setting, 'density': .1}}
        names.update(dict.fromkeys((PAIR, PAIR_LAST, SEVEN), setting))
        calls = {name: problem(name, device, **given) for name, given in names.items()}
        for phase in PHASES:
            functions = {name: call.forward if phase == PHASES[0] else call.training for name, call in calls.items()}
            timings = measure(functions, device, args.seconds, args.least)
            rows += [{
                'axis': axis, 'value': value, 'phase': phase, 'what': name, **timing.columns(),
            } for name, timing in timings.items()]
    console.print(f'{axis}: done')
    return rows


def add_slopes(rows: list[dict]) -> None:
    """Add to every row the slope of the line that it lies on."""
    for row in rows:
        line = [other for other in rows if all(other[key] == row[key] for key in ('axis', 'phase', 'what'))]
        row['slope'] = ''
        if len(line) > 1:
            slope, _ = np.polyfit(*(np.log([other[key] for other in line]) for key in ('value', 'median_ms')), 1)
            row['slope'] = round(float(slope), 2)


def report(rows: list[dict], args: Any, device: torch.device) -> None:
    """Tables, CSV and plot."""
    title = f'How cost grows: {CHANNELS} channels, N = {KERNEL_SIZE}, R = {SHUFFLES} (logarithmic)'
    figure, axes = new_figure(len(AXES), title, rows=2)
    legend: dict[str, Any] = {}
    for line, phase in enumerate(PHASES):
        for place, axis_name in zip(axes[line], AXES, strict=True):
            found = [row for row in rows if row['phase'] == phase and row['axis'] == axis_name]
            values = list(dict.fromkeys(row['value'] for row in found))
            lines, slopes = [], {}
            for name in dict.fromkeys(row['what'] for row in found):
                own = [row for row in found if row['what'] == name]
                lines.append([name, *(f'{row["median_ms"]:.2f}' for row in own), str(own[0]['slope'])])
                drawn, = place.plot(
                    values, [row['median_ms'] for row in own], color=LOOKS[name], marker='o', markersize=3.5)
                slopes[drawn] = str(own[0]['slope'])
                legend[DENSE if name == OURS else name] = drawn  # one look: the axis tells the share
            show(f'{phase}, median ms by {axis_name}', [axis_name, *map(str, values), 'slope'], lines)
            logarithmic(place.xaxis)
            place.set_xticks(values)
            place.set_yscale('log')
            low, high = place.get_ylim()
            place.set_ylim(low, high * (high / low) ** .15)  # room for the slopes
            logarithmic(place.yaxis)
            place.legend(
                slopes.keys(), slopes.values(), fontsize=6.5, loc='upper left', ncols=len(slopes), frameon=False,
                borderaxespad=0, handlelength=.9, handletextpad=.3, columnspacing=.6)
            place.set_title(phase, fontsize=9)
            place.set_xlabel(axis_name)
        axes[line, 0].set_ylabel('ms')
    figure.legend(
        legend.values(), legend.keys(), loc='outside lower center', ncols=len(legend), frameon=False,
        title='above the lines: their slopes')
    write_results(
        args, device, rows, figure, channels=CHANNELS, kernel_size=KERNEL_SIZE, shuffles=SHUFFLES, batch=args.batch)


def main() -> None:
    """Check, time, and write the results."""
    options = parser(__doc__.splitlines()[0], 'scaling', seconds=0.6)
    options.add_argument('--largest', type=int, default=448, help='largest side of a map in pixels')
    args = options.parse_args()
    device = start(args)
    rows = [row for axis in AXES for row in run(axis, args, device)]
    add_slopes(rows)
    report(rows, args, device)


if __name__ == '__main__':
    main()

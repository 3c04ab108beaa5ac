"""The operator: every way to compute it, and merged for inference, against SLaK's pair and ConvNeXt's 7 x 7.

    python benchmarks/bench_operator.py

Per stage of sw_tiny, for N = 5 and N = 3, forward and forward + backward, with peak memory. SLaK's pair and the 7 x 7
work on all channels, our operators on 77 % of them, as those of sw_tiny do: the others pass through. Rows that say "all
channels" work on all.

* training form: ``shiftwise_conv2d``, three branches, computed in a way that is forced or in the one that is chosen;
* inference form: the merged layer, a tall and a wide convolution of all channels, those that pass through included;
* whole layer: the layer as it trains, with its BatchNorms, paths and channels that pass through.

Maps are contiguous, except where a row says "channels last": so they come to most operators within a network, whose
linear layers want the channels last, and PyTorch's wide convolutions are far faster on them.

Everything is checked, values and gradients, before it is timed.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _common import (
    COLOURS,
    PHASES,
    STAGES,
    TRAINED,
    Target,
    console,
    kept_for_backward,
    logarithmic,
    measure,
    memory_of,
    new_figure,
    parser,
    show,
    start,
    under,
    write_results,
)
from _operators import (
    GHOST_RATIO,
    SHUFFLES,
    Call,
    Operator,
    SlakPair,
    check_layer,
    merged_layer,
    noise,
    seven,
    shiftwise_layer,
)
from torch import Tensor, nn

from timm_shiftwise.layers import LargeKernelConv2d, ShiftwiseConv2d
from timm_shiftwise.ops.backend import explain_backend
from timm_shiftwise.ops.depthwise.toeplitz import LEAST_TEMPORARIES, TEMPORARIES_PER_INPUT

DENSITIES = (1.0, 0.6, 0.3, 0.1)
PAIR, SEVEN, SLAK_LAYER = "SLaK's pair", "ConvNeXt's 7 x 7", "SLaK's whole layer"
FORCED = ('shift', 'merged', 'toeplitz', 'fused')
CHOSEN, INFERENCE, LAYER = 'chosen way', 'inference form', 'whole layer'
ALL, LAST, HALF = ', all channels', ', channels last', ', bfloat16'
IN_HALF = ('merged', 'toeplitz')
BASELINES = (PAIR, PAIR + LAST, SEVEN, SEVEN + LAST, SLAK_LAYER, SLAK_LAYER + LAST)
NAMES = (
    *FORCED, CHOSEN, *(name + HALF for name in (*IN_HALF, CHOSEN)), CHOSEN + ALL, INFERENCE, INFERENCE + ALL,
    INFERENCE + LAST, LAYER, LAYER + LAST)

# times faster than SLaK's pair, by stage
FORWARD_DENSE = (6, 12, 15, 7)
FORWARD_TRAINED = 20
TRAINING_DENSE = (5, 5, 4, 2)
TRAINING_TRAINED = 8
FASTER, FASTER_TRAINING = (f'{phase}, times faster than the pair:' for phase in PHASES)
NOISE = 1.05
"""Equal times may differ that much."""
CHOSEN_OVER_BEST = 1.1
KEPT, TEMPORARIES = 2, 4
"""Multiples of the operator's input."""


@dataclass
class Case:
    """Something to time.

    Attributes:
        name: One of :data:`NAMES` or :data:`BASELINES`.
        density: Share of kept groups; None where there are none.
        phase: One of :data:`PHASES`.
        function: The call.
        input_bytes: Size of its input.
        kept: Bytes kept for backward beyond input and parameters, if there is a backward.
    """
    name: str
    density: float | None
    phase: str
    function: Callable[[], Any]
    input_bytes: int
    kept: int | None = None


def ways(device: torch.device) -> tuple[str, ...]:
    """The ways that can be forced there."""
    fused = device.type == 'cpu' and explain_backend('auto', device).backend == 'taichi'
    return FORCED if fused else FORCED[:-1]


def both_phases(name: str, density: float | None, call: Call, known: tuple[Tensor, ...], way: str = '') -> list[Case]:
    """Cases of a call, forward and with its gradients; ``known`` tensors do not count as kept for backward."""
    size, known = call.leaves[0].nbytes, (*call.leaves, *known)
    kept = under(way, lambda: kept_for_backward(call.function, known))
    functions = call.forward, call.training
    if way:
        functions = tuple(partial(under, way, function) for function in functions)
    return [
        Case(name, density, PHASES[0], functions[0], size),
        Case(name, density, PHASES[1], functions[1], size, kept),
    ]


def operator_cases(
        name: str,
        layer: ShiftwiseConv2d,
        density: float,
        batch: int,
        side: int,
        forcible: tuple[str, ...] = (),
        dtype: torch.dtype = torch.float32,
) -> list[Case]:
    """The training form, in ways that are forced and as it chooses, checked."""
    operator = Operator(layer, batch, side, dtype)
    suffix = HALF if dtype == torch.bfloat16 else ''
    cases = []
    for way in (*forcible, ''):
        what = (way or name) + suffix
        under(way, partial(operator.check, f'{what}, density {density}'))
        cases += both_phases(what, density, operator.call, (operator.mask, operator.wiring), way)
    return cases


def inference_case(name: str, layer: ShiftwiseConv2d, density: float, x: Tensor) -> Case:
    """The inference form, checked."""
    merged = merged_layer(layer)

    @torch.no_grad()
    def forward() -> Tensor:
        return merged(x)

    check_layer(lambda first: forward()[:len(first)], layer.eval(), x, f'{name}, density {density}')
    return Case(name, density, PHASES[0], forward, x.nbytes)


def layer_case(name: str, layer: nn.Module, density: float | None, x: Tensor) -> Case:
    """A layer as it trains, checked; forward + backward alone, for nobody runs it otherwise."""
    call = Call(lambda: (layer(x),), [x, *layer.parameters()])
    check_layer(layer, layer, x, name)
    return both_phases(name, density, call, tuple(layer.buffers()))[1]


def all_cases(stage: int, kernel_size: int, batch: int, device: torch.device) -> list[Case]:
    """Everything to time in a stage, SLaK's pair first."""
    dim, side, focus_length = STAGES[stage]
    x = noise(batch, dim, side, side, device=device)
    slak = LargeKernelConv2d(dim, focus_length, kernel_size).to(device)
    last = x.to(memory_format=torch.channels_last)
    cases = []
    for suffix, maps in (('', x), (LAST, last)):
        pair = SlakPair(slak, maps)
        pair.check()
        cases += both_phases(PAIR + suffix, None, pair.call, ())
        cases += both_phases(SEVEN + suffix, None, seven(maps), ())
        cases.append(layer_case(SLAK_LAYER + suffix, slak, None, maps))
    for density in densities(stage):
        layer = shiftwise_layer(dim, focus_length, kernel_size, density, device)
        cases += operator_cases(CHOSEN, layer, density, batch, side, ways(device))
        if density == 1:
            cases += operator_cases(CHOSEN, layer, density, batch, side, IN_HALF, torch.bfloat16)
        cases.append(inference_case(INFERENCE, layer, density, x))
        if density in (1, TRAINED[stage]):
            cases.append(inference_case(INFERENCE + LAST, layer, density, last))
            cases.append(layer_case(LAYER, layer.train(), density, x))
            cases.append(layer_case(LAYER + LAST, layer, density, last))
            everywhere = shiftwise_layer(dim, focus_length, kernel_size, density, device, ghost_ratio=0.)
            cases += operator_cases(CHOSEN + ALL, everywhere, density, batch, side)
            cases.append(inference_case(INFERENCE + ALL, everywhere, density, x))
    return cases


def densities(stage: int) -> list[float]:
    """Those that are timed in a stage, from dense on."""
    return sorted({*DENSITIES, TRAINED[stage]}, reverse=True)


def run(stage: int, kernel_size: int, args: Any, device: torch.device) -> list[dict]:
    """Check and time a stage; one row for each case."""
    cases = all_cases(stage, kernel_size, args.batch, device)
    dim, side, focus_length = STAGES[stage]
    rows = []
    for phase in PHASES:
        found = [case for case in cases if case.phase == phase]
        timings = list(measure(
            {str(i): case.function for i, case in enumerate(found)}, device, args.seconds, args.least).values())
        for case, timing in zip(found, timings, strict=True):
            memory = memory_of(case.function, device)
            rows.append({
                'stage': stage + 1, 'dim': dim, 'side': side, 'focus_length': focus_length, 'kernel_size': kernel_size,
                'phase': phase, 'what': case.name, 'density': case.density,
                'trained_like': case.density == TRAINED[stage],
                **timing.columns(),
                'times_faster_than_pair': round(timings[0].median / timing.median, 3),
                'input_mib': round(case.input_bytes / 2 ** 20, 2),
                'peak_mib': round(memory.peak / 2 ** 20, 2),
                'temporaries_per_input': round(memory.temporaries / case.input_bytes, 2),
                'kept_per_input': None if case.kept is None else round(case.kept / case.input_bytes, 2),
            })
    console.print(f'N = {kernel_size}, stage {stage + 1}: done')
    return rows


class Results:
    """Rows, to be looked up."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def all(self, **wanted: Any) -> list[dict]:
        """The rows with the given values."""
        return [row for row in self.rows if all(row[key] == value for key, value in wanted.items())]

    def ms(self, **wanted: Any) -> float:
        """Median of the one row with the given values."""
        row, = self.all(**wanted)
        return row['median_ms']


def targets(results: Results) -> list[Target]:
    """The ratios that are wanted, and some that are only told; N = 5."""
    found = []
    at = partial(results.ms, kernel_size=5)
    forward, training = (partial(at, phase=phase) for phase in PHASES)
    for stage, trained in enumerate(TRAINED, 1):
        where = f'stage {stage}'
        dense, sparse = dict(stage=stage, density=1.), dict(stage=stage, density=trained)
        pair, pair_training = (one(stage=stage, what=PAIR) for one in (forward, training))
        first = stage == 1
        found += [
            Target(f'{FASTER} dense, inference form', where,
                   pair / forward(what=INFERENCE, **dense), 'at least', FORWARD_DENSE[stage - 1]),
            Target(f'{FASTER} dense, inference form, all channels', where,
                   pair / forward(what=INFERENCE + ALL, **dense)),
            Target(f'{FASTER} dense, training form', where, pair / forward(what=CHOSEN, **dense)),
            Target(f'{FASTER} trained-like, inference form', where, pair / forward(what=INFERENCE, **sparse)),
            Target(f'{FASTER} trained-like, inference form, all channels', where,
                   pair / forward(what=INFERENCE + ALL, **sparse)),
            Target(f'{FASTER} trained-like, training form', where,
                   pair / forward(what=CHOSEN, **sparse), 'at least' if first else '', FORWARD_TRAINED),
            Target(f'forward, trained-like over dense, inference form (equal: within {NOISE - 1:.0%})', where,
                   forward(what=INFERENCE, **sparse) / forward(what=INFERENCE, **dense), 'at most', NOISE),
            Target('forward, trained-like, times faster than dense, training form', where,
                   forward(what=CHOSEN, **dense) / forward(what=CHOSEN, **sparse)),
            Target(f'{FASTER_TRAINING} dense', where,
                   pair_training / training(what=CHOSEN, **dense), 'at least', TRAINING_DENSE[stage - 1]),
            Target(f'{FASTER_TRAINING} dense, all channels', where,
                   pair_training / training(what=CHOSEN + ALL, **dense)),
            Target(f'{FASTER_TRAINING} trained-like', where,
                   pair_training / training(what=CHOSEN, **sparse), 'at least' if first else '', TRAINING_TRAINED),
            Target(f'{FASTER_TRAINING} trained-like, all channels', where,
                   pair_training / training(what=CHOSEN + ALL, **sparse)),
        ]
        for share, at_share in (('dense', dense), ('trained-like', sparse)):
            found.append(Target(
                f'{PHASES[0]}, channels last, times faster than the pair: {share}, inference form', where,
                forward(stage=stage, what=PAIR + LAST) / forward(what=INFERENCE + LAST, **at_share)))
            found += [
                Target(
                    f"{PHASES[1]}{suffix}, whole layer, times faster than SLaK's: {share}", where,
                    training(stage=stage, what=SLAK_LAYER + suffix) / training(what=LAYER + suffix, **at_share))
                for suffix in ('', LAST)]
    found += chooser_targets(results)
    for name, bounded in ((CHOSEN, 'at most'), ('toeplitz', 'at most'), (LAYER, ''), (SLAK_LAYER, '')):
        for row in results.all(what=name, kernel_size=5, phase=PHASES[1]):
            if row['density'] in (None, 1.) or row['trained_like']:
                where = f'stage {row["stage"]}' + (f', density {row["density"]}' if row['density'] else '')
                most = TEMPORARIES
                if name == 'toeplitz':
                    most = max(TEMPORARIES_PER_INPUT, round(LEAST_TEMPORARIES / 2 ** 20 / row['input_mib'], 2))
                found += [
                    Target(f'kept for backward beyond the input, times the input: {name}', where,
                           row['kept_per_input'], bounded, KEPT),
                    Target(f'peak temporaries, times the input: {name}', where,
                           row['temporaries_per_input'], bounded, most),
                ]
    return found


def chooser_targets(results: Results) -> list[Target]:
    """How much slower than the best way the chosen one is, at worst over the densities."""
    found = []
    for phase in PHASES:
        for kernel_size in sorted({row['kernel_size'] for row in results.rows}, reverse=True):
            for stage in range(1, len(STAGES) + 1):
                at = dict(stage=stage, kernel_size=kernel_size, phase=phase)
                ratio, density = max(
                    (results.ms(what=CHOSEN, density=density, **at)
                     / min(row['median_ms'] for row in results.all(density=density, **at) if row['what'] in FORCED),
                     density)
                    for density in densities(stage - 1))
                found.append(Target(
                    f'{phase}, chosen way over the best forced one', f'N = {kernel_size}, stage {stage}, '
                    f'density {density}', ratio, 'at most', CHOSEN_OVER_BEST))
    return found


def table(results: Results, kernel_size: int, phase: str) -> None:
    """Print medians and peaks."""
    def cell(row: dict) -> str:
        return f'{row["median_ms"]:.2f} ({row["times_faster_than_pair"]:.1f}x) {row["peak_mib"]:.0f}'

    lines = []
    for density in (None, *DENSITIES, 'trained'):
        for name in (*BASELINES, *NAMES):
            cells = []
            for stage in range(1, len(STAGES) + 1):
                share = TRAINED[stage - 1] if density == 'trained' else density
                row = results.all(kernel_size=kernel_size, phase=phase, what=name, density=share, stage=stage)
                cells.append(cell(row[0]) if row else '')
            if sum(map(bool, cells)) > 1:  # a density that is the trained one in one stage has one more row there
                lines.append([name if density is None else f'{density}: {name}', *cells])
        lines.append([])
    show(
        f'N = {kernel_size}, {phase}: median ms (times faster than the pair) peak MiB',
        ['density: what', *(f'stage {n}' for n in range(1, len(STAGES) + 1))], lines)


def plot(results: Results) -> Any:
    """Time against density, a row of plots for each N and phase, and memory."""
    panels = [(5, phase, 'median_ms', 'ms') for phase in PHASES] + [(3, phase, 'median_ms', 'ms') for phase in PHASES]
    panels.append((5, PHASES[1], 'peak_mib', 'peak MiB'))
    figure, axes = new_figure(len(STAGES), 'The operator in the stages of sw_tiny, R = 4 (logarithmic)', rows=5)
    styles = {PAIR: '--', PAIR + LAST: '-.', SEVEN: ':'}
    looks = {PAIR: 'black', PAIR + LAST: 'black', SEVEN: '#777777'}
    looks.update(zip((*FORCED, CHOSEN, INFERENCE), COLOURS, strict=False))
    for line, (kernel_size, phase, column, unit) in enumerate(panels):
        for stage, axis in enumerate(axes[line], 1):
            for name, colour in looks.items():
                found = results.all(stage=stage, kernel_size=kernel_size, phase=phase, what=name)
                if not found:
                    continue
                if name in styles:
                    axis.axhline(found[0][column], color=colour, linestyle=styles[name], label=name)
                    continue
                found.sort(key=lambda row: row['density'])
                wide = name in (CHOSEN, INFERENCE)
                axis.plot(
                    [row['density'] for row in found], [row[column] for row in found], color=colour, label=name,
                    marker='o' if wide else '.', markersize=5 if wide else 4, linewidth=1.8 if wide else 1.2,
                    markerfacecolor='none' if wide else colour)
            axis.axvline(
                TRAINED[stage - 1], color='#bbbbbb', linewidth=5, alpha=.4, zorder=0, label='trained-like density')
            logarithmic(axis.xaxis)
            logarithmic(axis.yaxis)
            axis.set_xticks(DENSITIES)
            axis.set_title(f'N = {kernel_size}, stage {stage}, {phase}', fontsize=9)
            if stage == 1:
                axis.set_ylabel(unit)
            if line == len(panels) - 1:
                axis.set_xlabel('share of kept groups')
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=3, frameon=False)
    return figure


def main() -> None:
    """Check, time, and write the results."""
    args = parser(__doc__.splitlines()[0], 'operator', seconds=0.4).parse_args()
    device = start(args)
    rows = [
        row for kernel_size in (5, 3) for stage in range(len(STAGES)) for row in run(stage, kernel_size, args, device)]
    results = Results(rows)
    for kernel_size in (5, 3):
        for phase in PHASES:
            table(results, kernel_size, phase)
    write_results(
        args, device, rows, plot(results), targets(results), batch=args.batch, shuffles=SHUFFLES,
        ghost_ratio=GHOST_RATIO)


if __name__ == '__main__':
    main()

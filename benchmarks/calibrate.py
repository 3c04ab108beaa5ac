"""Measure the tables by which ways to compute the operator are chosen, and print them as code.

    python benchmarks/calibrate.py

prints, beside the medians that they rest on,

* ``FUSED_UP_TO`` of timm_shiftwise/ops/shiftwise_conv/ways.py: up to which share of kept groups the fused way is faster
  than the merged one, by the size of the map and the direction;
* ``TAICHI_IS_FASTER`` of timm_shiftwise/ops/depthwise/frontend.py: whether the gradients of the merged way's large
  kernels take less time in Taichi than in PyTorch, all blocks of sw_tiny together.

What is measured is the operator in the stages of sw_tiny: the channels that it works on, N = 5, R = 4, float32. Both
ways take turns, density by density, in one run; where the ratio of their times crosses 1 is read off the straight line
between the two densities beside it. A row of the table holds down to the geometric mean of the pixels of its map and of
the next smaller one.

Only the rows of this processor's vectors are measured, the others are printed as they stand in the package. On a
processor with AVX-512, which has 16 lanes, those of 8 lanes are measured by

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/calibrate.py

It takes about three minutes on two cores; leave the machine alone meanwhile. ``--stages`` measures some stages only,
and its table is no table for the package; ``--quick`` shows that it works.
"""
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from _common import STAGES, base_parser, check_close, console, measure, show, start, under
from _operators import Operator, noise, shiftwise_layer
from torch import Tensor

from timm_shiftwise.ops.backend import explain_backend
from timm_shiftwise.ops.depthwise import large_kernel_gradients
from timm_shiftwise.ops.depthwise.frontend import TAICHI_IS_FASTER
from timm_shiftwise.ops.large_kernels import assemble_centred
from timm_shiftwise.ops.shiftwise_conv.ways import FUSED_UP_TO, Limit
from timm_shiftwise.ops.taichi.runtime import LANES

KERNEL_SIZE = 5
DENSITIES = (.05, .1, .3, .5, .7, .9, 1.)
DIRECTIONS = FORWARD, BACKWARD = 'forward', 'backward'
BLOCKS = (3, 3, 9, 3)
"""Blocks of the stages of sw_tiny."""


class Row(NamedTuple):
    """What was measured of the two ways.

    Attributes:
        stage: From 0 on.
        direction: ``'forward'`` or ``'backward'``.
        density: Share of kept groups.
        fused: Median of the fused way in milliseconds.
        merged: Median of the merged way in milliseconds.
        ratio: Median of fused over merged, each pair of one round.
    """
    stage: int
    direction: str
    density: float
    fused: float
    merged: float
    ratio: float

    @property
    def pixels(self) -> int:
        """H * W of the map."""
        return STAGES[self.stage][1] ** 2


def turns(calls: dict[Any, Callable[[], Any]], repeats: int, device: torch.device) -> dict[Any, list[float]]:
    """Milliseconds of each call in each round, all calls in turns."""
    timings = measure(calls, device, seconds=0., least=repeats)
    return {key: [1e3 * seconds for seconds in timing.samples] for key, timing in timings.items()}


def gradients(stage: int, args: Any, device: torch.device) -> dict[str, float]:
    """Median milliseconds of the gradients of the large kernels of a stage, by backend, checked.

    Raises:
        AssertionError: If the backends differ.
    """
    dim, side, focus_length = STAGES[stage]
    operator = Operator(shiftwise_layer(dim, focus_length, KERNEL_SIZE, 1., device), args.batch, side)
    kernels = assemble_centred(operator.weight.detach(), operator.wiring, focus_length, side, side)
    calls = {
        backend: partial(
            large_kernel_gradients, tuple(operator.call.grads), operator.x.detach(), kernels, backend, True, True)
        for backend in ('taichi', 'torch')}
    (grad_x, grad_kernels), (wanted_x, wanted_kernels) = (call() for call in calls.values())
    check_close([grad_x, *grad_kernels], [wanted_x, *wanted_kernels], f'gradients, stage {stage + 1}', 1e-3)
    return {backend: statistics.median(times) for backend, times in turns(calls, args.repeats, device).items()}


def both_ways(stage: int, backend: str, args: Any, device: torch.device) -> list[Row]:
    """The two ways in a stage, checked against one another; the merged way's gradients in a backend.

    Raises:
        AssertionError: If they differ.
    """
    dim, side, focus_length = STAGES[stage]
    calls: dict[tuple[str, float, str], Callable[[], Sequence[Tensor]]] = {}
    for density in DENSITIES:
        layer = shiftwise_layer(dim, focus_length, KERNEL_SIZE, density, device)
        x, mask = noise(args.batch, layer.num_worked, side, side, device=device), layer.kept_groups()
        weight = layer.kernels.detach().sum(0) * mask[:, :, None, None]
        grads = [noise(*x.shape, device=device, seed=1 + i) for i in range(3)]
        settings = x, weight, layer.wiring, mask, focus_length, 'full', backend
        functions = (
            partial(torch.ops.timm_shiftwise.shiftwise_conv2d, *settings),
            partial(torch.ops.timm_shiftwise.shiftwise_conv2d_backward, *grads, *settings, True, True))
        for direction, function in zip(DIRECTIONS, functions, strict=True):
            fused, merged = (partial(under, way, function) for way in ('fused', 'merged'))
            seen, wanted = list(fused()), list(merged())
            if direction == BACKWARD:
                wanted[1] = wanted[1] * mask[:, :, None, None]  # the operator's user takes none of a pruned group
            check_close(seen, wanted, f'{direction}, stage {stage + 1}, density {density}', 1e-3)
            calls[direction, density, 'fused'], calls[direction, density, 'merged'] = fused, merged
    times = turns(calls, args.repeats, device)
    rows = []
    for direction in DIRECTIONS:
        for density in DENSITIES:
            fused_times, merged_times = times[direction, density, 'fused'], times[direction, density, 'merged']
            ratio = statistics.median(f / m for f, m in zip(fused_times, merged_times, strict=True))
            rows.append(Row(
                stage, direction, density, statistics.median(fused_times), statistics.median(merged_times), ratio))
    return rows


def crossing(densities: Sequence[float], ratios: Sequence[float]) -> float:
    """Up to which density, of ascending ones, the ratio stays below 1; 0 if nowhere, 1 if everywhere."""
    if ratios[0] >= 1:
        return 0.
    for i in range(1, len(ratios)):
        if ratios[i] >= 1:
            share = (1 - ratios[i - 1]) / (ratios[i] - ratios[i - 1])
            return round(densities[i - 1] + share * (densities[i] - densities[i - 1]), 2)
    return 1.


def limits(rows: Sequence[Row]) -> tuple[Limit, ...]:
    """The rows of the table that measurements of one direction amount to, largest maps first."""
    sizes = sorted({row.pixels for row in rows}, reverse=True)
    found: list[Limit] = []
    for pixels, smaller in zip(sizes, [*sizes[1:], 0], strict=True):
        own = sorted((row for row in rows if row.pixels == pixels), key=lambda row: row.density)
        limit = Limit(_rounded(math.sqrt(pixels * smaller)), crossing(*zip(
            *((row.density, row.ratio) for row in own), strict=True)))
        if found and found[-1].density == limit.density:
            found.pop()
        found.append(limit)
    return tuple(found)


def _rounded(pixels: float) -> int:
    """A number of pixels to one digit and zeros."""
    return int(float(f'{pixels:.0e}'))


def as_code(fused_up_to: dict[tuple[int, str], tuple[Limit, ...]], taichi_is_faster: dict[int, bool]) -> str:
    """Both tables as they stand in the package."""
    lines = ['FUSED_UP_TO: dict[tuple[int, str], tuple[Limit, ...]] = {']
    for (lanes, direction), row in fused_up_to.items():
        named = ', '.join(f'Limit({limit.pixels}, {limit.density})' for limit in row)
        lines.append(f'    ({lanes}, {direction!r}): ({named}{"," if len(row) == 1 else ""}),')
    return '\n'.join([*lines, '}', '', f'TAICHI_IS_FASTER = {taichi_is_faster}'])


def main() -> None:
    """Check, time, and print the tables."""
    options = base_parser(__doc__.splitlines()[0])
    options.add_argument('--repeats', type=int, default=61, help='rounds of all calls')
    options.add_argument(
        '--stages', type=int, nargs='+', choices=range(1, len(STAGES) + 1), default=[1, 2, 3, 4], help='which to time')
    options.set_defaults(device='cpu')
    args = options.parse_args()
    device = start(args)
    args.repeats = 1 if args.quick else args.repeats
    explain_backend('taichi', device)  # or an error that says why there is nothing to compare
    stages = sorted({stage - 1 for stage in args.stages})

    times = {stage: gradients(stage, args, device) for stage in stages}
    total = {
        backend: sum(BLOCKS[stage] * times[stage][backend] for stage in stages) for backend in ('taichi', 'torch')}
    faster = min(total, key=total.__getitem__)
    show(f'{LANES} lanes, batch {args.batch}: gradients of the large kernels, median ms', ['stage', *total], [
        *([f'{stage + 1}: {STAGES[stage][1]} px', *(f'{ms:.2f}' for ms in times[stage].values())] for stage in stages),
        [], ['all blocks of sw_tiny', *(f'{ms:.1f}' for ms in total.values())]])

    rows = [row for stage in stages for row in both_ways(stage, faster, args, device)]
    for direction in DIRECTIONS:
        lines = []
        for stage in stages:
            lines += [[], *([
                f'{stage + 1}: {STAGES[stage][1]} px, {row.density:g}', f'{row.fused:.2f}', f'{row.merged:.2f}',
                f'{row.ratio:.2f}',
            ] for row in rows if (row.stage, row.direction) == (stage, direction))]
        title = f'{LANES} lanes, batch {args.batch}: {direction}, median ms'
        if direction == BACKWARD:
            title += f', merged in {faster}'
        show(title, ['stage, share of kept groups', 'fused', 'merged', 'fused over merged'], lines[1:])
    measured = {
        (LANES, direction): limits([row for row in rows if row.direction == direction]) for direction in DIRECTIONS}
    if len(stages) < len(STAGES):
        console.print('Some stages only: not for the package.')
    print(as_code({**FUSED_UP_TO, **measured}, {**TAICHI_IS_FASTER, LANES: faster == 'taichi'}))


if __name__ == '__main__':
    main()

"""The shift: the Taichi kernel against the five ways to shift in plain PyTorch that the paper lists.

    python benchmarks/bench_shift.py

Every way does the whole work of the shift-add in each stage of sw_tiny: R shuffles a channel, three branches. Every way
is checked, values and gradients, before it is timed. The five ways are slice indexing, torch.roll, a depthwise
convolution with one-hot kernels, F.grid_sample and torchvision's deformable convolution.
"""
from functools import partial

import torch
import torch.nn.functional as F
from _common import COLOURS, PHASES, STAGES, console, measure, new_figure, parser, show, start, write_results
from torch import Tensor
from torchvision.ops import deform_conv2d

from timm_shiftwise.geometry import crop, map_size, num_groups, shift
from timm_shiftwise.layers.wiring import released_wiring
from timm_shiftwise.ops.shift_add import shift_add

KERNEL_SIZE = 5
SHARE_WORKED_ON = 0.77  # 1 - ghost ratio
TARGET = 3.0


class Problem:
    """The shift-add of one stage: maps, wiring and sizes."""

    def __init__(self, width: int, side: int, focus_length: int, batch: int, shuffles: int, device: torch.device):
        self.focus_length = focus_length
        self.groups = num_groups(focus_length, KERNEL_SIZE)
        self.channels = width - int(width * (1 - SHARE_WORKED_ON))
        self.side = side
        generator = torch.Generator().manual_seed(0)
        self.wiring = released_wiring('sw', self.channels, focus_length, KERNEL_SIZE, shuffles).to(device)
        size = map_size(side, KERNEL_SIZE, 'full')
        self.y = torch.randn(batch, self.channels * self.groups, size, size, generator=generator).to(device)
        first = torch.arange(self.channels, device=device) * self.groups
        places = (self.wiring.long() + first[:, None]).transpose(1, 2)
        # which maps lie at a place, [R, G, C], and in the middle, [R, C]
        self.wide, self.tall, self.centre = places[:, :self.groups], places[:, self.groups:-1], places[:, -1]

    def shifts(self) -> list[int]:
        """The shift of every place."""
        return [shift(place, self.focus_length, KERNEL_SIZE, 'full') for place in range(self.groups)]


def taichi(problem: Problem, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, in Taichi."""
    return shift_add(y, problem.wiring, problem.focus_length, KERNEL_SIZE, backend='taichi')


def slices(problem: Problem, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add the part of a map that overlaps the image to the part of the output that it overlaps."""
    e, side = crop(KERNEL_SIZE, 'full'), problem.side
    wide, tall = y[:, :, e:e + side], y[:, :, :, e:e + side]
    h, v = (y.new_zeros(y.shape[0], problem.channels, side, side) for _ in range(2))
    for r in range(len(problem.wide)):
        for place, s in enumerate(problem.shifts()):
            low, high = max(0, s), min(side, y.shape[2] + s)
            if low < high:
                h[..., low:high] += wide[..., low - s:high - s].index_select(1, problem.wide[r, place])
                v[:, :, low:high] += tall[:, :, low - s:high - s].index_select(1, problem.tall[r, place])
    return h, v, identity(problem, y)


def identity(problem: Problem, y: Tensor) -> Tensor:
    """The centre branch, which has no shift."""
    e, side = crop(KERNEL_SIZE, 'full'), problem.side
    centre = y[:, :, e:e + side, e:e + side]
    return torch.stack([centre.index_select(1, maps) for maps in problem.centre]).sum(0)


def roll(problem: Problem, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Roll maps that are padded so far that what comes round is zero."""
    e, side = crop(KERNEL_SIZE, 'full'), problem.side
    pad = max(map(abs, problem.shifts())) + 1
    wide, tall = F.pad(y[:, :, e:e + side], [0, pad]), F.pad(y[:, :, :, e:e + side], [0, 0, 0, pad])
    h, v = (y.new_zeros(y.shape[0], problem.channels, side, side) for _ in range(2))
    for r in range(len(problem.wide)):
        for place, s in enumerate(problem.shifts()):
            if -y.shape[2] < s < side:
                h = h + wide.index_select(1, problem.wide[r, place]).roll(s, 3)[..., :side]
                v = v + tall.index_select(1, problem.tall[r, place]).roll(s, 2)[:, :, :side]
    return h, v, identity(problem, y)


def one_hot(problem: Problem, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One grouped convolution a branch: K maps a channel in, a kernel with a one at every shift."""
    e, side, groups = crop(KERNEL_SIZE, 'full'), problem.side, problem.groups
    shifts = problem.shifts()
    before, after = max(shifts[0], 0), max(-shifts[-1] - (y.shape[2] - side), 0)
    first, length = shifts[0], shifts[0] - shifts[-1] + 1
    taps = torch.tensor([first - s for s in shifts], device=y.device)
    kernels = []
    for table in problem.wiring[:, :, :-1].split(groups, dim=2):
        index = taps.expand_as(table)  # [R, C, G]
        kernel = y.new_zeros(problem.channels, groups * length)
        for r in range(len(table)):
            kernel.scatter_add_(1, table[r].long() * length + index[r], torch.ones_like(index[r], dtype=y.dtype))
        kernels.append(kernel.view(problem.channels, groups, length))
    start_at = before - first
    h = F.conv2d(F.pad(y[:, :, e:e + side], [before, after]), kernels[0][:, :, None, :], groups=problem.channels)
    v = F.conv2d(F.pad(y[:, :, :, e:e + side], [0, 0, before, after]), kernels[1][..., None], groups=problem.channels)
    return h[..., start_at:start_at + side], v[:, :, start_at:start_at + side], identity(problem, y)


def grid_sample(problem: Problem, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample every map at a shifted grid."""
    e, side, size = crop(KERNEL_SIZE, 'full'), problem.side, y.shape[2]
    ticks = torch.arange(side, device=y.device, dtype=y.dtype)

    def sampled(maps: Tensor, row: Tensor, column: Tensor) -> Tensor:
        grid = torch.stack(torch.meshgrid(row, column, indexing='ij')[::-1], dim=-1) * 2 / (size - 1) - 1
        return F.grid_sample(maps, grid.expand(len(maps), -1, -1, -1), mode='nearest', align_corners=True)

    h, v = (y.new_zeros(y.shape[0], problem.channels, side, side) for _ in range(2))
    for r in range(len(problem.wide)):
        for place, s in enumerate(problem.shifts()):
            h = h + sampled(y.index_select(1, problem.wide[r, place]), ticks + e, ticks - s)
            v = v + sampled(y.index_select(1, problem.tall[r, place]), ticks - s, ticks + e)
    return h, v, identity(problem, y)


def deformable(problem: Problem, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move every map by a deformable convolution with a kernel of one and a constant offset."""
    e, side = crop(KERNEL_SIZE, 'full'), problem.side
    weight = y.new_ones(problem.channels, 1, 1, 1)

    def moved(maps: Tensor, rows: int, columns: int) -> Tensor:
        offset = y.new_tensor([rows, columns]).view(1, 2, 1, 1).expand(len(maps), 2, *maps.shape[2:])
        return deform_conv2d(maps, offset.contiguous(), weight)[:, :, :side, :side]

    h, v = (y.new_zeros(y.shape[0], problem.channels, side, side) for _ in range(2))
    for r in range(len(problem.wide)):
        for place, s in enumerate(problem.shifts()):
            h = h + moved(y.index_select(1, problem.wide[r, place]), e, -s)
            v = v + moved(y.index_select(1, problem.tall[r, place]), -s, e)
    return h, v, identity(problem, y)


WAYS = {
    'Taichi': taichi,
    'slice indexing': slices,
    'roll': roll,
    'one-hot convolution': one_hot,
    'grid_sample': grid_sample,
    'deformable convolution': deformable,
}


def check(problem: Problem) -> None:
    """Refuse to time a way that gives other values or gradients than Taichi does.

    Raises:
        AssertionError: If a way is wrong.
    """
    y = problem.y[:1].clone().requires_grad_()
    want, grads, expected = None, None, None
    for way in WAYS.values():
        branches = way(problem, y)
        if want is None:
            want = branches
            grads = [torch.randn_like(branch) for branch in branches]
            expected, = torch.autograd.grad(branches, y, grads)
            continue
        torch.testing.assert_close(branches, want, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(torch.autograd.grad(branches, y, grads)[0], expected, rtol=1e-3, atol=1e-3)


def main() -> None:
    """Check, time, and write the results."""
    options = parser(__doc__.splitlines()[0], 'shift')
    options.add_argument('--shuffles', type=int, default=4, help='R')
    args = options.parse_args()
    device = start(args)
    rows = []
    for stage, (width, side, focus_length) in enumerate(STAGES, 1):
        problem = Problem(width, side, focus_length, args.batch, args.shuffles, device)
        check(problem)
        y = problem.y.requires_grad_()
        grads = [torch.randn_like(branch) for branch in taichi(problem, y)]

        def forward(way, problem=problem, y=y):
            with torch.no_grad():
                way(problem, y)

        def training(way, problem=problem, y=y, grads=grads):
            torch.autograd.grad(way(problem, y), y, grads)

        for phase, function in zip(PHASES, (forward, training), strict=True):
            calls = {name: partial(function, way) for name, way in WAYS.items()}
            timings = measure(calls, device, args.seconds, args.least)
            rows += [{
                'stage': stage, 'channels': problem.channels, 'side': side, 'focus_length': focus_length,
                'phase': phase, 'way': name, **timing.columns(),
                'times_taichi': round(timing.median / timings['Taichi'].median, 3),
            } for name, timing in timings.items()]
            console.print(f'stage {stage}, {phase}: done')
    report(rows, args, device)


def report(rows: list[dict], args, device: torch.device) -> None:
    """Table, CSV and plot."""
    figure, axes = new_figure(len(STAGES), 'Shift-add, R = 4: milliseconds a call (logarithmic)', rows=2)
    for line, phase in enumerate(PHASES):
        lines = []
        for name in WAYS:
            found = [row for row in rows if row['phase'] == phase and row['way'] == name]
            lines.append([name, *(f'{row["median_ms"]:.2f} ({row["times_taichi"]:.1f}x)' for row in found)])
        best = [
            min(row['times_taichi'] for row in rows
                if row['phase'] == phase and row['stage'] == stage and row['way'] != 'Taichi')
            for stage in range(1, len(STAGES) + 1)]
        lines.append([f'best of five / Taichi, target {TARGET:g}', *(
            f'{ratio:.1f} {"pass" if ratio >= TARGET else "short"}' for ratio in best)])
        show(f'{phase}, median ms (times Taichi)', ['way', *(f'stage {n}' for n in range(1, len(STAGES) + 1))], lines)
        for stage, axis in enumerate(axes[line], 1):
            found = [row for row in rows if row['phase'] == phase and row['stage'] == stage]
            axis.bar(range(len(found)), [row['median_ms'] for row in found], color=COLOURS[:len(found)])
            axis.set_yscale('log')
            axis.set_xticks(range(len(found)), [row['way'] for row in found], rotation=60, ha='right')
            axis.set_title(f'stage {stage}, {phase}', fontsize=9)
    write_results(args, device, rows, figure, batch=args.batch, shuffles=args.shuffles, kernel_size=KERNEL_SIZE)


if __name__ == '__main__':
    main()

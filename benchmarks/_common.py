"""What the benchmarks share: checks, timing that is fair on a busy machine, memory, and tables, CSV files and plots."""
import argparse
import csv
import ctypes
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

RESULTS = Path(__file__).parent / 'results'
STAGES = ((96, 56, 51), (192, 28, 49), (384, 14, 47), (768, 7, 13))
"""Width C, side H in pixels (of images of 224) and focus length M of the four stages of sw_tiny."""
TRAINED = (0.1, 0.68, 0.72, 0.9)
"""Share of the groups that each stage of sw_tiny keeps after sparse training, as the paper's authors note it."""
PHASES = ('forward', 'forward + backward')
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#999999', '#F0E442')  # Okabe and Ito

_SHORT = 2.  # seconds
_FORCING = ('TIMM_SHIFTWISE_WAY', 'TIMM_SHIFTWISE_BACKEND')

console = Console(width=None if sys.stdout.isatty() else 160)


@dataclass
class Timing:
    """Seconds of repeated runs.

    Attributes:
        samples: One per run, in the order they ran.
    """
    samples: list[float]

    @property
    def median(self) -> float:
        """Median in milliseconds."""
        return statistics.median(self.samples) * 1e3

    @property
    def best(self) -> float:
        """Shortest in milliseconds."""
        return min(self.samples) * 1e3

    def columns(self) -> dict[str, float]:
        """The columns of the results that every benchmark has."""
        return {'median_ms': round(self.median, 4), 'best_ms': round(self.best, 4), 'runs': len(self.samples)}


def base_parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the options of everything that times."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of a CPU run')
    options.add_argument('--batch', type=int, default=4, help='images a batch')
    options.add_argument('--quick', action='store_true', help='one run of each, to see that it works')
    options.add_argument(
        '--allocator', choices=('keep', 'default'), default='keep',
        help="'keep' has glibc keep the memory that is freed, or fresh pages take much of the time; 'default' does not")
    return options


def parser(description: str | None, name: str, seconds: float = 4.) -> argparse.ArgumentParser:
    """An argument parser with the options that all benchmarks have; ``name`` is that of the files they write."""
    options = base_parser(description)
    options.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='where to run')
    options.add_argument('--seconds', type=float, default=seconds, help='time for each thing that is measured')
    options.add_argument('--output', type=Path, default=RESULTS / name, help='where to write: .csv and .png are added')
    return options


def _keep_freed_memory() -> bool:
    """Have glibc hold what is freed rather than return it to the system; false where there is no glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((-4, 0), (-1, 2**31 - 1), (-2, 2**26))  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    return all(mallopt(name, value) == 1 for name, value in settings)


def start(options: argparse.Namespace) -> torch.device:
    """Set the threads and the allocator and give the device that the options ask for.

    Nothing but :func:`forced` may force a way to compute the operator.
    """
    torch.set_num_threads(options.threads)
    if options.allocator == 'keep' and not _keep_freed_memory():
        options.allocator = 'default'
    for name in _FORCING:
        os.environ.pop(name, None)
    options.least = 1 if options.quick else 3
    if options.quick:
        options.seconds = 0.
    return torch.device(options.device)


def run_once(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call takes, with the work that it starts on a GPU."""
    if device.type == 'cuda':
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin_time = time.perf_counter()
    function()
    return time.perf_counter() - begin_time


def measure(
        functions: dict[str, Callable[[], Any]],
        device: torch.device,
        seconds: float,
        least: int = 3,
        most: int = 100,
) -> dict[str, Timing]:
    """Time functions in turns, so that what else the machine does hits all of them alike.

    Before it is timed, a function of less than two seconds runs once more, so that what ran before it in turn does
    not decide what its caches hold and which threads still wait for work.

    Args:
        functions: What to time, by name.
        device: Where they run.
        seconds: Time for each; one that has used it up drops out after ``least`` runs.
        least: Runs that each gets at least.
        most: Runs that each gets at most.

    Returns:
        The timing of each, by name.
    """
    for function in functions.values():
        function()  # compiles kernels, chooses algorithms, fills caches
    samples: dict[str, list[float]] = {name: [] for name in functions}
    waiting = list(functions)
    while waiting:
        for name in waiting:
            if samples[name] and samples[name][-1] < _SHORT:
                functions[name]()
            samples[name].append(run_once(functions[name], device))
        waiting = [
            name for name in waiting
            if len(samples[name]) < least or (len(samples[name]) < most and sum(samples[name]) < seconds)]
    return {name: Timing(runs) for name, runs in samples.items()}


@contextmanager
def forced(way: str, backend: str = '') -> Iterator[None]:
    """Force one of the equal ways to compute the operator, and a backend; an empty name leaves the choice."""
    before = [os.environ.get(name, '') for name in _FORCING]
    os.environ.update(zip(_FORCING, (way, backend), strict=True))  # empty is as good as unset
    try:
        yield
    finally:
        os.environ.update(zip(_FORCING, before, strict=True))


def under(way: str, function: Callable[[], Any]) -> Any:
    """Call a function with a way forced."""
    with forced(way):
        return function()


def definition() -> Any:
    """Run operators by their definition, in plain PyTorch: what every way is checked against."""
    return forced('shift', 'torch')


def check_close(seen: Sequence[Tensor], wanted: Sequence[Tensor], what: str, tolerance: float = 1e-4) -> None:
    """Refuse to time what computes something else.

    Args:
        seen: Tensors.
        wanted: What they must be.
        what: Name for the message.
        tolerance: Largest difference allowed, as a share of the largest value.

    Raises:
        AssertionError: If a tensor differs.
    """
    for index, (a, b) in enumerate(zip(seen, wanted, strict=True)):
        if a.shape != b.shape:
            raise AssertionError(f'{what}: tensor {index} has shape {tuple(a.shape)}, must have {tuple(b.shape)}.')
        a, b = a.detach().double(), b.detach().double()
        difference, scale = float((a - b).abs().max()), float(b.abs().max())
        if not difference <= tolerance * scale:
            raise AssertionError(f'{what}: tensor {index} is off by {difference:.2g}; its values reach {scale:.2g}.')


@dataclass
class Memory:
    """Memory of a call in bytes.

    Attributes:
        peak: What is allocated beyond what was there before, at the moment when it is most.
        returned: Size of what the call returns, which counts in the peak.
    """
    peak: int
    returned: int

    @property
    def temporaries(self) -> int:
        """The peak without what is returned."""
        return max(self.peak - self.returned, 0)


def memory_of(function: Callable[[], Tensor | Sequence[Tensor]], device: torch.device) -> Memory:
    """Measure the memory of a call that has run before, so that kernels are compiled and caches are filled.

    All that PyTorch's allocator hands out counts, within operators, too, and with it the scratch memory of the Taichi
    kernels, which is made of tensors; what oneDNN and MKL take from the system does not.
    """
    gc.collect(1)  # nothing old should be freed meanwhile; the oldest generation would take a fifth of a second
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results = function()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with (
            mock.patch.dict(os.environ, {'KINETO_LOG_LEVEL': '6'}),  # or it reports every start and stop on screen
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
        ):
            results = function()
        sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
        peak = max(accumulate(sizes, initial=0))
    tensors = [results] if isinstance(results, Tensor) else results
    return Memory(peak, sum(tensor.nbytes for tensor in tensors))


def kept_for_backward(function: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Bytes of the tensors that a call saves for backward, each memory once, without those of ``known`` tensors."""
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        results = function()  # lives until all is counted: no memory is used twice
    for tensor in known:
        held.pop(tensor.untyped_storage().data_ptr(), None)
    del results
    return sum(held.values())


@dataclass
class Target:
    """A ratio and what it must be.

    Attributes:
        what: Which ratio.
        where: Stage, batch and the like.
        value: The ratio as measured.
        bound: ``'at least'`` or ``'at most'``; empty for a ratio that is only told.
        limit: The bound.
    """
    what: str
    where: str
    value: float
    bound: str = ''
    limit: float = float('nan')

    @property
    def verdict(self) -> str:
        """``'pass'``, ``'short'``, or nothing where there is no bound."""
        if not self.bound:
            return ''
        holds = self.value >= self.limit if self.bound == 'at least' else self.value <= self.limit
        return 'pass' if holds else 'short'


def write_results(
        args: argparse.Namespace,
        device: torch.device,
        rows: Sequence[dict[str, Any]],
        figure: Any,
        targets: Sequence[Target] = (),
        **settings: Any,
) -> None:
    """Write rows, targets and plot to the files that the options ask for, and print the targets.

    Args:
        args: The options; what all benchmarks have in common is written into every row.
        device: Where it ran.
        rows: The results.
        figure: The plot.
        targets: Ratios; equal ones (``what``) are brought together.
        **settings: What is written into every row beside the options.
    """
    settings = {'dtype': 'float32', **settings, 'seconds': args.seconds, 'allocator': args.allocator}
    written = [write_csv(args.output, rows, device, settings), _save(figure, args.output)]
    if targets:
        order = list(dict.fromkeys(target.what for target in targets))
        targets = sorted(targets, key=lambda target: order.index(target.what))
        _show_targets(targets)
        lines = [{
            'what': target.what, 'where': target.where, 'value': round(target.value, 4), 'bound': target.bound,
            'limit': target.limit if target.bound else '', 'verdict': target.verdict,
        } for target in targets]
        written.append(write_csv(args.output.with_name(f'{args.output.name}_targets'), lines, device, settings))
    console.print('wrote ' + ', '.join(map(str, written)))


def _show_targets(targets: Sequence[Target]) -> None:
    show('ratios', ['what', 'where', 'measured', 'target', ''], [[
        target.what, target.where, f'{target.value:.2f}', f'{target.bound} {target.limit:g}' if target.bound else '',
        target.verdict,
    ] for target in targets])


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return 'none'


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(':', 1) for line in lines if ':' in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    family = f' (family {fields["cpu family"]}, model {fields["model"]})' if 'cpu family' in fields else ''
    return fields.get('model name', platform.machine()) + family


def machine(device: torch.device) -> dict[str, str]:
    """What a result depends on beside the code: hardware and versions."""
    return {
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else _processor(),
        'threads': str(torch.get_num_threads()),
        'cores': str(os.cpu_count()),
        'load': f'{os.getloadavg()[0]:.1f}' if hasattr(os, 'getloadavg') else '',
        'system': platform.system(),
        'python': platform.python_version(),
        **{package: _installed(package) for package in ('torch', 'torchvision', 'timm', 'taichi')},
    }


def write_csv(path: Path, rows: Sequence[dict[str, Any]], device: torch.device, settings: dict[str, Any]) -> Path:
    """Write rows, each with the machine and the settings; gives the file's path."""
    path = path.with_name(path.name + '.csv')
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = {**{key: str(value) for key, value in settings.items()}, **machine(device)}
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, [*rows[0], *shared])
        writer.writeheader()
        writer.writerows({**row, **shared} for row in rows)
    return path


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column holds names, the others numbers; an empty row is a line across."""
    table = Table(title=title, title_justify='left')
    for index, column in enumerate(columns):
        table.add_column(column, justify='left' if index == 0 else 'right')
    for row in rows:
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    console.print(table)


def new_figure(columns: int, title: str, rows: int = 1) -> tuple[Any, Any]:
    """A figure with axes [rows, columns] in the style of all plots here."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'axes.grid.axis': 'y',
        'grid.alpha': 0.3, 'axes.axisbelow': True, 'figure.dpi': 130,
    })
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 3.2 * rows), layout='constrained', squeeze=False)
    figure.suptitle(title, fontsize=11)
    return figure, axes


def logarithmic(axis: Any) -> None:
    """Make an axis of a plot (``axes.xaxis`` or ``axes.yaxis``) logarithmic, with plain numbers at 1, 2 and 5.

    Call it when all is drawn: a range of more than a few powers of ten gets numbers at those alone.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    (axis.axes.set_xscale if axis.axis_name == 'x' else axis.axes.set_yscale)('log')
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
    axis.set_major_formatter('{x:g}')
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _save(figure: Any, path: Path) -> Path:
    """Write a figure; gives the file's path."""
    path = path.with_name(path.name + '.png')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path

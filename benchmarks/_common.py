"""What the benchmarks share: timing that is fair on a busy machine, and results as a table, a CSV file and a plot."""
import argparse
import csv
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / 'results'
STAGES = ((96, 56, 51), (192, 28, 49), (384, 14, 47), (768, 7, 13))
"""Width C, side H in pixels (of images of 224) and focus length M of the four stages of sw_tiny."""
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#999999', '#F0E442')  # Okabe and Ito

console = Console()


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


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """An argument parser with the options that all benchmarks have; ``name`` is that of the files they write."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='where to run')
    options.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of a CPU run')
    options.add_argument('--batch', type=int, default=4, help='images a batch')
    options.add_argument('--seconds', type=float, default=4.0, help='time for each thing that is measured')
    options.add_argument('--output', type=Path, default=RESULTS / name, help='where to write: .csv and .png are added')
    return options


def start(options: argparse.Namespace) -> torch.device:
    """Set the threads and give the device that the options ask for."""
    torch.set_num_threads(options.threads)
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
            samples[name].append(run_once(functions[name], device))
        waiting = [
            name for name in waiting
            if len(samples[name]) < least or (len(samples[name]) < most and sum(samples[name]) < seconds)]
    return {name: Timing(runs) for name, runs in samples.items()}


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


def write_csv(path: Path, rows: Sequence[dict[str, Any]], device: torch.device, **settings: Any) -> Path:
    """Write results, each row with the machine and the settings; gives the file's path."""
    path = path.with_name(path.name + '.csv')
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = {**{key: str(value) for key, value in settings.items()}, **machine(device)}
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, [*rows[0], *shared])
        writer.writeheader()
        writer.writerows({**row, **shared} for row in rows)
    return path


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column holds names, the others numbers."""
    table = Table(title=title, title_justify='left')
    for index, column in enumerate(columns):
        table.add_column(column, justify='left' if index == 0 else 'right')
    for row in rows:
        table.add_row(*row)
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


def save(figure: Any, path: Path) -> Path:
    """Write a figure; gives the file's path."""
    path = path.with_name(path.name + '.png')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path

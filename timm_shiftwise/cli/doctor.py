"""`timm-shiftwise doctor`: versions, devices, and what would run here and why; to be pasted into a report."""
import argparse

from rich.console import Console


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Declare the arguments."""
    subparsers.add_parser(
        'doctor',
        help='say what is installed, and what would run here and why',
        description='Print versions, processors, devices, caches and settings, whether timm knows the models without '
                    'an import, and how the operators of sw_tiny would run on each device and why.',
    )


def run(args: argparse.Namespace) -> int:
    """Print a line for each fact."""
    from ..environment.facts import facts

    console = Console(soft_wrap=True, highlight=False)
    for name, value in facts():
        console.print(f'{name:<24}{value}', markup=False)
    return 0

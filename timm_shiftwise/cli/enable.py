"""`timm-shiftwise enable`: let timm know the models in this environment, without an import in every program."""
import argparse

from rich.console import Console

from . import CommandError


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Declare the arguments."""
    subparsers.add_parser(
        'enable',
        help='let timm know the models in this environment, without an import',
        description='Let timm know the models of this package wherever it is imported in this Python environment: '
                    "timm.create_model('sw_tiny') and timm's own scripts then need no import and no flag. Two small "
                    'files are put into site-packages; `timm-shiftwise disable`, or uninstalling the package, removes '
                    'them.',
    )


def run(args: argparse.Namespace) -> int:
    """Enable, and say where."""
    from ..environment import SiteError, enable

    try:
        folder = enable()
    except SiteError as error:
        raise CommandError(str(error)) from error
    console = Console(soft_wrap=True, highlight=False)
    console.print(f'Programs of this environment that import timm know the models now ({folder}).', markup=False)
    console.print('`timm-shiftwise disable` undoes this.')
    return 0

"""`timm-shiftwise disable`: undo `timm-shiftwise enable`."""
import argparse

from rich.console import Console

from . import CommandError


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Declare the arguments."""
    subparsers.add_parser(
        'disable',
        help='undo `enable`',
        description='Undo `timm-shiftwise enable`: timm knows the models again only where timm_shiftwise is imported.',
    )


def run(args: argparse.Namespace) -> int:
    """Disable, and say whether there was something to undo."""
    from ..environment import SiteError, disable

    try:
        was = disable()
    except SiteError as error:
        raise CommandError(str(error)) from error
    said = 'timm knows the models only where timm_shiftwise is imported.' if was else 'It was not enabled.'
    Console(soft_wrap=True, highlight=False).print(said)
    return 0

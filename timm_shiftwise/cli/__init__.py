"""The command `timm-shiftwise`.

A sub-command is a module of this package, named after it and listed in `COMMANDS`, with two functions:
`add_parser(subparsers)` declares its arguments, `run(args) -> int` does the work and returns the exit status. Every
module is imported to build the help text, so what is heavy is imported inside `run`.
"""
import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

# The sub-commands in the order in which the help text lists them: a new one is its module and a line here.
COMMANDS = (
    'quickstart', 'run', 'recipe', 'convert', 'publish', 'export', 'profile', 'check', 'sparsity', 'watch', 'erf',
    'enable', 'disable', 'doctor',
)


class CommandError(Exception):
    """A sub-command cannot go on. `main` shows the message without a traceback and exits with status 2."""


def build_parser() -> argparse.ArgumentParser:
    """Parser of the whole command; the chosen sub-command's `run` is left in `args.run`."""
    from .. import __version__

    parser = argparse.ArgumentParser(prog='timm-shiftwise', description='Shift-wise ConvNets for timm.')
    parser.add_argument('--version', action='version', version=__version__)
    subparsers = parser.add_subparsers(metavar='COMMAND', dest='command', required=True)
    for name in COMMANDS:
        module = importlib.import_module(f'.{name}', __name__)
        module.add_parser(subparsers)
        subparsers.choices[name].set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name, `sys.argv[1:]` if None.

    Returns:
        The exit status of the sub-command.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ['-u']:  # called in the interpreter's place
            from .run import stand_in
            return stand_in(argv[1:])

        # What follows the script's name belongs to the script. argparse never sees it: its REMAINDER would drop a '--'
        # or answer a '--help' itself, depending on the Python version.
        parsed, script_args = (argv[:2], argv[2:]) if argv[:1] == ['run'] else (argv, [])
        if argv[:1] != ['run'] and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors='backslashreplace')  # a character that it lacks must not end the work
        args = build_parser().parse_args(parsed)
        args.script_args = script_args
        return args.run(args)
    except CommandError as error:
        Console(stderr=True, soft_wrap=True).print(
            f'[bold red]timm-shiftwise {argv[0]}:[/] {escape(str(error))}', highlight=False, emoji=False)
        return 2

"""What the sub-commands that look at a network share: its arguments, its weights, and how results are printed."""
import argparse
import ast
import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from . import CommandError

if TYPE_CHECKING:
    from ..models import ShiftwiseNet
    from ..profile.kept import Counted

FORMATS = ('table', 'json', 'csv')
_ELSEWHERE = ('hf-hub:', 'hf_hub:', 'local-dir:')
# what goes wrong in building a network from arguments, a folder or the Hub
NOT_BUILT = (OSError, RuntimeError, TypeError, ValueError, AssertionError, KeyError)


def add_model_kwargs(parser: argparse.ArgumentParser) -> None:
    """Declare `--model-kwargs`."""
    parser.add_argument(
        '--model-kwargs', metavar='NAME=VALUE', nargs='+', default=[], type=model_argument,
        help='arguments of the network, such as kernel_size=3 or focus_lengths=51,49,45,13')


def add_format(parser: argparse.ArgumentParser) -> None:
    """Declare `--format`."""
    parser.add_argument(
        '--format', choices=FORMATS, default='table',
        help='a table for people, or json or csv alone on standard output')


def model_argument(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE, the value as Python writes it or else as text."""
    name, sign, value = text.partition('=')
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f'expected NAME=VALUE, got {text!r}')
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def is_elsewhere(model: str) -> bool:
    """Whether a model's name is that of a repository on the Hub or of a folder."""
    return model.startswith(_ELSEWHERE)


def build_network(model: str, **kwargs: Any) -> 'ShiftwiseNet':
    """Build a network of this package by its name, or from a folder or a repository on the Hub.

    Args:
        model: The name as `timm.create_model` takes it.
        kwargs: Further arguments of `timm.create_model`.

    Raises:
        CommandError: the network is not known, or cannot be built; the message says why.
    """
    import timm

    from ..models import ShiftwiseNet
    from ..models.variants import SHIFTWISE, SHIFTWISE_V2

    ours = ', '.join((*SHIFTWISE, *SHIFTWISE_V2))
    if not is_elsewhere(model) and not timm.is_model(model):
        raise CommandError(f'there is no model {model!r}. Those of this package are {ours}')
    if not is_elsewhere(model) and model.split('.')[0] not in (*SHIFTWISE, *SHIFTWISE_V2):
        raise CommandError(f'{model!r} is no network of this package. These are {ours}')
    try:
        network = timm.create_model(model, **kwargs)
    except NOT_BUILT as error:
        raise CommandError(f'{model} cannot be built: {error}') from error
    if not isinstance(network, ShiftwiseNet):
        raise CommandError(f'{model} is no network of this package but a {type(network).__name__}')
    return network


def load_network(checkpoint: str, model: str | None, model_kwargs: Mapping[str, Any]) -> 'tuple[ShiftwiseNet, str]':
    """Build the network that a checkpoint is for, with its weights.

    Args:
        checkpoint: A checkpoint file, an output folder of train.py, or a Hub folder.
        model: Name of the network; None to tell it from the checkpoint.
        model_kwargs: Arguments of the network that the checkpoint does not tell.

    Returns:
        The network and its name.

    Raises:
        CommandError: the checkpoint cannot be read, or does not fit; the message says why.
    """
    from ..hub.convert import tell_network
    from ..hub.errors import HubError
    from ..hub.source import read_source
    from ..models import CheckpointError

    try:
        source = read_source(checkpoint)
        if model is not None and is_elsewhere(model):
            network, name = build_network(model, **model_kwargs), model
        else:
            told = tell_network(source, model, model_kwargs)
            network, name = build_network(told.name, **told.args), told.name
        network.load_state_dict(source.state)
    except (HubError, CheckpointError) as error:
        raise CommandError(str(error)) from error
    return network, name


def share_bar(share: float) -> ProgressBar:
    """A bar for a cell of a table, in characters that the terminal has."""
    return ProgressBar(total=1, completed=share, width=24, complete_style='cyan', finished_style='cyan')


def path_shares(counted: 'Counted') -> str:
    """The share of small kernels that each path keeps, for people."""
    return ' / '.join(f'{100 * share:.1f}' for share in counted.path_densities) + ' %'


def in_one_cell(values: Iterable[float]) -> str:
    """Several numbers for one cell of CSV."""
    return ' '.join(map(str, values))


def print_sections(*sections: Sequence[Table | str]) -> None:
    """Print sections of tables and lines of text, parted by empty lines, in full however narrow the terminal is."""
    roomy = Console(width=1000)
    tables = [part for section in sections for part in section if isinstance(part, Table)]
    needed = max((roomy.measure(table).maximum for table in tables), default=0)
    console = Console(highlight=False)
    console = Console(highlight=False, width=max(console.width, needed))
    for index, section in enumerate(sections):
        if index > 0:
            console.print()
        for part in section:
            console.print(part, soft_wrap=isinstance(part, str))


def print_json(value: Any) -> None:
    """Print JSON alone."""
    sys.stdout.write(json.dumps(value, indent=2) + '\n')


def print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as CSV alone, with the first row's columns."""
    writer = csv.DictWriter(sys.stdout, list(rows[0]), restval='', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)

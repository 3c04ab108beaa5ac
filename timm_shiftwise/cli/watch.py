"""`timm-shiftwise watch RUN`: what sparsity does in a run of train.py, as a page."""
import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..profile.kept import percent
from . import CommandError
from .network import print_sections
from .output import check_picture, writing

if TYPE_CHECKING:
    from ..history.run import Run

_PAGE = 'watch.html'
_SECONDS = 10


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Declare the arguments."""
    parser = subparsers.add_parser(
        'watch',
        help='write a page of what sparsity does in a run of train.py',
        usage='%(prog)s RUN [--follow [SECONDS]] [--output FILE.html] [OPTIONS]',
        description='Write one HTML file that loads nothing else: accuracy and loss, which groups each stage keeps '
                    'and exchanges from epoch to epoch, and the kernels that come of it. train.py removes all but its '
                    'best checkpoints; the masks of those that were seen are kept beside the page, in a file of its '
                    'name that ends in .safetensors.',
    )
    parser.add_argument(
        'run_folder', metavar='RUN',
        help='the output folder of a run of train.py, or the folder that holds such: then the run begun last is taken')
    parser.add_argument('--output', metavar='FILE.html', help=f'the page to write ({_PAGE} in the folder of the run)')
    parser.add_argument(
        '--follow', metavar='SECONDS', nargs='?', const=_SECONDS, type=_positive,
        help='look every so many seconds (%(const)s), wait for the first checkpoint, and write the page anew, which '
             'browsers then load by themselves, whenever the run comes on; until Ctrl-C')
    parser.add_argument(
        '--stage', metavar='N', nargs='+', type=int, help='stages whose groups and kernels are drawn, from 1 (all)')
    parser.add_argument(
        '--channels', metavar='N', type=int, default=4,
        help='channels of each stage whose kernels are drawn (%(default)s)')
    parser.add_argument(
        '--since', metavar='EPOCH', type=int,
        help='the epoch since which maps say what became of each group (the middle one of those known)')


def run(args: argparse.Namespace) -> int:
    """Write the page, once or until interrupted."""
    from ..history.run import NoRunError, find_run

    check_picture(_PAGE if args.output is None else args.output, '.html')
    given = Path(args.run_folder)
    try:
        folder = find_run(given)
        page = folder / _PAGE if args.output is None else Path(args.output)
        if folder != given:
            _say(f'The run begun last in {given} is {folder.name}.')
        if args.follow is None:
            _report(_write(args, folder, page), page)
        else:
            _follow(args, folder, page)
    except NoRunError as error:
        raise CommandError(str(error)) from error
    return 0


def _follow(args: argparse.Namespace, folder: Path, page: Path) -> None:
    """Write the page whenever the run comes on, until interrupted."""
    from ..history.run import NoRunError, stamps_of

    seen, found = None, None
    try:
        while True:
            stamps = stamps_of(folder)
            if stamps != seen:
                seen = stamps
                try:
                    found = _write(args, folder, page)
                    _report(found, page)
                except NoRunError as error:
                    _say(f'Waiting: {error}')
            time.sleep(args.follow)
    except KeyboardInterrupt:
        if found is not None:
            _render(args, found, page, refresh=None)  # or it would load itself for ever


def _write(args: argparse.Namespace, folder: Path, page: Path) -> 'Run':
    from ..history.record import RecordError
    from ..history.run import read_history
    from ..hub.errors import HubError
    from ..models import CheckpointError

    try:
        found = read_history(folder, page.with_suffix('.safetensors'))
    except (HubError, CheckpointError, RecordError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f'what was seen of {folder} cannot be kept beside {page}: {error}') from error
    _render(args, found, page, args.follow)
    return found


def _render(args: argparse.Namespace, found: 'Run', page: Path, refresh: float | None) -> None:
    from ..history.page import render_page
    from ..ops.files import replacing

    try:
        text = render_page(found, args.stage, args.channels, args.since, refresh)
    except ValueError as error:
        raise CommandError(str(error)) from error
    with writing(page), replacing(page) as partial:
        partial.write_text(text, encoding='utf-8')


def _report(found: 'Run', page: Path) -> None:
    from ..history.changes import stage_histories

    name, folder, latest = escape(found.model), escape(str(found.folder)), found.epochs[-1].number
    lines: list[Table | str] = [f'[bold]{name}[/] in {folder}, epoch {latest}: {escape(str(page))}']
    lines += [f'Passed over: {escape(reason)}' for reason in found.passed_over]
    if found.groups is None:
        print_sections([*lines, 'Large kernels: there are no groups to keep or to prune.'])
        return
    table = Table('stage', box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for column in ('kept', 'exchanged since the epoch known before'):
        table.add_column(column, justify='right')
    for index, stage in enumerate(stage_histories(found.epochs, found.groups), 1):
        exchanged = f'{percent(stage.exchanged[-1][2])} (epoch {stage.exchanged[-1][0]})' if stage.exchanged else '-'
        table.add_row(str(index), percent(stage.kept[latest]), exchanged)
    print_sections([*lines, table])


def _say(text: str) -> None:
    Console(soft_wrap=True, highlight=False, markup=False).print(text)


def _positive(text: str) -> float:
    """Read a finite number of seconds above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'expected seconds above 0, got {text!r}')
    return value

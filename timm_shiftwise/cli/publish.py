"""`timm-shiftwise publish DIR --repo USER/NAME`: a Hub folder becomes a repository on the Hub."""
import argparse

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import CommandError


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Declare the arguments."""
    parser = subparsers.add_parser(
        'publish',
        help='send a folder that `convert` wrote to the Hub',
        description='Send a folder that `timm-shiftwise convert` wrote to the Hugging Face Hub, in one commit, after '
                    'checking that it loads.',
    )
    parser.add_argument('folder', metavar='DIR', help='the folder')
    parser.add_argument('--repo', metavar='USER/NAME', required=True, help='the repository, made if there is none')
    parser.add_argument('--private', action='store_true', help='make it private, and send nothing to a public one')
    parser.add_argument('--revision', metavar='BRANCH', help='the branch; it is made if there is none')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    parser.add_argument('--dry-run', action='store_true', help='show what would be sent, and send nothing')


def run(args: argparse.Namespace) -> int:
    """Check the folder, show what is sent, and send it."""
    from ..hub.errors import HubError
    from ..hub.publish import plan, publish

    console = Console(soft_wrap=True)
    try:
        planned = plan(
            args.folder, args.repo, revision=args.revision, private=args.private, create_pr=args.create_pr)
        what = 'a pull request to' if planned.create_pr else f'branch {planned.revision} of'
        table = Table('File', 'Bytes', box=None)
        table.columns[1].justify = 'right'
        for name, size in planned.files.items():
            table.add_row(escape(name), f'{size:,}')
        console.print(
            f'{planned.architecture}, to {what} {planned.repo_id} on {planned.endpoint}'
            f'{" (private)" if planned.private else ""}', markup=False, highlight=False)
        console.print(table)
        for name, reason in planned.left_out.items():
            console.print(f'Not sent: {name}, {reason}', markup=False, highlight=False)
        if args.dry_run:
            console.print('\nThe model card as it would be sent:\n', markup=False)
            console.print(planned.card, markup=False, highlight=False)
            console.print('Nothing was sent.', markup=False)
            return 0
        address = publish(planned)
    except HubError as error:
        raise CommandError(str(error)) from error
    console.print(f'\nPublished: {address}', markup=False)
    if not planned.create_pr:
        revision = f'@{planned.revision}' if args.revision else ''
        reference = f'hf-hub:{planned.repo_id}{revision}'
        console.print(f'To use it: timm.create_model({reference!r}, pretrained=True)', markup=False)
    return 0

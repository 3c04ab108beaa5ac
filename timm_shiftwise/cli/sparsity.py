"""`timm-shiftwise sparsity CHECKPOINT`: which groups a checkpoint keeps, layer by layer, printed and drawn."""
import argparse
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..profile.kept import percent
from . import CommandError
from .network import (
    add_format,
    add_model_kwargs,
    in_one_cell,
    load_network,
    path_shares,
    print_csv,
    print_json,
    print_sections,
    share_bar,
)
from .output import check_picture, writing

if TYPE_CHECKING:
    from ..profile import LayerGroups, NetworkGroups
    from ..profile.kept import Counted

_LEGEND = (
    'Groups: small kernels of all channels. Kept: by any path, which is what costs. '
    'Without: channels that lost all of theirs.')


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Declare the arguments."""
    parser = subparsers.add_parser(
        'sparsity',
        help='show which groups a checkpoint keeps, layer by layer',
        usage='%(prog)s CHECKPOINT [--output FILE.png] [OPTIONS]',
        description='Show how many groups (small kernels of a channel) each layer and stage of a checkpoint keeps, and '
                    'draw which. The network is told from the checkpoint.',
    )
    parser.add_argument(
        'checkpoint', metavar='CHECKPOINT',
        help="a checkpoint file, ours or the papers' authors', an output folder of train.py, or a Hub folder")
    parser.add_argument('--model', metavar='NAME', help='the network, where the checkpoint does not tell it')
    add_model_kwargs(parser)
    parser.add_argument(
        '--output', metavar='FILE.png', help='draw a bar, and a map of channels and groups, for each layer')
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Print the kept groups, and draw them if asked for."""
    from ..profile import network_groups

    if args.output is not None:
        check_picture(args.output)
    network, name = load_network(args.checkpoint, args.model, dict(args.model_kwargs))
    try:
        groups = network_groups(network)
    except ValueError as error:
        raise CommandError(f'{args.checkpoint} ({name}): {error}') from error
    if args.format == 'json':
        print_json(_plain(name, groups))
    elif args.format == 'csv':
        print_csv(_rows(groups))
    else:
        print_sections([_summary(args.checkpoint, name, groups)], [_table(groups), _LEGEND])
    if args.output is not None:
        from ..profile.picture import draw_groups
        with writing(args.output):
            draw_groups(groups, name, args.output)
        # standard output may be for a program
        Console(stderr=True, soft_wrap=True, highlight=False).print(f'Drawn into {escape(args.output)}')
    return 0


def _summary(checkpoint: str, name: str, groups: 'NetworkGroups') -> str:
    if groups.is_dense:
        kept = 'dense: every group is kept'
        if groups.updates == 'waiting':
            kept += '. Its masks are drawn at the first step of training with sparsity'
    else:
        kept = f'{percent(groups.density)} of the groups kept ({groups.kept:,} of {groups.total:,})'
        if groups.has_paths_apart:
            kept += f', by the paths {path_shares(groups)}'
    schedule = {
        'running': f'; trained sparse for {groups.step:,} optimiser steps',
        'fixed': '; training on leaves them so',
    }.get(groups.updates, '')
    return f'[bold]{escape(checkpoint)}[/] ({name}): {kept}{schedule}.'


def _table(groups: 'NetworkGroups') -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column('layer')
    apart = groups.has_paths_apart
    for column in ('channels', 'groups', 'kept', 'share', *(['by the paths'] if apart else [])):
        table.add_column(column, justify='right', no_wrap=True)
    table.add_column()
    table.add_column('without', justify='right')
    for index, stage in enumerate(groups.stages):
        ghosts = f' of {stage.dim}' if stage.dim > stage.channels else ''
        table.add_row(
            f'stage {index + 1}, M = {stage.focus_length}', f'{stage.channels}{ghosts}', f'{stage.total:,}',
            f'{stage.kept:,}', *_shares(stage, apart), share_bar(stage.density),
            str(sum(layer.empty_channels for layer in stage.layers)), style='bold')
        for layer in stage.layers:
            table.add_row(
                f'  {layer.name}', '', f'{layer.total:,}', f'{layer.kept:,}', *_shares(layer, apart),
                share_bar(layer.density), str(layer.empty_channels), end_section=layer is stage.layers[-1])
    empty = sum(layer.empty_channels for stage in groups.stages for layer in stage.layers)
    table.add_row(
        'all', '', f'{groups.total:,}', f'{groups.kept:,}', *_shares(groups, apart), share_bar(groups.density),
        str(empty), style='bold')
    return table


def _shares(counted: 'Counted', apart: bool) -> list[str]:
    return [percent(counted.density), *([path_shares(counted)] if apart else [])]


def _plain(name: str, groups: 'NetworkGroups') -> dict[str, Any]:
    return {
        'model': name,
        'dense': groups.is_dense,
        'schedule': groups.updates,
        'step': groups.step,
        'kept': groups.kept,
        'total': groups.total,
        'density': groups.density,
        'path_densities': groups.path_densities,
        'stages': [
            {
                'stage': index + 1,
                'dim': stage.dim,
                'channels': stage.channels,
                'focus_length': stage.focus_length,
                'groups': stage.maps,
                'kept': stage.kept,
                'total': stage.total,
                'density': stage.density,
                'path_densities': stage.path_densities,
                'layers': [_plain_layer(layer) for layer in stage.layers],
            }
            for index, stage in enumerate(groups.stages)
        ],
    }


def _plain_layer(layer: 'LayerGroups') -> dict[str, Any]:
    return {
        'layer': layer.name,
        'kept': layer.kept,
        'total': layer.total,
        'density': layer.density,
        'path_densities': layer.path_densities,
        'empty_channels': layer.empty_channels,
    }


def _rows(groups: 'NetworkGroups') -> list[dict[str, Any]]:
    return [
        {
            'stage': index + 1, 'channels': stage.channels, 'focus_length': stage.focus_length, 'groups': stage.maps,
            **_plain_layer(layer), 'path_densities': in_one_cell(layer.path_densities),
        }
        for index, stage in enumerate(groups.stages) for layer in stage.layers
    ]

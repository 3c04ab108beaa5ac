"""`timm-shiftwise erf MODEL ...`: how far networks see, measured, printed and drawn."""
import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from . import CommandError
from .network import NOT_BUILT, add_format, add_model_kwargs, print_csv, print_json, print_sections
from .output import check_picture, writing

if TYPE_CHECKING:
    from ..receptive_field import ReceptiveField


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Declare the arguments."""
    parser = subparsers.add_parser(
        'erf',
        help='measure and draw the effective receptive field of any of timm\'s models',
        usage='%(prog)s MODEL [MODEL ...] [--output FILE.png] [--images DIR] [OPTIONS]',
        description='Measure the effective receptive field as RepLKNet does (arXiv 2203.06717): the gradient of the '
                    'middle of a feature map by the image. Any model of timm can be looked at, to compare.',
    )
    parser.add_argument(
        'models', metavar='MODEL', nargs='+', help='name of a model of timm, hf-hub:USER/NAME, or local-dir:FOLDER')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        '--checkpoint', metavar='FILE', nargs='+', help='weights of each MODEL in turn, - for random ones')
    weights.add_argument('--pretrained', action='store_true', help='take the published weights of every MODEL')
    add_model_kwargs(parser)
    parser.add_argument(
        '--layer-scale', metavar='VALUE', type=float,
        help='set the layer scale of random weights, which begins so small that blocks hardly act')
    parser.add_argument('--images', metavar='DIR', help='a folder of images to look at; without it, Gaussian noise')
    parser.add_argument(
        '--size', metavar='PIXELS', nargs='+', type=int,
        help='side of the image, or height and width; without it, what each model was made for')
    parser.add_argument(
        '--stage', metavar='N', type=int, help='which feature map, from 1 as the model hands them out (the last)')
    parser.add_argument('--samples', metavar='N', type=int, default=50, help='images to take (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='seed of random weights and of noise (%(default)s)')
    parser.add_argument('--device', default='cpu', help='where to run (%(default)s)')
    parser.add_argument('--output', metavar='FILE.png', help='draw a panel for each model')
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Measure each model, print, and draw if asked for."""
    if args.output is not None:
        check_picture(args.output)
    checkpoints = args.checkpoint or ['-'] * len(args.models)
    if len(checkpoints) != len(args.models):
        raise CommandError(
            f'--checkpoint takes a file for each of {len(args.models)} models (- for random weights), '
            f'got {len(checkpoints)}')
    for file in checkpoints:
        if file != '-' and not Path(file).is_file():
            raise CommandError(f'--checkpoint takes files, got {file!r}')
    if args.images is not None and not Path(args.images).is_dir():
        raise CommandError(f'--images takes a folder, got {args.images!r}')
    if args.size is not None and len(args.size) > 2:
        raise CommandError(f'--size takes one or two numbers, got {len(args.size)}')
    fields = [_measure(args, model, checkpoint) for model, checkpoint in zip(args.models, checkpoints, strict=True)]
    if args.output is not None:
        from ..ops.files import replacing
        from ..receptive_field.picture import draw_receptive_fields

        with writing(args.output), replacing(args.output) as partial:
            partial.write_bytes(draw_receptive_fields(fields))
    if args.format == 'json':
        print_json([field.to_dict() for field in fields])
    elif args.format == 'csv':
        print_csv([_row(field) for field in fields])
    else:
        print_sections([_table(fields), *_notes(fields)])
    if args.output is not None:
        # standard output may be for a program
        Console(stderr=True, soft_wrap=True, highlight=False).print(f'Drawn into {escape(args.output)}')
    return 0


def _measure(args: argparse.Namespace, name: str, checkpoint: str) -> 'ReceptiveField':
    import timm
    import torch

    from ..hub.images import Images
    from ..receptive_field import erf, layer_scales, size_arguments

    size = None if args.size is None else (args.size[0], args.size[-1])
    kwargs = {**dict(args.model_kwargs), **size_arguments(name, size)}
    weights = 'published' if args.pretrained or ':' in name else 'random'
    if checkpoint != '-':
        kwargs['checkpoint_path'], weights = checkpoint, Path(checkpoint).name
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            network = timm.create_model(name, pretrained=weights == 'published', **kwargs)
        if args.layer_scale is not None and weights == 'random':
            with torch.no_grad():
                for scale in layer_scales(network):
                    scale.fill_(args.layer_scale)
            weights = f'random, layer scale {args.layer_scale:g}'
        images = None if args.images is None else Images(args.images, network, args.samples, size, squash=True)
        count = args.samples if images is None else len(images)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(escape(name), total=count)
            return erf(
                network, images, size=size, stage=args.stage, samples=args.samples, device=args.device, seed=args.seed,
                name=name, weights=weights, seen=None if args.images is None else f'images of {args.images}',
                progress=lambda: progress.advance(task))
    except NOT_BUILT as error:
        raise CommandError(f'{name}: {error}') from error


def _table(fields: 'list[ReceptiveField]') -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column('model')
    shares = [square.share for square in fields[0].squares()]
    for column in ('image', 'map', *(f'{100 * share:g} %' for share in shares), 'reach'):
        table.add_column(column, justify='right', no_wrap=True)
    table.add_column('weights')
    for field in fields:
        values = field.to_dict()
        reach = values['reach']
        table.add_row(
            escape(field.model), _sides(values['input_size']), _sides(values['map_size']),
            *(f'{square["side"]} ({100 * square["area"]:.1f} %)' for square in values['squares']),
            '' if reach is None else 'all' if field.sees_all else _sides((reach['height'], reach['width'])),
            escape(field.weights))
    return table


def _sides(size: Any) -> str:
    return f'{size[0]} x {size[1]}'


def _notes(fields: 'list[ReceptiveField]') -> list[str]:
    seen = ', '.join(sorted({f'{field.images} x {field.seen}' for field in fields}))
    notes = [
        'Side in pixels (share of the image) of the smallest square around the middle that holds so much of the '
        f'scores; {escape(seen)}. Reach: what the kept groups let through at all.']
    if any(field.weights.startswith('random') for field in fields):
        notes.append('[yellow]Random weights:[/] untrained networks rank differently from trained ones.')
    return notes


def _row(field: 'ReceptiveField') -> dict[str, Any]:
    values = field.to_dict()
    reach = values['reach'] or {'height': '', 'width': ''}
    return {
        **{name: values[name] for name in ('model', 'stage', 'images', 'seen', 'weights', 'sees_all')},
        'height': values['input_size'][0], 'width': values['input_size'][1],
        **{f'side_{square["share"]:g}': square['side'] for square in values['squares']},
        **{f'area_{square["share"]:g}': square['area'] for square in values['squares']},
        'reach_height': reach['height'], 'reach_width': reach['width'], **values['versions'],
    }

"""`timm-shiftwise export MODEL|CHECKPOINT --to FORMAT --output FILE`: a network that runs without this package."""
import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import CommandError
from .network import add_model_kwargs, build_network, is_elsewhere, load_network, print_sections

if TYPE_CHECKING:
    from torch import Tensor

    from ..hub.export import Export
    from ..models import ShiftwiseNet

_MOST_IMAGES = 64


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Declare the arguments."""
    parser = subparsers.add_parser(
        'export',
        help='merge a network and write it for ONNX Runtime, TorchScript or torch.export',
        usage='%(prog)s NETWORK --to FORMAT --output FILE [--images DIR | --int8 DIR] [OPTIONS]',
        description='Merge a network for inference, export it, run the file, compare it with PyTorch and time both. '
                    'Labels and preprocessing are written beside it. A file that disagrees is not kept.',
    )
    parser.add_argument(
        'network', metavar='NETWORK',
        help="a checkpoint, an output folder of train.py, a Hub folder, or a model's name, hf-hub:USER/NAME, "
             'local-dir:FOLDER')
    parser.add_argument('--to', choices=('onnx', 'torchscript', 'pt2'), required=True, help='what to write')
    parser.add_argument('--output', metavar='FILE', required=True, help='the file to write')
    parser.add_argument('--overwrite', action='store_true', help='replace the file if there is one')
    parser.add_argument('--pretrained', action='store_true', help='take the published weights of a model that is named')
    parser.add_argument('--model', metavar='NAME', help='the network, where a checkpoint does not tell it')
    add_model_kwargs(parser)
    parser.add_argument(
        '--size', metavar='PIXELS', nargs='+', type=int, help='side of the images, or height and width')
    parser.add_argument('--dynamic', action='store_true', help='leave the height and the width of images open')
    parser.add_argument('--half', action='store_true', help='weights and images in float16')
    images = parser.add_mutually_exclusive_group()
    images.add_argument(
        '--images', metavar='DIR', help='a folder of images to compare on; without it, Gaussian noise')
    images.add_argument(
        '--int8', metavar='DIR', help='quantise to int8 (ONNX), calibrated with and compared on images of this folder')
    parser.add_argument(
        '--samples', metavar='N', type=int, default=_MOST_IMAGES, help='images to take at most (%(default)s)')
    parser.add_argument(
        '--least-agreement', metavar='SHARE', type=float,
        help='share of the images of which a file in float16 or int8 must name the same class (0.95)')


def run(args: argparse.Namespace) -> int:
    """Export, and print how the file compares."""
    from ..hub.errors import HubError
    from ..hub.export import LEAST_AGREEMENT, export

    if args.samples < 1:
        raise CommandError(f'--samples must be at least 1, got {args.samples}')
    if args.size is not None and (len(args.size) > 2 or min(args.size) < 1):
        raise CommandError(f'--size takes one or two numbers of at least 1, got {" ".join(map(str, args.size))}')
    folder = args.int8 or args.images
    if folder is not None and not Path(folder).is_dir():
        raise CommandError(f'--{"int8" if args.int8 else "images"} takes a folder, got {folder!r}')
    network, labels = _network(args)
    size = None if args.size is None else (args.size[0], args.size[-1])
    least = LEAST_AGREEMENT if args.least_agreement is None else args.least_agreement
    try:
        images, seen = _images(network, folder, args.samples, size)
        with Console(stderr=True).status('Exporting, comparing and timing'):
            done = export(
                network, args.output, args.to, images, dynamic=args.dynamic, half=args.half, int8=bool(args.int8),
                labels=labels, seen=seen, least_agreement=least, overwrite=args.overwrite)
    except HubError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f'{args.output} was not written: {error.strerror or error}') from error
    _report(done, seen)
    return 0


def _network(args: argparse.Namespace) -> 'tuple[ShiftwiseNet, list[str] | None]':
    """The network, and names of its classes if anything tells them."""
    kwargs = dict(args.model_kwargs)
    if is_elsewhere(args.network) or not Path(args.network).exists():
        trained = args.pretrained or is_elsewhere(args.network)
        network = build_network(args.network, pretrained=trained, **kwargs)
        told: Any = getattr(network, 'pretrained_cfg', None) or {}
    else:
        from ..hub.source import read_json

        network, _ = load_network(args.network, args.model, kwargs)
        told = read_json(Path(args.network) / 'config.json') if Path(args.network).is_dir() else {}
    names = told.get('label_names')
    return network, list(names) if isinstance(names, (list, tuple)) and len(names) == network.num_classes else None


def _images(
        network: 'ShiftwiseNet', folder: str | None, most: int,
        size: tuple[int, int] | None) -> 'tuple[list[Tensor], str]':
    import torch

    if folder is not None:
        from ..hub.images import Images

        images = list(Images(folder, network, most, size))
        return images, f'{len(images)} images of {folder}'
    from ..profile.network import image_size

    generator = torch.Generator().manual_seed(0)
    height, width = size or image_size(network, None)
    count = min(most, 8)
    noise = [torch.randn(network.in_chans, height, width, generator=generator) for _ in range(count)]
    return noise, f'{count} images of Gaussian noise'


def _report(done: 'Export', seen: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column('form')
    for column in ('largest error,\nof the largest logit', 'same class', 'ms an image', "times PyTorch's", 'MB'):
        table.add_column(column, justify='right')
    for form in done.forms:
        table.add_row(
            form.name, f'{form.error:.1e}', f'{form.agreement:.1%}', f'{form.milliseconds:.2f}',
            f'{form.times_pytorch:.2f}', f'{form.megabytes:.2f}', style='bold' if form is done.kept else '')
    lines = [
        f'Compared with the merged network in PyTorch, float32, on {escape(seen)}.',
        *([f'Kept: {done.kept.name}.'] if len(done.forms) > 1 else []),
        f'Written: {escape(str(done.file))}, labels and preprocessing in {escape(str(done.description))}',
    ]
    print_sections([table, *lines])

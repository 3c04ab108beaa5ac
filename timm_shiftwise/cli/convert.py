"""`timm-shiftwise convert SOURCE --output DIR`: a checkpoint becomes a folder that timm and the Hub understand."""
import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import CommandError
from .network import model_argument

_LAYOUTS = {'authors': "the papers' authors'", 'convnext': "timm's ConvNeXt"}


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Declare the arguments."""
    parser = subparsers.add_parser(
        'convert',
        help='turn a checkpoint into a folder for timm and the Hub',
        description='Turn a checkpoint into a folder for timm and the Hub (model.safetensors, config.json, README.md, '
                    'pictures), and check that the folder gives the same logits. The network is told from the '
                    'checkpoint.',
    )
    parser.add_argument(
        'source', metavar='SOURCE',
        help="a checkpoint file of ours, the papers' authors' or a ConvNeXt's, a folder of train.py, or a Hub folder")
    parser.add_argument('--output', metavar='DIR', required=True, help='the folder to write')
    parser.add_argument(
        '--model', '--to', metavar='NAME',
        help='the network, where the checkpoint does not tell it; what to grow a ConvNeXt to, such as sw_convnext_tiny')
    parser.add_argument(
        '--model-kwargs', metavar='NAME=VALUE', nargs='+', default=[], type=model_argument,
        help='arguments of the network that the checkpoint does not tell, such as focus_lengths=51,49,47,13')
    parser.add_argument('--reparameterize', action='store_true', help='merge the network for inference')
    parser.add_argument(
        '--calibrate', metavar='DIR',
        help='a folder of images: let the norms of the operators know their statistics, without a change of the logits')
    parser.add_argument(
        '--no-ema', action='store_true', help='take the last weights, not their average, where both are there')
    parser.add_argument(
        '--no-pictures', action='store_true',
        help='leave out the pictures of the receptive field and of the kept groups, which take some seconds')
    parser.add_argument(
        '--images', metavar='DIR',
        help='a folder of images to measure the receptive field on; without it, Gaussian noise')
    parser.add_argument('--overwrite', action='store_true', help='replace the folder if there is one')
    card = parser.add_argument_group('what the model card says of the weights')
    card.add_argument('--description', metavar='TEXT', help='a sentence on the weights')
    card.add_argument('--dataset', metavar='NAME', help='the data they were trained on, as the Hub names it')
    card.add_argument(
        '--license', metavar='NAME',
        help="their licence, as the Hub names it, such as apache-2.0 (default: what the source says; 'other' with "
             "a link for the papers' authors' weights, else 'unknown')")
    card.add_argument(
        '--result', metavar=('RESULT', 'SOURCE'), nargs=2, action='append', default=[],
        help='a result and where it is published or how it was measured')
    card.add_argument(
        '--validated', metavar=('FILE', 'DATASET'), nargs=2, action='append', default=[],
        help="what timm's validate.py measured of these weights, its --results-file, and the data set as the Hub names "
             'it; what train.py measured of them is taken up by itself')


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was found and written."""
    from ..hub.convert import convert
    from ..hub.errors import HubError
    from ..hub.model_card import Provenance
    from ..models.checkpoint import CheckpointError

    if args.images is not None and args.no_pictures:
        raise CommandError('--images are for the picture of the receptive field: leave out --no-pictures')
    if args.images is not None and not Path(args.images).is_dir():
        raise CommandError(f'--images takes a folder, got {args.images!r}')
    provenance = Provenance(args.description, args.dataset, args.license, [tuple(pair) for pair in args.result])
    console = Console(soft_wrap=True)
    try:
        with Console(stderr=True).status('Converting and checking', spinner='line'):
            done = convert(
                args.source,
                args.output,
                args.model,
                dict(args.model_kwargs),
                reparameterize=args.reparameterize,
                use_ema=not args.no_ema,
                overwrite=args.overwrite,
                images_to_calibrate=args.calibrate,
                provenance=provenance,
                validated=[tuple(pair) for pair in args.validated],
                pictures=not args.no_pictures,
                images_to_show=args.images,
            )
    except (HubError, CheckpointError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f'{args.output} was not written: {error}') from error

    network = done.network
    table = Table(show_header=False, box=None)
    table.add_row('Weights', escape(str(done.weights)))
    table.add_row('Layout', _LAYOUTS.get(network.layout, network.layout))
    table.add_row('Network', network.name)
    for name, value in network.args.items():
        table.add_row('', escape(f'{name}={value!r}'))
    if network.assumed:
        table.add_row('Assumed', f'{", ".join(network.assumed)} of {network.name}: the checkpoint does not tell')
    table.add_row('Form', 'merged for inference' if done.merged else 'as trained')
    table.add_row('Parameters', f'{done.cost.parameters:,}')
    table.add_row('Multiply-adds', f'{done.cost.multiply_adds:,}')
    table.add_row('Logits', f"off by {done.error:.1e} of the largest from the source's")
    table.add_row('Pictures', ', '.join(done.pictures) or 'none')
    if done.not_drawn:
        table.add_row('', escape(done.not_drawn))
    console.print(table)
    reference = f'local-dir:{done.folder}'
    console.print(f'\nTo use it: timm.create_model({reference!r}, pretrained=True)', markup=False)
    console.print(f'To publish it: timm-shiftwise publish {done.folder} --repo USER/NAME', markup=False)
    return 0

"""`timm-shiftwise recipe MODEL`: write the training recipe of a model, fitted to a run, for train.py's `--config`."""
import argparse
import shlex
from pathlib import Path

from rich.console import Console

from . import CommandError


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Declare the arguments."""
    parser = subparsers.add_parser(
        'recipe',
        help="write a model's training recipe, fitted to a run, for train.py's --config",
        description="Write a model's training recipe as a file for train.py's --config, and print its path; without "
                    'MODEL, print the names of the models. Without further arguments it is the published run on '
                    'ImageNet-1k; with them, batches, learning rate, warm-up and the exchange of small kernels are '
                    'fitted to the run, and the file says how.',
    )
    parser.add_argument('model', metavar='MODEL', nargs='?', help='name of the model, such as sw_tiny')
    parser.add_argument(
        '--data-dir', metavar='DIR', help='folder with train/CLASS and val/CLASS, whose images and classes are counted')
    parser.add_argument(
        '--epochs', metavar='N', type=int, help='length of the run, the warm-up included (default: the published)')
    parser.add_argument(
        '--batch-size', metavar='B', type=int,
        help='images of a GPU at a time; the steps of accumulation follow (default: the published, 64, if there are '
             'enough images)')
    parser.add_argument(
        '--gpus', metavar='G', type=int,
        help="processes that train together, torchrun's --nproc_per_node (default: 1 with --data-dir, else the "
             'published 8)')
    parser.add_argument(
        '--from', metavar='WEIGHTS', dest='weights',
        help='start from weights, for a shorter run: a checkpoint file, an output folder of train.py, or a Hub folder')
    parser.add_argument('--output', metavar='FILE', type=Path, help='the file to write (default: MODEL.yaml)')
    parser.add_argument('--overwrite', action='store_true', help='replace the file if it says something else')


def run(args: argparse.Namespace) -> int:
    """Write a recipe and print its path alone, which a shell can substitute; or print the names of the models.

    Raises:
        CommandError: an argument is of no use; nothing is written.
    """
    from ..recipes import IMAGENET, RECIPES, RecipeError, count_images, finetuning, plan_run, recipe_text

    console = Console(soft_wrap=True)
    if args.model is None:
        console.out('\n'.join(RECIPES), highlight=False)
        return 0
    if args.model not in RECIPES:
        raise CommandError(f'no recipe for {args.model!r}. There are recipes for {", ".join(RECIPES)}')
    output = args.output or Path(f'{args.model}.yaml')
    recipe, weights, weights_args = RECIPES[args.model], None, None
    if args.weights is not None:
        recipe = finetuning(recipe)
        weights, weights_args = _weights(args.weights, args.model)
    try:
        images = IMAGENET if args.data_dir is None else count_images(Path(args.data_dir))
        gpus = args.gpus if args.gpus is not None else 8 if args.data_dir is None else 1
        planned = plan_run(recipe, images, gpus, args.epochs, args.batch_size)
    except RecipeError as error:
        raise CommandError(str(error)) from error
    text = recipe_text(
        args.model, recipe, planned, str(output), _command(args), args.data_dir, weights, weights_args)
    _write(text, output, args.overwrite)
    console.out(str(output), highlight=False)
    return 0


def _weights(path: str, model: str) -> tuple[str, dict[str, object]]:
    """The file of weights, and the arguments of the network that they need beyond the model's own."""
    from ..hub.convert import tell_network
    from ..hub.errors import HubError
    from ..hub.source import read_source
    from ..models import CheckpointError

    try:
        source = read_source(path)
        needed = dict(tell_network(source, model, {}).args)
    except (HubError, CheckpointError) as error:
        raise CommandError(f'--from {path}: {error}') from error
    if needed.pop('reparameterized', False):
        raise CommandError(f'--from {path}: the weights are merged for inference and cannot be trained')
    needed.pop('num_classes', None)
    return str(source.file), needed


def _command(args: argparse.Namespace) -> str:
    """The command line, as a shell takes it."""
    options = {
        '--data-dir': args.data_dir, '--epochs': args.epochs, '--batch-size': args.batch_size, '--gpus': args.gpus,
        '--from': args.weights, '--output': args.output}
    given = [str(word) for option in options.items() if option[1] is not None for word in option]
    return shlex.join(['timm-shiftwise', 'recipe', args.model, *given])


def _write(text: str, output: Path, overwrite: bool) -> None:
    """Write a file; one that says the same is left as it is."""
    from ..ops.files import replacing

    try:
        if output.exists() and not overwrite and output.read_text(encoding='utf-8') != text:
            raise CommandError(f'{output} is there already and says something else; --overwrite replaces it')
        with replacing(output) as partial:
            partial.write_text(text, encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f'--output {output} cannot be written: {error}') from error

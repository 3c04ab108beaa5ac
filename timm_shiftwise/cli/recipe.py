"""`timm-shiftwise recipe MODEL`: where the ImageNet-1k recipe of a model lies, for train.py's `--config`."""
import argparse
from importlib import resources

from rich.console import Console

from . import CommandError


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Declare the arguments."""
    parser = subparsers.add_parser(
        'recipe',
        help="print the path of a model's ImageNet-1k recipe",
        description="Print the path of a model's ImageNet-1k recipe, without MODEL those of all recipes. Use: "
                    'torchrun --nproc_per_node=8 -m timm_shiftwise run train.py '
                    '--config "$(timm-shiftwise recipe sw_tiny)" --data-dir DIR',
    )
    parser.add_argument('model', metavar='MODEL', nargs='?', help='name of the model, such as sw_tiny')


def recipes() -> dict[str, str]:
    """Paths of the recipes by the name of their model."""
    folder = resources.files('timm_shiftwise') / 'recipes'
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith('.yaml')), key=lambda entry: entry.name)
    return {entry.name.removesuffix('.yaml'): str(entry) for entry in files}


def run(args: argparse.Namespace) -> int:
    """Print one path, which a shell can substitute, or a line for each recipe."""
    paths = recipes()
    console = Console(soft_wrap=True)
    if args.model is None:
        for model, path in paths.items():
            console.out(f'{model}  {path}', highlight=False)
    elif args.model in paths:
        console.out(paths[args.model], highlight=False)
    else:
        raise CommandError(f'no recipe for {args.model!r}. There are recipes for {", ".join(paths)}')
    return 0

"""`timm-shiftwise quickstart`: train a small network on handwritten digits, save it, load it back, look at it.

Also how the packaged weights are made: run it, then copy `quickstart/test_sw.digits/model.safetensors` to
`timm_shiftwise/weights/test_sw.digits.safetensors`.
"""
import argparse
import importlib
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from . import CommandError
from .network import share_bar

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    from timm_shiftwise.models import ShiftwiseNet
    from timm_shiftwise.quickstart.training import Scores

EPOCHS = 20
ENOUGH = 97.
"""Held-out top-1, in percent, below which the command fails."""

DIGITS, HUB_FOLDER, PICTURE = 'digits', 'test_sw.digits', 'predictions.png'
_SCRATCH = '.unfinished-'


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Declare the arguments."""
    parser = subparsers.add_parser(
        'quickstart',
        help='train a small network on handwritten digits, in a minute or two, and look at what it does',
        description='Write handwritten digits as a folder of images, train test_sw on them, save it as a folder for '
                    'the Hugging Face Hub, load it back, merge it for inference, and draw what it says of held-out '
                    'digits.',
    )
    parser.add_argument(
        '--output', metavar='DIR', type=Path, default=Path('quickstart'),
        help='where everything is written; a rerun replaces what an earlier one wrote (default: %(default)s)')
    parser.add_argument(
        '--epochs', metavar='N', type=int, default=EPOCHS,
        help='times to go through the training images (default: %(default)s)')
    parser.add_argument(
        '--seed', metavar='N', type=int, default=0, help='seed of weights and batches (default: %(default)s)')
    parser.add_argument(
        '--device', default='cpu', help='where to train, such as cpu or cuda (default: %(default)s)')


def run(args: argparse.Namespace) -> int:
    """Do it all, and say what is done.

    Returns:
        0; 1 if the network scored below `ENOUGH`, and no network is saved; 130 if the user stopped it.

    Raises:
        CommandError: an argument is of no use, or a package is missing.
    """
    if args.epochs < 1:
        raise CommandError(f'--epochs must be at least 1, got {args.epochs}')
    if not 0 <= args.seed < 2 ** 32:
        raise CommandError(f'--seed must be between 0 and 4294967295, got {args.seed}')
    require_packages({'sklearn': 'scikit-learn', 'matplotlib': 'matplotlib'})
    device = _find_device(args.device)
    _claim(args.output)
    console = Console()
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=args.output) as scratch, _one_thread():
        try:
            return _quickstart(console, args.output, Path(scratch), args.epochs, args.seed, device)
        except KeyboardInterrupt:
            console.print('\nStopped; what was unfinished is removed.')
            return 130


def require_packages(packages: dict[str, str]) -> None:
    """Check that packages beyond those that timm-shiftwise always needs can be imported.

    Args:
        packages: names of modules, with the names by which pip knows their packages.

    Raises:
        CommandError: one cannot; the message says how to install it.
    """
    missing = []
    for module, package in packages.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise CommandError(
            f'{" and ".join(missing)} cannot be imported. Install with\n'
            f'  pip install {" ".join(missing)}\n'
            'or with the extra "quickstart" of this package, in a clone:\n'
            '  pip install ".[quickstart]"')


def _find_device(name: str) -> 'torch.device':
    import torch

    try:
        device = torch.device(name)
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f'--device {name} cannot be used here: {str(error).splitlines()[0]}') from None
    return device


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run PyTorch on one thread: the network is so small that several wait for each other longer than they compute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _claim(output: Path) -> None:
    """Make the output directory, or check that it holds nothing but what an earlier run wrote."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f'--output {output} cannot be made: {error.strerror}') from None
    leftovers = [entry for entry in output.iterdir() if entry.name.startswith(_SCRATCH)]
    ours = {DIGITS, HUB_FOLDER, PICTURE, *(leftover.name for leftover in leftovers)}
    foreign = sorted({entry.name for entry in output.iterdir()} - ours)
    if foreign:
        raise CommandError(
            f'--output {output} holds something else already: {", ".join(foreign[:3])}'
            f'{", ..." if len(foreign) > 3 else ""}. Choose a new or an empty directory')
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)


def _place(made: Path, target: Path) -> None:
    """Move what is finished to its place; what an earlier run left there goes."""
    if target.is_dir() and not target.is_symlink():
        target.rename(made.with_name(f'replaced-{target.name}'))
    made.replace(target)


def _quickstart(console: Console, output: Path, scratch: Path, epochs: int, seed: int, device: 'torch.device') -> int:
    from timm.utils import random_seed

    from timm_shiftwise.ops.backend import explain_backend
    from timm_shiftwise.quickstart import digits, picture, training

    start = time.perf_counter()
    learned, held_out = digits.write_digits(scratch / DIGITS)
    _place(scratch / DIGITS, output / DIGITS)
    _say(console, 'Digits', f'{learned} images to learn from and {held_out} held out, in {output / DIGITS}')

    random_seed(seed)
    steps = training.count_steps(learned, epochs)
    model = training.create_network(steps).to(device)
    images = training.train_loader(output / DIGITS, model, device)
    exam = training.held_out_loader(output / DIGITS, model, device)
    choice = explain_backend(None, device)
    kernels = 'Taichi kernels where they are the faster' if choice.backend == 'taichi' else 'no Taichi kernels'
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = training.image_size(model)
    _say(console, 'Network', f'{training.MODEL}, {parameters:,} parameters, images of {size} x {size} pixels; '
                             f'{kernels} ({choice.reason})')

    begun = time.perf_counter()
    _train(console, model, images, exam, epochs, device)
    scores = training.score(model, exam, device)
    _say(console, 'Trained', f'{steps} steps in {time.perf_counter() - begun:.0f} s. Held-out digits read right: '
                             f'{scores.accuracy:.2f} % ({scores.mistakes} of {held_out} wrong)')
    if scores.accuracy < ENOUGH:
        console.print(
            f'{scores.accuracy:.2f} % is below the {ENOUGH:.0f} % that this demonstration has to reach: no network is '
            f'saved. The default is --epochs {EPOCHS}, this run had {epochs}.', style='bold red', highlight=False)
        return 1
    console.print(_sparsity_table(model))

    _save(model, scratch / HUB_FOLDER, output / HUB_FOLDER, scores, f'{epochs} epochs, seed {seed}')
    reloaded = _load_back(scratch / HUB_FOLDER, scores, exam, device)
    _place(scratch / HUB_FOLDER, output / HUB_FOLDER)
    kilobytes = (output / HUB_FOLDER / 'model.safetensors').stat().st_size / 1000
    _say(console, 'Saved', f'{output / HUB_FOLDER}, as the Hugging Face Hub has it: model.safetensors '
                           f'({kilobytes:.0f} kB), config.json, README.md')
    _say(console, 'Loaded', f"timm.create_model('local-dir:{output / HUB_FOLDER}', pretrained=True) gives the same "
                            'scores to the last bit')
    console.print(_merging_table(reloaded, exam, device))

    picture.draw_predictions(training.files_of(exam), scores, scratch / PICTURE)
    _place(scratch / PICTURE, output / PICTURE)
    _say(console, 'Picture', f'{output / PICTURE}: held-out digits with what the network says of them')
    _say(console, 'Done', f'in {time.perf_counter() - start:.0f} s')
    console.print(_next_steps(output))
    return 0


def _say(console: Console, what: str, text: str) -> None:
    line = Table.grid(padding=(0, 2))
    line.add_column(width=7, style='bold cyan')
    line.add_column(overflow='fold')
    line.add_row(what, Text(text))
    console.print(line)


def _train(
        console: Console, model: 'ShiftwiseNet', images: 'DataLoader[Any]', exam: 'DataLoader[Any]', epochs: int,
        device: 'torch.device') -> None:
    from timm_shiftwise.quickstart.training import train

    columns = (
        TextColumn('[bold cyan]Training[/] epoch {task.fields[epoch]}'),
        BarColumn(bar_width=None),
        TextColumn('{task.fields[state]}'),
        TimeElapsedColumn(),
        TextColumn('left'),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task('', total=epochs * len(images), epoch=f'1/{epochs}', state='')
        for now in train(model, images, exam, epochs, device):
            right = '' if now.accuracy is None else f' held-out {now.accuracy:.1f} %'
            bar.update(task, completed=now.step, epoch=f'{now.epoch}/{epochs}', state=f'loss {now.loss:.3f}{right}')


def _sparsity_table(model: 'ShiftwiseNet') -> Table:
    from timm_shiftwise.profile.kept import NetworkGroups, StageGroups, network_groups

    groups = network_groups(model)
    table = Table(title='What sparse training left of the small kernels', title_justify='left', box=box.SIMPLE_HEAD)
    for name in ('stage', 'kept', 'of', 'pruned'):
        table.add_column(name, justify='right')
    table.add_column()
    rows: list[tuple[str, StageGroups | NetworkGroups]] = [(str(i), stage) for i, stage in enumerate(groups.stages, 1)]
    for name, counted in (*rows, ('all', groups)):
        table.add_row(
            name, str(counted.kept), str(counted.total), f'{100 * (1 - counted.density):.1f} %',
            share_bar(counted.density))
    return table


def _save(model: 'ShiftwiseNet', folder: Path, place: Path, scores: 'Scores', recipe: str) -> None:
    """Write the Hub folder, whose model card names the place it will have."""
    from timm_shiftwise.hub.convert import write_folder
    from timm_shiftwise.hub.model_card import CardFacts, Picture, Provenance
    from timm_shiftwise.profile import profile_model
    from timm_shiftwise.quickstart.digits import CLASSES
    from timm_shiftwise.quickstart.training import MODEL

    facts = CardFacts(
        title=place.name,
        reference=f'local-dir:{place}',
        architecture=MODEL,
        profile=profile_model(model),
        provenance=Provenance(
            description='It reads handwritten digits, bright strokes on black, and is a demonstration: '
                        f'`timm-shiftwise quickstart` trained it ({recipe}) on images of Optical Recognition of '
                        'Handwritten Digits, https://archive.ics.uci.edu/dataset/80, as scikit-learn ships them.',
            results=[(
                f'{scores.accuracy:.2f} % top-1 on {len(scores.labels)} held-out digits', 'measured in that run')],
        ),
        picture=Picture(
            'from sklearn.datasets import load_digits',
            "Image.fromarray((load_digits().images[0] * (255 / 16)).astype('uint8'))",
        ),
    )
    folder.mkdir()
    write_folder(model, folder, {}, facts, dict(label_names=list(CLASSES)))


def _load_back(folder: Path, scores: 'Scores', exam: 'DataLoader[Any]', device: 'torch.device') -> 'nn.Module':
    import timm
    import torch

    from timm_shiftwise.quickstart.training import score

    model = timm.create_model(f'local-dir:{folder}', pretrained=True).to(device)
    if not torch.equal(score(model, exam, device).logits, scores.logits):
        raise CommandError('the network that was saved and loaded back does not give the same scores')
    return model


def _merging_table(model: 'nn.Module', exam: 'DataLoader[Any]', device: 'torch.device') -> Table:
    """Accuracy and latency of the network as it was trained, and merged for inference."""
    from timm.utils import reparameterize_model

    from timm_shiftwise.profile.timing import take_turns
    from timm_shiftwise.quickstart.training import score

    merged = reparameterize_model(model.eval())
    scores = [score(network, exam, device) for network in (model, merged)]
    batch = next(iter(exam))[0].to(device)  # [B, 3, H, W]
    of_one, of_many = (map(median, take_turns([model, merged], x, repeats=20)) for x in (batch[:1], batch))
    change = (scores[1].logits.softmax(1) - scores[0].logits.softmax(1)).abs().max().item()

    table = Table(
        title='Merged for inference, by reparameterize_model',
        title_justify='left',
        caption=f'One thread. Probabilities change by {change:.0e} at most.',
        caption_justify='left',
        box=box.SIMPLE_HEAD,
    )
    for name in ('', 'read right', 'one image', f'{len(batch)} images'):
        table.add_column(name, justify='right')
    for name, said, one, many in zip(('as trained', 'merged'), scores, of_one, of_many, strict=True):
        table.add_row(name, f'{said.accuracy:.2f} %', f'{one:.1f} ms', f'{many:.1f} ms')
    return table


def train_lines(model: str, data: str, epochs: int) -> list[str]:
    """The commands that write a recipe for a folder of images and train by it.

    Args:
        model: name of the network.
        data: folder with `train` and `val`, as a shell takes it.
        epochs: length of the run.
    """
    import torch

    device = '' if torch.cuda.is_available() else ' --device cpu'
    return [
        f'timm-shiftwise recipe {model} --data-dir {data} --epochs {epochs}',
        f'python timm-scripts/train.py --config {model}.yaml{device}',
    ]


def _next_steps(output: Path) -> Panel:
    import timm

    def code(*lines: str) -> Syntax:
        return Syntax('\n'.join(lines), 'bash', background_color='default', word_wrap=True)

    return Panel(
        Group(
            'Sort them into a directory for each class, some to learn from and some to score on:',
            Text('  PHOTOS/train/CLASS/*.jpg\n  PHOTOS/val/CLASS/*.jpg', style='bold'),
            "\nGet timm's training script:",
            code(
                f'git clone --depth 1 --branch v{timm.__version__} \\',
                '    https://github.com/huggingface/pytorch-image-models timm-scripts'),
            '\nWrite a recipe for your folder, look into it, and train by it:',
            code(*train_lines('sw_tiny', 'PHOTOS', 100)),
            '\nTo see these lines work first, on the digits:',
            code(*train_lines('test_sw', shlex.quote(str(output / DIGITS)), 15)),
        ),
        title='[bold]Your own images[/]',
        box=box.HORIZONTALS,
    )

"""`timm-shiftwise quickstart`: train a small network on handwritten digits, save it, load it back, look at it.

Also how the packaged weights are made: `timm-shiftwise quickstart`, then copy
`quickstart/test_sw.digits/model.safetensors` to `timm_shiftwise/weights/test_sw.digits.safetensors`.
"""
import argparse
import importlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from . import CommandError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

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
        description='Write handwritten digits as a folder of images, train test_sw on them, save it as a folder for the '
                    'Hugging Face Hub, load it back, merge it for inference, and draw what it says of held-out digits.',
    )
    parser.add_argument('--output', metavar='DIR', type=Path, default=Path('quickstart'),
                        help='where everything is written; a rerun replaces what an earlier one wrote '
                             '(default: %(default)s)')
    parser.add_argument('--epochs', metavar='N', type=int, default=EPOCHS,
                        help='times to go through the training images (default: %(default)s)')
    parser.add_argument('--seed', metavar='N', type=int, default=0, help='seed of weights and batches '
                        '(default: %(default)s)')
    parser.add_argument('--device', default='cpu', help='where to train, such as cpu or cuda (default: %(default)s)')


def run(args: argparse.Namespace) -> int:
    """Do it all, and say what is done.

    Returns:
        0, or 1 if the network scored below `ENOUGH`: then no network is saved.

    Raises:
        CommandError: an argument is of no use, or a package is missing.
    """
    if args.epochs < 1:
        raise CommandError(f'--epochs must be at least 1, got {args.epochs}')
    _require_packages()
    output: Path = args.output
    _claim(output)
    console = Console()
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=output) as scratch:
        try:
            return _quickstart(console, output, Path(scratch), args.epochs, args.seed, args.device)
        except KeyboardInterrupt:
            console.print('\nStopped. What was begun is removed again.')
            return 130


def _require_packages() -> None:
    packages = {'sklearn': 'scikit-learn', 'matplotlib': 'matplotlib'}
    missing = []
    for module, package in packages.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise CommandError(
            f'{" and ".join(missing)} cannot be imported, which the digits and the picture need. Install with\n'
            f'  pip install {" ".join(missing)}\n'
            f'or as the extra of this package: pip install "timm-shiftwise[quickstart]", in a clone '
            f'pip install ".[quickstart]"')


def _claim(output: Path) -> None:
    """Make the output directory, or check that it holds nothing but what an earlier run wrote."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise CommandError(f'--output {output} is a file') from None
    except OSError as error:
        raise CommandError(f'--output {output} cannot be made: {error.strerror}') from None
    leftovers = [entry for entry in output.iterdir() if entry.name.startswith(_SCRATCH)]
    foreign = sorted(entry.name for entry in output.iterdir()
                     if entry not in leftovers and entry.name not in (DIGITS, HUB_FOLDER, PICTURE))
    if foreign:
        raise CommandError(
            f'--output {output} holds files of something else ({", ".join(foreign[:3])}'
            f'{", ..." if len(foreign) > 3 else ""}). Choose a new or an empty directory')
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)


def _place(made: Path, target: Path) -> None:
    """Move what is finished to its place; what an earlier run left there goes."""
    if target.is_dir() and not target.is_symlink():
        target.rename(made.parent / f'replaced-{target.name}')
    made.replace(target)


def _quickstart(console: Console, output: Path, scratch: Path, epochs: int, seed: int, device_name: str) -> int:
    import torch
    from timm.utils import random_seed

    from timm_shiftwise.ops.backend import explain_backend
    from timm_shiftwise.quickstart import digits, hub_folder, picture, training

    start = time.perf_counter()
    try:
        device = torch.device(device_name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f'--device {device_name} cannot be used: {str(error).splitlines()[0]}') from None

    images = digits.write_digits(scratch / DIGITS)
    _place(scratch / DIGITS, output / DIGITS)
    _say(console, 'Digits', f'{images[0]} images to learn from, {images[1]} held out, in {output / DIGITS}')

    random_seed(seed)
    steps = epochs * (images[0] // training.BATCH_SIZE)
    model = training.create_network(steps).to(device)
    train_images = training.train_loader(output / DIGITS, model, device)
    held_out = training.held_out_loader(output / DIGITS, model, device)
    parameters = sum(p.numel() for p in model.parameters())
    size = model.pretrained_cfg['input_size'][-1]
    choice = explain_backend(None, device)
    _say(console, 'Network', f'{training.MODEL}: {parameters:,} parameters, images of {size} x {size} pixels; shift-add in '
                             f'{choice.backend} ({choice.reason})')

    begun = time.perf_counter()
    _train(console, model, train_images, held_out, epochs, device)
    scores = training.score(model, held_out, device)
    _say(console, 'Training', f'{steps} steps in {time.perf_counter() - begun:.0f} s: [bold]{scores.accuracy:.2f} %[/] of the '
                              f'held-out digits are right ({scores.mistakes} of {images[1]} wrong)')
    if scores.accuracy < ENOUGH:
        console.print(
            f'[bold red]{scores.accuracy:.2f} % is below the {ENOUGH:.0f} % that this demonstration has to reach:[/] '
            f'no network is saved. The default is --epochs {EPOCHS}, this run had {epochs}.')
        return 1

    console.print(_sparsity_table(model))

    recipe = f'{epochs} epochs of AdamW with timm, seed {seed}'
    hub_folder.save_hub_folder(model, scratch / HUB_FOLDER, images, scores.accuracy, recipe)
    reloaded = hub_folder.load_hub_folder(scratch / HUB_FOLDER).to(device)
    if not torch.equal(training.score(reloaded, held_out, device).logits, scores.logits):
        raise CommandError('the network that was saved and loaded back does not give the same scores')
    _place(scratch / HUB_FOLDER, output / HUB_FOLDER)
    weights = output / HUB_FOLDER / 'model.safetensors'
    _say(console, 'Saved', f'{output / HUB_FOLDER}: model.safetensors ({weights.stat().st_size / 1e3:.0f} kB), config.json, '
                           'README.md, as the Hugging Face Hub has it')
    _say(console, 'Loaded', f"timm.create_model('local-dir:{output / HUB_FOLDER}', pretrained=True) gives the same scores, "
                            'to the last bit')

    console.print(_merging_table(reloaded, held_out, device))

    picture.draw_predictions(
        [Path(file) for file in held_out.dataset.filenames(absolute=True)], scores, scratch / PICTURE)
    _place(scratch / PICTURE, output / PICTURE)
    _say(console, 'Picture', f'{output / PICTURE}: held-out digits with what the network says of them')
    _say(console, 'Done', f'in {time.perf_counter() - start:.0f} s')
    console.print(_next_steps(output, size))
    return 0


def _say(console: Console, what: str, text: str) -> None:
    line = Table.grid(padding=(0, 2))
    line.add_column(width=8, style='bold cyan', no_wrap=True)
    line.add_column()
    line.add_row(what, text)
    console.print(line, highlight=False)


def _train(
        console: Console,
        model: 'nn.Module',
        images: 'DataLoader',
        held_out: 'DataLoader',
        epochs: int,
        device: 'torch.device',
) -> None:
    from timm_shiftwise.quickstart.training import train

    columns = (
        TextColumn('[bold cyan]Training[/]  epoch {task.fields[epoch]}'),
        BarColumn(bar_width=None),
        TextColumn('{task.fields[state]}'),
        TimeElapsedColumn(),
        TextColumn('left'),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task('', total=epochs * len(images), epoch=f'1/{epochs}', state='')
        for now in train(model, images, held_out, epochs, device):
            held_out_score = '' if now.accuracy is None else f'  held-out {now.accuracy:.1f} %'
            bar.update(
                task,
                completed=now.step,
                epoch=f'{now.epoch}/{epochs}',
                state=f'loss {now.loss:.3f}{held_out_score}')


def _sparsity_table(model: 'nn.Module') -> Table:
    table = Table(title='Small kernels left after sparse training', title_justify='left', box=box.SIMPLE)
    for name in ('stage', 'kept', 'of', 'pruned'):
        table.add_column(name, justify='right')
    table.add_column('')
    kept_in_all, in_all = 0, 0
    for number, stage in enumerate(model.stages, 1):
        masks = [block.conv_dw.mask for block in stage.blocks]
        kept, total = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
        kept_in_all, in_all = kept_in_all + kept, in_all + total
        table.add_row(str(number), str(kept), str(total), f'{100 * (1 - kept / total):.1f} %', _bar(kept / total))
    table.add_section()
    table.add_row('all', str(kept_in_all), str(in_all), f'{100 * (1 - kept_in_all / in_all):.1f} %', _bar(kept_in_all / in_all))
    return table


def _bar(share: float, width: int = 24) -> Text:
    full = round(share * width)
    return Text.assemble(('█' * full, 'cyan'), ('░' * (width - full), 'dim'))


def _merging_table(model: 'nn.Module', held_out: 'DataLoader', device: 'torch.device') -> Table:
    """Accuracy and latency of a network as it was trained, and merged for inference."""
    from timm.utils import reparameterize_model

    from timm_shiftwise.quickstart.training import latency, score

    batch = next(iter(held_out))[0].to(device)  # [B, 3, H, W]
    table = Table(title='Merging for inference (timm.utils.reparameterize_model)', title_justify='left', box=box.SIMPLE)
    for name in ('', 'held-out', 'one image', f'{len(batch)} images', 'largest change'):
        table.add_column(name, justify='right')
    scores = score(model, held_out, device)
    merged = reparameterize_model(model.eval())
    for name, network in (('as trained', model), ('merged', merged)):
        now = score(network, held_out, device)
        change = (now.logits.softmax(1) - scores.logits.softmax(1)).abs().max().item()
        table.add_row(
            name,
            f'{now.accuracy:.2f} %',
            f'{latency(network, batch[:1]):.1f} ms',
            f'{latency(network, batch):.1f} ms',
            '' if network is model else f'{change:.0e} of a probability',
        )
    return table


def _next_steps(output: Path, size: int) -> Panel:
    import timm
    import torch

    device = '' if torch.cuda.is_available() else ' --device cpu'
    folder = Syntax('PHOTOS/train/CLASS/*.jpg\nPHOTOS/val/CLASS/*.jpg', 'text', background_color='default')
    scripts = Syntax(
        f'git clone --depth 1 --branch v{timm.__version__} \\\n'
        '    https://github.com/huggingface/pytorch-image-models timm-scripts\n'
        'python timm-scripts/train.py --device-modules timm_shiftwise --model sw_tiny \\\n'
        '    --data-dir PHOTOS --num-classes 2 --input-size 3 224 224 \\\n'
        f'    --batch-size 64 --epochs 100 --opt adamw --lr 1e-3 --weight-decay 0.05{device}',
        'bash', background_color='default')
    trial = escape(
        f'To try that line at once: --model test_sw --data-dir {output / DIGITS} --num-classes 10 --input-size 3 {size} {size} '
        '--hflip 0 --epochs 20')
    return Panel(
        Group(
            'A directory for each class, once to learn from and once to score on:',
            folder,
            "\ntimm's own training script, unmodified; say how many classes you have:",
            scripts,
            f'\n[dim]{trial}[/]',
        ),
        title='[bold]Your own images[/]',
        box=box.HORIZONTALS,
    )

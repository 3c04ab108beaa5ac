"""A recipe as the YAML file that train.py reads, with comments for who reads it."""
import shlex
import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from .published import OPTIMISER, PUBLISHED_UPDATES, Recipe
from .run import LEAST_INTERVAL, Run, counted, fit_schedule, own_schedule


def recipe_text(
        model: str, recipe: Recipe, run: Run, file: str, command: str, data_dir: str | None = None,
        weights: str | None = None, weights_args: Mapping[str, Any] | None = None) -> str:
    """Write a recipe for a run in train.py's own argument names.

    Args:
        model: Name of the network.
        recipe: What it is trained with.
        run: The numbers of the run.
        file: Name of the file, for the line that starts the run.
        command: The command that wrote the recipe.
        data_dir: Folder of the images; None leaves it to the command line.
        weights: File of weights to start from.
        weights_args: Arguments of the network that these weights need.
    """
    start = 'python train.py' if run.gpus == 1 else \
        f'torchrun --nproc_per_node={run.gpus} -m timm_shiftwise run train.py'
    parts = [
        _comment(
            f'Recipe of {model} for timm\'s train.py, written by\n\n    {command}\n\nStart the run with\n\n'
            f'    {start} --config {shlex.quote(file)}{"" if data_dir else " --data-dir /path/to/imagenet"}\n\n'
            f'Arguments on the command line override those given here. Source: {recipe.source}'),
        _settings(recipe.ours, model=model, device_modules=['timm_shiftwise']),
        _data(run, data_dir),
        _weights(weights),
        _network(model, recipe, run, weights_args),
        _batch(recipe, run),
        _optimiser(recipe, run),
        _schedule(recipe, run),
        _rest(recipe, run),
    ]
    return '\n'.join(part for part in parts if part)


def _data(run: Run, data_dir: str | None) -> str:
    source = 'counted' if data_dir else 'as ImageNet-1k has'
    said = f'{run.images:,} training images of {run.classes:,} classes, {source}.'
    folder = {'data_dir': data_dir} if data_dir else {}
    return _comment(said) + _settings({}, **folder, num_classes=run.classes)


def _weights(weights: str | None) -> str:
    if weights is None:
        return ''
    said = 'The weights to start from. Their masks stay: no small kernel is exchanged. The classifier is new.'
    return _comment(said) + _settings({}, pretrained=True, pretrained_path=weights)


def _network(model: str, recipe: Recipe, run: Run, weights_args: Mapping[str, Any] | None) -> str:
    """Arguments of the network; those of its schedule are fitted to the run."""
    if weights_args is not None:
        needed = dict(weights_args)
        # train.py has arguments of its own for these, and hands them to the network beside model_kwargs
        own = {'in_chans': 'in_chans', 'global_pool': 'gp'}
        told = {option: needed.pop(name) for name, option in own.items() if name in needed}
        return _settings({}, **told, **({'model_kwargs': needed} if needed else {}))
    schedule = own_schedule(model, **recipe.model_kwargs)
    if schedule is None:
        return _comment('The network stays dense.')
    fitted = fit_schedule(schedule, run.updates)
    exchanges = (run.updates - 1) // fitted['prune_interval']
    said = (
        f'The network trains sparse: {100 * schedule.sparsity:.0f} % of its small kernels are pruned. This run has '
        f'{run.updates:,} updates, {run.updates_per_epoch:,} an epoch, and {counted(exchanges, "exchange")} of the '
        f"weakest. The network's own interval, {schedule.prune_interval:,}, is for {PUBLISHED_UPDATES:,} updates; a "
        f'run keeps its share, but lets {LEAST_INTERVAL} updates pass at least. Other epochs or another total batch '
        'change both. `model_kwargs: {sparsity: 0}` trains the dense network.')
    why = ''.join(_ours(recipe.ours, name) for name in recipe.model_kwargs)
    return _comment(said) + why + _settings({}, model_kwargs={**recipe.model_kwargs, **fitted})


def _batch(recipe: Recipe, run: Run) -> str:
    gpus, steps = counted(run.gpus, 'GPU'), counted(run.grad_accum_steps, 'accumulation step')
    said = f'An update sees {run.total_batch:,} images: {gpus} x {run.batch_size} x {steps}.'
    if recipe.published:
        said += (
            ' Published: 4,096, 8 GPUs x 64 x 8 accumulation steps, and BatchNorm over the 512 that all GPUs see at a '
            f'time (sync_bn). Here BatchNorm sees {run.together:,}. A larger batch_size with fewer steps is faster and '
            'shows it more; without sync_bn it sees those of one GPU alone. Either is another run than the published.')
    return _comment(said) + _settings(
        {}, batch_size=run.batch_size, grad_accum_steps=run.grad_accum_steps, sync_bn=True)


def _optimiser(recipe: Recipe, run: Run) -> str:
    scaled = '' if run.total_batch == recipe.total_batch else _comment(
        f'Ours: lr {recipe.lr:g} belongs to {recipe.total_batch:,} images an update; for {run.total_batch:,} it is '
        'multiplied by the square root of their ratio, as timm scales it for optimisers of Adam\'s kind.')
    return _settings({}, **OPTIMISER) + scaled + _settings({}, lr=run.lr)


def _schedule(recipe: Recipe, run: Run) -> str:
    rest = run.epochs - run.warmup_epochs
    said = (
        f'{run.epochs:,} epochs: {run.warmup_epochs} of warm-up, then the whole cosine over {rest:,}. '
        'With warmup_prefix train.py adds the warm-up to `epochs`; with sched_on_updates the rate changes with every '
        'update.')
    return _comment(said) + _settings(
        recipe.ours,
        sched='cosine',
        sched_on_updates=True,
        warmup_prefix=True,
        epochs=rest,
        warmup_epochs=run.warmup_epochs,
        warmup_lr=recipe.warmup_lr,
        min_lr=recipe.min_lr,
    )


def _rest(recipe: Recipe, run: Run) -> str:
    """Augmentation, regularisation, precision and averaging."""
    settings = dict(recipe.settings)
    if 'model_ema_decay' in settings:  # the average reaches back over the same share of the run
        reach = (1 - settings['model_ema_decay']) * PUBLISHED_UPDATES / run.updates
        settings['model_ema_decay'] = max(round(1 - reach, 6), 0.)
    return _settings(recipe.ours, **settings)


def _settings(ours: Mapping[str, str], **settings: Any) -> str:
    """Lines of YAML; what is ours has a comment before it."""
    return ''.join(
        _ours(ours, name) + yaml.safe_dump({name: value}, sort_keys=False) for name, value in settings.items())


def _ours(ours: Mapping[str, str], name: str) -> str:
    return _comment(f'Ours: {ours[name]}') if name in ours else ''


def _comment(text: str) -> str:
    """A comment of as many lines as it takes; what is indented is left as it is."""
    lines = []
    for line in text.split('\n'):
        lines += [line] if line.startswith(' ') else textwrap.wrap(line, 118) or ['']
    return ''.join(f'# {line}'.rstrip() + '\n' for line in lines)

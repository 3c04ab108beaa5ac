"""The page of a run: one HTML file that loads nothing else."""
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

import timm_shiftwise
from timm_shiftwise.profile.kept import percent, stage_blocks

from .changes import StageHistory, fates, missing_epochs, stage_histories
from .kernels import caveat, wide_and_tall
from .pictures import FATES, Line, draw_fates, draw_kept, draw_kernel, draw_lines
from .record import Epoch
from .run import Run

_CURVES = (
    ('Accuracy', '%', 'linear', {'eval_top1': 'top-1', 'eval_top5': 'top-5'}),
    ('Loss', 'cross entropy', 'linear', {'train_loss': 'training', 'eval_loss': 'evaluation'}),
    ('Learning rate', 'mean of the parameter groups', 'log', {'lr': 'learning rate'}),
)


def render_page(
        run: Run, only: Sequence[int] | None = None, channels: int = 4, since: int | None = None,
        refresh: float | None = None) -> str:
    """Write the page of a run.

    Args:
        run: What is known of it.
        only: Stages whose groups and kernels are drawn, from 1; None for all.
        channels: Channels of a stage whose kernels are drawn.
        since: The epoch since which the maps say what became of each group; None for the middle one of those known.
        refresh: Seconds after which a browser loads the page anew; None for never.

    Returns:
        HTML, in which no name or path of the user's is markup.

    Raises:
        ValueError: If there is no such stage, no epoch known since then, or less than one channel.
    """
    depth = len(stage_blocks(run.network))
    shown = list(range(1, depth + 1)) if only is None else sorted(set(only))
    wrong = [stage for stage in shown if not 1 <= stage <= depth]
    if wrong:
        raise ValueError(f'{run.model} has stages 1 to {depth}, not {wrong[0]}.')
    if channels < 1:
        raise ValueError(f'There must be at least 1 channel to draw, got {channels}.')
    first = run.epochs[(len(run.epochs) - 1) // 2].number if since is None else since
    recent = [epoch for epoch in run.epochs if epoch.number >= first]
    if not recent:
        raise ValueError(f'No epoch is known since {since}, the last is {run.epochs[-1].number}.')
    stages = [] if run.groups is None else stage_histories(run.epochs, run.groups)
    interval = run.args.get('val_interval')
    environment = Environment(
        loader=PackageLoader('timm_shiftwise.history', ''), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True)
    return environment.get_template('page.html').render(
        run=run,
        percent=percent,
        version=timm_shiftwise.__version__,
        refresh=refresh,
        epochs=ranges([epoch.number for epoch in run.epochs]),
        gaps=ranges(missing_epochs(run.epochs, interval if isinstance(interval, int) and interval > 0 else 1)),
        curves=list(_curves(run)),
        fates=list(FATES.values()),
        recent=recent,
        dense=all(mask.all() for epoch in run.epochs for mask in epoch.masks),
        stages=stages,
        pictures=_sparsity(stages) if stages else {},
        maps=[_maps(run, recent, stage, stages[stage - 1]) for stage in shown] if stages else [],
        kernels=[_kernels(run, stage, channels, stages[stage - 1] if stages else None) for stage in shown],
    )


def _curves(run: Run) -> Iterator[dict[str, Any]]:
    for title, unit, scale, columns in _CURVES:
        lines = [
            Line(name, run.curves[column], style) for style, (column, name) in enumerate(columns.items())
            if column in run.curves]
        if lines:
            told = ', '.join(f'{line.name} {_last(line.values):.4g}' for line in lines)
            yield {'title': title, 'picture': draw_lines(
                lines, unit, f'{title} over the epochs; at the end {told}', scale)}


def _last(values: Mapping[int, float]) -> float:
    return values[max(values)]


def _sparsity(stages: Sequence[StageHistory]) -> dict[str, Any]:
    kept, exchanged = [], []
    for index, stage in enumerate(stages):
        name = f'stage {index + 1}'
        kept.append(Line(name, stage.kept, index))
        if stage.has_paths_apart:
            kept += [Line('', path, index, dashed=True) for path in stage.by_path]
        exchanged.append(Line(
            name, {end: share for _, end, share in stage.exchanged}, index,
            since={end: start for start, end, _ in stage.exchanged}))
    told = ', '.join(f'stage {index} {percent(_last(stage.kept))}' for index, stage in enumerate(stages, 1))
    return {
        'kept': draw_lines(kept, 'kept groups', f'Share of kept groups over the epochs; at the end {told}', 'share'),
        'exchanged': draw_lines(
            exchanged, 'exchanged of the kept',
            'Share of the kept groups that were exchanged since the epoch known before', 'share'
        ) if stages[0].exchanged else None,
    }


def _maps(run: Run, recent: Sequence[Epoch], stage: int, history: StageHistory) -> dict[str, Any]:
    assert run.groups is not None
    groups = run.groups.stages[stage - 1]
    ghosts = f' of {groups.dim}' if groups.dim > groups.channels else ''
    strips = []
    for block, layer in enumerate(range(history.layers.start, history.layers.stop), 1):
        cells = fates([epoch.masks[layer] for epoch in recent])
        cells = cells[_by_count(recent[-1].masks[layer])]
        told = ', '.join(
            f'{percent(share)} {name}' for fate, (name, _) in FATES.items() if (share := float((cells == fate).mean())))
        strips.append({'name': f'block {block}', 'told': told, 'picture': draw_fates(
            cells, f'Stage {stage}, block {block}, {len(cells)} channels of {cells.shape[1]} groups: {told}')})
    return {
        'stage': stage,
        'facts': f'{groups.channels}{ghosts} channels, groups of each: {groups.maps}, focus length '
                 f'{groups.focus_length}',
        'strips': strips,
    }


def _by_count(mask: np.ndarray) -> np.ndarray:
    """Channels of a mask [P, C, K], the one that keeps the most groups first."""
    return np.argsort(-mask.any(axis=0).sum(axis=1), kind='stable')


def _kernels(run: Run, stage: int, count: int, history: StageHistory | None) -> dict[str, Any]:
    blocks = stage_blocks(run.network)[stage - 1]
    operator = blocks[-1].get_submodule('conv_dw')
    wide, tall = wide_and_tall(operator)
    mask = np.zeros((0, len(wide), 1), bool)  # [P, C, K]
    if history is not None:
        mask = run.epochs[-1].masks[history.layers.stop - 1]
    cards = []
    order = _by_count(mask)
    for channel in order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)].tolist():
        both = {'Wide': wide[channel], 'Tall, turned,': tall[channel].T}
        largest = max(float(np.abs(kernel).max()) for kernel in both.values())
        where = f'stage {stage}, block {len(blocks)}, channel {channel}'
        pictures = [
            draw_kernel(kernel, largest, f'{name} kernel of {where}, {" x ".join(map(str, kernel.shape))} values')
            for name, kernel in both.items()]
        told = ''
        if history is not None:
            told = f'{mask[:, channel].any(axis=0).sum()} of {mask.shape[2]} groups kept'
            pictures.append(draw_kept(mask[:, channel], f'{told} in {where}'))
        cards.append({'channel': channel, 'largest': largest, 'told': told, 'pictures': pictures})
    return {'stage': stage, 'block': len(blocks), 'cards': cards, 'caveat': caveat(operator)}


def ranges(numbers: Sequence[int]) -> str:
    """Whole numbers for people, those that follow each other as a range."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ', '.join('-'.join(map(str, part)) for part in parts)

"""Measured results for a model card, in the fields that the Hub has for them.

Accuracies are shares from 0 to 1, as those of the Hub's metric ``accuracy`` are (https://hf.co/metrics); timm's scripts
write percent.
"""
import csv
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult

from .errors import HubError
from .model_card import identifier
from .source import Source, number, read_text

_METRICS = {'top1': 'Top-1 accuracy', 'top5': 'Top-5 accuracy'}
_CONDITIONS = ('img_size', 'crop_pct', 'interpolation', 'tta')


def results_of_run(
        source: Source, config: Mapping[str, Any], num_classes: int, dataset: str | None) -> list[EvalResult]:
    """What a run of train.py measured of the very weights that were read from it.

    train.py validates at the end of an epoch, then saves the weights with the metric that it ranks them by. A row of
    summary.csv is of the weights if its epoch and metric are theirs. Where weights are averaged, it is the average that
    was validated, unless that lay on the CPU (``--model-ema-force-cpu``).

    Args:
        source: The run.
        config: The ``pretrained_cfg`` of the network, which says how images were prepared.
        num_classes: Classes of the network.
        dataset: The data set, as the Hub names it; None to tell it from the run's arguments.

    Returns:
        Top-1 and top-5 accuracy; nothing if the run did not measure these weights.
    """
    args, saved = source.train_args, source.saved
    if saved is None or saved.averaged != (saved.has_average and not args.get('model_ema_force_cpu')):
        return []
    ranked_by = f'eval_{args.get("eval_metric", "top1")}'
    height, width = config['input_size'][1:]
    row = next((
        row for row in source.summary
        if row.get('epoch') == str(saved.epoch) and math.isclose(number(row.get(ranked_by)), saved.metric)), {})
    found = {
        'top1': row.get('eval_top1'), 'top5': row.get('eval_top5'), 'tta': args.get('tta'),
        'img_size': width if height == width else f'{height}x{width}',
        'crop_pct': config['crop_pct'], 'interpolation': config['interpolation'],
    }
    name, kind = (dataset, dataset) if dataset else _dataset_of(args)
    return _results(found, num_classes, name, kind, str(args.get('val_split', 'validation')))


def results_of_validation(
        file: str | Path, dataset: str, network: str, parameters: Collection[int],
        num_classes: int) -> list[EvalResult]:
    """What timm's validate.py measured, from its results file.

    Args:
        file: What ``--results-file`` named, CSV or JSON.
        dataset: The data set, as the Hub names it; the file does not tell.
        network: Name of the network in timm's registry.
        parameters: How many weights the network may have had, trained or merged.
        num_classes: Classes of the network.

    Raises:
        HubError: If the file cannot be read, its result is not of this network, or the Hub takes no such name.
    """
    file = Path(file)
    rows = [row for row in _rows(file) if ':' in row['model'] or row['model'].split('.')[0] == network]
    if len(rows) != 1:
        raise HubError(f'{file} must hold one result of {network}, as validate.py writes it; it holds {len(rows)}.')
    row, = rows
    counts = sorted({round(count / 1e6, 2) for count in parameters})
    if not any(math.isclose(number(row.get('param_count')), count, abs_tol=0.006) for count in counts):
        raise HubError(
            f'{file} is of a network of {row.get("param_count")} million parameters; this one has '
            f'{" or, merged, ".join(map(str, reversed(counts)))}.')
    results = _results(row, num_classes, identifier(dataset, 'data set'), dataset, None)
    if not results:
        raise HubError(f'{file} must tell a top1 from 0 to 100, it tells {row.get("top1")!r}.')
    return results


def _results(
        found: Mapping[str, Any], num_classes: int, name: str, kind: str, split: str | None) -> list[EvalResult]:
    values = {metric: number(found.get(metric)) for metric in _METRICS}
    if not 0 <= values['top1'] <= 100:
        return []
    if not 0 <= values['top5'] <= 100 or num_classes <= 5:  # among the first five of five classes is every one
        del values['top5']
    return [
        EvalResult(
            task_type='image-classification', task_name='Image Classification', dataset_type=kind, dataset_name=name,
            dataset_split=split, metric_type='accuracy', metric_name=_METRICS[metric],
            metric_value=round(value / 100, 6),
            metric_args={key: _plain(found[key]) for key in _CONDITIONS if found.get(key)})
        for metric, value in values.items()
    ]


def _dataset_of(args: Mapping[str, Any]) -> tuple[str, str]:
    """Name of the data set of a run, and the Hub's identifier of it, or of its kind; no path beside the last name."""
    _, slash, name = str(args.get('dataset') or '').partition('/')  # such as hfds/USER/NAME; a folder has no slash
    if slash:
        return name, name
    return PureWindowsPath(str(args.get('data_dir') or args.get('data') or '')).name or 'unknown', 'imagefolder'


def _rows(file: Path) -> list[Mapping[str, Any]]:
    if not file.is_file():
        raise HubError(f'There is no file {file}.')
    text = read_text(file).strip()
    try:
        told = json.loads(text) if text.startswith(('{', '[')) else list(csv.DictReader(text.splitlines()))
    except (ValueError, RecursionError, csv.Error) as error:
        raise HubError(f'{file} is neither CSV nor JSON: {error}.') from error
    rows = told if isinstance(told, list) else [told]
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get('model'), str)]


def _plain(value: Any) -> Any:
    """A value as JSON has it: CSV has words only."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value

"""Reading what a user wants to convert: a checkpoint from anywhere, not to be trusted.

Files are only ever read as tensors. Beyond what ``torch.load(weights_only=True)`` refuses, a file that would take more
memory than it has bytes is refused before it is unpacked.
"""
import argparse
import csv
import json
import math
import os
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml
from timm.models import load_state_dict
from torch import Tensor

from .errors import HubError

TRAINED = ('model_best.pth.tar', 'last.pth.tar')
"""Weights that timm's train.py leaves in its output folder, the ones to prefer first."""

SAVED = ('model.safetensors',)
"""Weights of a Hub folder."""

MAX_EPOCHS = 10 ** 6
"""Epochs that a run can have: what a file tells is counted and drawn."""

_MAX_TEXT = 2 ** 20
_MAX_DEPTH = 16
_MAX_YAML = 2 ** 16
"""train.py writes about 5 kB, and YAML is read slowly."""
_MAX_ALIASES = 16
"""What YAML repeats by reference, each of which may hold others: few, for what they stand for together grows fast."""


@dataclass(frozen=True)
class Saved:
    """What train.py saved beside weights.

    Attributes:
        epoch: The epoch at whose end it saved them.
        metric: What it ranks them by, of that epoch.
        has_average: Whether there are averaged weights beside those of the last step.
        averaged: Whether the average is what was read.
    """
    epoch: int
    metric: float
    has_average: bool
    averaged: bool


@dataclass(frozen=True)
class Source:
    """A checkpoint, and what lies beside it.

    Attributes:
        file: The file of weights.
        state: The weights, without what they were saved under and without prefixes.
        config: config.json of a Hub folder; empty for others.
        train_args: args.yaml of train.py; empty for others.
        summary: Rows of train.py's summary.csv.
        saved: What train.py saved beside the weights; None for others.
    """
    file: Path
    state: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    train_args: dict[str, Any] = field(default_factory=dict)
    summary: list[dict[str, str]] = field(default_factory=list)
    saved: Saved | None = None


def read_source(path: str | Path, use_ema: bool = True) -> Source:
    """Read a checkpoint file, an output folder of train.py, or a Hub folder.

    Args:
        path: The file or folder.
        use_ema: Prefer the averaged weights where a checkpoint has both.

    Raises:
        HubError: If there are no weights, or the file is broken or hostile.
    """
    path = Path(path)
    if not path.is_dir():
        return Source(path, read_weights(path, use_ema))
    file = next((path / name for name in (*TRAINED, *SAVED) if (path / name).exists()), None)
    if file is None:
        raise HubError(f'The folder {path} has no weights: looked for {", ".join((*TRAINED, *SAVED))}.')
    if file.name in SAVED:
        return Source(file, read_weights(file, use_ema), config=read_json(path / 'config.json'))
    train_args, summary = read_run(path)
    weights = read_weights(file, use_ema)
    return Source(file, weights, train_args=train_args, summary=summary, saved=_read_saved(file, use_ema))


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Read what train.py tells of a run beside its weights: args.yaml, and the rows of summary.csv, empty if missing.

    Raises:
        HubError: If a file is broken or hostile.
    """
    return _read_yaml(folder / 'args.yaml'), _read_csv(folder / 'summary.csv')


def read_weights(file: Path, use_ema: bool = True) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file.

    Args:
        file: A .safetensors file, or one that ``torch.save`` wrote.
        use_ema: Prefer the averaged weights where a checkpoint has both.

    Raises:
        HubError: If the file is missing, broken, asks for more than tensors, or unpacks to more than it holds.
    """
    _check_file(file)
    try:
        state = load_state_dict(str(file), use_ema=use_ema, weights_only=True)
    except Exception as error:
        raise HubError(_why_unreadable(file, error)) from error
    _check_tensors(state, file)
    return state


def read_epoch(file: Path) -> int:
    """Read in which epoch, counted from 0, train.py saved a checkpoint; its weights are not read.

    Raises:
        HubError: If the file is missing or broken, asks for more than tensors, or tells no epoch.
    """
    _check_file(file)
    try:
        saved = _mapped(file)
    except Exception as error:
        raise HubError(_why_unreadable(file, error)) from error
    epoch = saved.get('epoch') if isinstance(saved, dict) else None
    if type(epoch) is not int or not 0 <= epoch < MAX_EPOCHS:
        raise HubError(f'The checkpoint {file} tells no epoch: it is none that train.py saved.')
    return epoch


def _mapped(file: Path) -> Any:
    """What train.py saved, its tensors left on the disk."""
    with torch.serialization.safe_globals([argparse.Namespace]):  # train.py saves its arguments as they are
        return torch.load(file, map_location='cpu', weights_only=True, mmap=True)


def _check_file(file: Path) -> None:
    try:
        is_file = stat.S_ISREG(os.stat(file).st_mode)
    except OSError as error:
        raise HubError(f'The checkpoint {file} cannot be read: {error.strerror}.') from error
    if not is_file:
        raise HubError(f'The checkpoint {file} is no file.')
    if file.suffix != '.safetensors':
        _check_archive(file)


def _read_saved(file: Path, use_ema: bool) -> Saved | None:
    """Read what lies beside weights that were read already; the tensors stay on the disk."""
    try:
        checkpoint = _mapped(file)
    except RuntimeError:  # of a form that train.py does not write
        return None
    epoch, metric = (checkpoint.get(name) for name in ('epoch', 'metric'))
    if type(epoch) is not int or not isinstance(metric, float):
        return None
    has_average = checkpoint.get('state_dict_ema') is not None
    return Saved(epoch, metric, has_average, averaged=use_ema and has_average)


def _check_archive(file: Path) -> None:
    """Refuse an archive that ``torch.save`` would not have written: packed entries, or entries on top of each other."""
    if not zipfile.is_zipfile(file):
        return
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise HubError(f'The checkpoint {file} is a broken archive: {error}.') from error
    for entry in entries:
        name = PurePosixPath(entry.filename)
        if name.is_absolute() or '..' in name.parts or '\\' in entry.filename or ':' in entry.filename:
            raise HubError(
                f'The checkpoint {file} is refused: it has an entry named {entry.filename!r}, which points out of it.')
        if entry.compress_type != zipfile.ZIP_STORED:
            raise HubError(
                f'The checkpoint {file} is refused: its entry {entry.filename!r} is packed '
                f'({entry.compress_size} bytes for {entry.file_size}), which torch.save never does.')
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size:
        raise HubError(
            f'The checkpoint {file} is refused: its entries claim {unpacked} bytes, the file has {size}.')


def _check_tensors(state: Mapping[str, Any], file: Path) -> None:
    if not state:
        raise HubError(f'The checkpoint {file} holds nothing.')
    size = file.stat().st_size
    claimed = 0
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise HubError(
                f'The checkpoint {file} is no state dict: under {key!r} it has a {type(value).__name__}, not a tensor.')
        if value.layout is not torch.strided or value.is_quantized or value.device.type != 'cpu':
            raise HubError(
                f'The checkpoint {file} is refused: {key!r} is no plain tensor ({value.layout}, {value.device.type}).')
        claimed += value.numel() * value.element_size()
        if claimed > size:
            raise HubError(
                f'The checkpoint {file} is refused: its tensors up to {key!r}, {tuple(value.shape)}, claim {claimed} '
                f'bytes, the file has {size}.')


def _why_unreadable(file: Path, error: Exception) -> str:
    line = str(error).strip().split('\n')[0] or type(error).__name__
    if 'weights_only' in line:
        return (
            f'The checkpoint {file} is refused: it is a pickle that asks for more than tensors, which could run code. '
            f'{line} Nothing of it was run. If you trust where it comes from, load it yourself and save the weights '
            f'alone: torch.save(checkpoint["model"], FILE).')
    return f'The checkpoint {file} cannot be read, it is cut short or of another kind: {line}'


def read_text(file: Path, most: int = _MAX_TEXT) -> str:
    """Read a file of modest size; nothing if there is none.

    Raises:
        HubError: If it is larger than ``most`` bytes, or no text.
    """
    if not file.is_file():
        return ''
    if file.stat().st_size > most:
        raise HubError(f'{file} is refused: it is larger than {most} bytes.')
    try:
        return file.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise HubError(f'{file} cannot be read: {error}.') from error


def read_json(file: Path) -> dict[str, Any]:
    """Read names and values from a JSON file; none if there is no such file.

    Raises:
        HubError: If it is no JSON, or holds something else.
    """
    try:
        return _mapping(json.loads(read_text(file) or '{}'), file)
    except (ValueError, RecursionError) as error:
        raise HubError(f'{file} is no JSON: {_one_line(error)}.') from error


class _FewAliases(yaml.SafeLoader):
    """Plain values only, of which few stand for others."""
    aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Make a node of the next event, one more of which may be an alias."""
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > _MAX_ALIASES:
            raise yaml.YAMLError(f'more than {_MAX_ALIASES} aliases')
        return super().compose_node(parent, index)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        return _mapping(yaml.load(read_text(file, _MAX_YAML), _FewAliases) or {}, file)
    except HubError:
        raise
    except Exception as error:  # PyYAML's constructors raise whatever a wrong scalar makes them
        raise HubError(f'{file} is no YAML of plain values: {_one_line(error)}.') from error


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split())[:200] or type(error).__name__


def _mapping(value: Any, file: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise HubError(f'{file} must hold names and values, it holds a {type(value).__name__}.')
    if not _is_modest(value, _MAX_DEPTH):
        raise HubError(f'{file} is refused: it nests more than {_MAX_DEPTH} deep, or has integers of over 64 bits.')
    return value


def _is_modest(value: Any, levels: int) -> bool:
    """Whether a value can be compared, printed and written again: few levels deep, without endless integers."""
    if isinstance(value, int):
        return abs(value) < 2 ** 63
    if not isinstance(value, (dict, list)):
        return True
    items = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_modest(item, levels - 1) for item in items)


def _read_csv(file: Path) -> list[dict[str, str]]:
    try:
        rows = list(csv.DictReader(read_text(file).splitlines()))
    except csv.Error as error:
        raise HubError(f'{file} is no table: {error}.') from error
    # a run that was resumed with other metrics leaves rows of another length
    return [{k: v for k, v in row.items() if isinstance(k, str) and isinstance(v, str)} for row in rows]


def number(value: Any) -> float:
    """A number as a file tells it; NaN where it tells none."""
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        return math.nan

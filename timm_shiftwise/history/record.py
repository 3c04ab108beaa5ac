"""The masks of a run, epoch by epoch, in a file: train.py removes the checkpoints that they are read from."""
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from timm_shiftwise.ops.files import replacing

Stamp = tuple[int, int]
"""When a file was written, in nanoseconds, and its size: another one of the same name differs in these."""

_IDENTITY = 'timm_shiftwise run'
Shapes = Sequence[Sequence[int]]


class RecordError(RuntimeError):
    """A file does not hold the masks of this run: the message names it, and says what to do."""


@dataclass(frozen=True)
class Epoch:
    """What a run kept at the end of an epoch.

    Attributes:
        number: The epoch, counted from 0 as train.py does.
        step: Optimiser steps that the schedule had counted.
        stamp: Of the checkpoint that it was read from.
        masks: Which small kernels each path of each operator kept, bool [P, C, K]; P is 1 where paths are merged.
    """
    number: int
    step: int
    stamp: Stamp
    masks: tuple[np.ndarray, ...]


def read_record(file: Path, identity: Mapping[str, Any], shapes: Shapes) -> dict[int, Epoch]:
    """Read the epochs that a file holds, by number; none if there is no such file.

    Args:
        file: The file.
        identity: What tells the run from others.
        shapes: Shapes [P, C, K] of the masks of its operators.

    Raises:
        RecordError: If the file is of another run, or broken.
    """
    if not file.exists():
        return {}
    advice = 'Remove it, or name another page by --output.'
    try:
        with safe_open(file, 'np') as stored:
            known = json.loads((stored.metadata() or {}).get(_IDENTITY, 'null'))
            if not isinstance(known, dict):
                raise RecordError(f'{file} is no record of a run: it is not written over. {advice}')
            wrong = [key for key in identity if known.get(key) != identity[key]]
            if wrong:
                raise RecordError(
                    f'{file} is the record of another run: its {wrong[0]} is {known.get(wrong[0])!r}, that of this run '
                    f'{identity[wrong[0]]!r}. {advice}')
            epochs, bits = stored.get_tensor('epochs'), stored.get_tensor('masks')
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise RecordError(f'{file} cannot be read: {error}. {advice}') from error
    size = sum(map(math.prod, shapes))
    if epochs.dtype != np.int64 or bits.dtype != np.uint8 or epochs.shape != (len(bits), 4) or (
            bits.shape[1:] != (math.ceil(size / 8),)):
        raise RecordError(
            f'{file} is broken: {epochs.dtype} {epochs.shape} and {bits.dtype} {bits.shape} are no masks of {size} '
            f'groups. {advice}')
    return {
        int(number): Epoch(int(number), int(step), (int(time), int(length)), _unpacked(row, shapes))
        for (number, step, time, length), row in zip(epochs, bits, strict=True)
    }


def write_record(file: Path, identity: Mapping[str, Any], epochs: Iterable[Epoch]) -> None:
    """Write epochs, at least one, as a file beside its place that is renamed when whole.

    Raises:
        OSError: If it cannot be written.
    """
    rows = [(each.number, each.step, *each.stamp) for each in epochs]
    bits = [np.packbits(np.concatenate([mask.ravel() for mask in each.masks])) for each in epochs]
    tensors: dict[str, np.ndarray] = {'epochs': np.array(rows, dtype=np.int64), 'masks': np.stack(bits)}
    with replacing(file) as partial:
        # written by us, not by safetensors, which would keep it from everybody else
        partial.write_bytes(save(tensors, metadata={_IDENTITY: json.dumps(identity)}))


def _unpacked(row: np.ndarray, shapes: Shapes) -> tuple[np.ndarray, ...]:
    sizes = [math.prod(shape) for shape in shapes]
    parts = np.split(np.unpackbits(row, count=sum(sizes)).astype(bool), np.cumsum(sizes)[:-1])
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))

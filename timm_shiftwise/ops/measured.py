"""Which of equal procedures is the fastest on this device: timed once for every shape, then kept for the process.

Timing is for devices other than CPUs, where ``torch.backends.cudnn.benchmark`` is on, as timm's scripts have it. With
deterministic algorithms asked for, while a compiler traces and while a CUDA graph is captured, nothing is timed and
nothing that was timed counts. Every process times for itself: those of a distributed run may choose differently, which
changes results by no more than rounding.

A file that the environment variable ``TIMM_SHIFTWISE_CHOICES`` names keeps the choices: it is written after every
timing, and what it holds is not timed again, so that a resumed run takes the same ways, without which it would not be
the same bit for bit. In a distributed run every process but the first has a file of its own, with its rank in the name.
"""
import json
import logging
import math
import os
import statistics
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .files import replacing

_logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = 'TIMM_SHIFTWISE_CHOICES'
MOST_SIZES = 8
"""Sizes of one layer's map that are timed; for further ones, as detection feeds them, the nearest of them decides."""
ROUNDS = 5
"""Runs of each candidate that are timed, in turns, after one that is not."""


class Layer(NamedTuple):
    """What a choice is for, but for the size of the map.

    Attributes:
        device: Name of the device.
        dtype: Of the map, as ``'bfloat16'``.
        direction: ``'forward'``, ``'backward'``, or ``'merged'`` for the merged form.
        padding: ``'full'`` or ``'same'``.
        channels: C.
        focus_length: M in pixels, or the long side of the merged kernels.
        kernel_size: N in pixels, or their short side.
    """
    device: str
    dtype: str
    direction: str
    padding: str
    channels: int
    focus_length: int
    kernel_size: int


class Size(NamedTuple):
    """Size of a map [B, C, H, W] without its channels."""
    batch: int
    height: int
    width: int

    def distance(self, other: 'Size') -> float:
        """How far from another, by the ratios of the sides."""
        return sum(abs(math.log(max(a, 1) / max(b, 1))) for a, b in zip(self, other, strict=True))


class Answer(NamedTuple):
    """Which candidate is the fastest.

    Attributes:
        name: Of the candidate.
        reason: A clause that explains it, for people.
    """
    name: str
    reason: str

    def refused(self, obstacle: str) -> ValueError:
        """The error for a choice of the file that cannot be followed."""
        return ValueError(f'The choice {self.name!r} of {ENVIRONMENT_VARIABLE} cannot be followed: {obstacle}.')


def may_measure(x: Tensor) -> bool:
    """Whether a choice for a tensor is to be made by timing now."""
    return (
        not torch.compiler.is_compiling() and torch.backends.cudnn.benchmark and is_timed(x.device)
        and not isinstance(x, FakeTensor) and not torch.are_deterministic_algorithms_enabled()
        and not (x.device.type == 'cuda' and torch.cuda.is_current_stream_capturing()))


def is_timed(device: torch.device) -> bool:
    """Whether choices are timed on a device: CPUs have a table, and on the meta device nothing runs."""
    return device.type not in ('cpu', 'meta')


def layer_of(x: Tensor, direction: str, padding: str, focus_length: int, kernel_size: int) -> tuple[Layer, Size]:
    """What a choice for a map [B, C, H, W] is for."""
    batch, channels, height, width = x.shape
    layer = Layer(
        _device_name(x.device), str(x.dtype).removeprefix('torch.'), direction, padding, channels, focus_length,
        kernel_size)
    return layer, Size(batch, height, width)


@lru_cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type


def event_milliseconds(function: Callable[[], Any], device: torch.device) -> float:
    """Time of a call on a device, by events."""
    begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


class Choices:
    """Choices that were timed, or read from the file.

    Args:
        timer: Milliseconds of a call on a device.
    """

    def __init__(self, timer: Callable[[Callable[[], Any], torch.device], float] = event_milliseconds) -> None:
        self.timer = timer
        self._timed: dict[Layer, dict[Size, dict[str, float]]] | None = None
        self._lock = threading.RLock()

    def fastest(
            self, layer: Layer, size: Size, device: torch.device,
            candidates: Callable[[], Mapping[str, Callable[[], Any]]]) -> Answer | None:
        """The fastest of equal candidates for a map, timed if need be.

        Args:
            layer: What it is for.
            size: Size of the map.
            device: Where the candidates run.
            candidates: Gives them by name; called only where they are to be timed.

        Returns:
            The choice; None if no candidate had enough memory.

        Raises:
            ValueError: If the file that the environment names holds something else.
            OSError: If it cannot be read or written.
        """
        with self._lock:
            sizes = self._read().setdefault(layer, {})
            if size not in sizes and len(sizes) < MOST_SIZES:
                sizes[size] = self._time(candidates(), device)
                _logger.info('Timed for %s of %s, in ms: %s', layer, size, sizes[size] or 'all were out of memory')
                self._write()
            nearest = min(sizes, key=size.distance)
            timed = sizes[nearest]
            if not timed:
                return None
            name = min(timed, key=timed.__getitem__)
            place = ' x '.join(map(str, nearest)) + ('' if nearest == size else ', the nearest size')
            return Answer(name, f'the fastest of {len(timed)} that were timed on {layer.device} at {place}')

    def records(self) -> list[dict[str, Any]]:
        """All choices, as the file holds them."""
        with self._lock:
            return [
                {
                    **layer._asdict(), **size._asdict(), 'way': min(timed, key=timed.__getitem__, default=None),
                    'milliseconds': timed,
                }
                for layer, sizes in self._read().items() for size, timed in sizes.items()]

    @torch.no_grad()
    def _time(self, candidates: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
        """Median milliseconds of the candidates, without those that ran out of memory."""
        taken: dict[str, list[float]] = {name: [] for name in candidates}
        for _turn in range(1 + ROUNDS):
            for name in list(taken):
                try:
                    taken[name].append(self.timer(candidates[name], device))
                except torch.OutOfMemoryError:
                    del taken[name]
        return {name: round(statistics.median(times[1:]), 4) for name, times in taken.items()}

    def _read(self) -> dict[Layer, dict[Size, dict[str, float]]]:
        if self._timed is None:
            self._timed = {}
            own = _file()
            # a process that has no file yet starts from that of the first
            path = own if own is None or own.exists() else Path(os.environ[ENVIRONMENT_VARIABLE])
            if path is not None and path.exists():
                try:
                    for record in json.loads(path.read_text(encoding='utf-8')):
                        layer = Layer(*(record[name] for name in Layer._fields))
                        size = Size(*(record[name] for name in Size._fields))
                        self._timed.setdefault(layer, {})[size] = dict(record['milliseconds'])
                except (ValueError, TypeError, KeyError) as error:
                    self._timed = None
                    raise ValueError(
                        f'{path}, which {ENVIRONMENT_VARIABLE} names, must hold choices that were written to it, '
                        f'got {error!r}.') from error
        return self._timed

    def _write(self) -> None:
        path = _file()
        if path is not None:
            with replacing(path) as partial:
                partial.write_text(json.dumps(self.records(), indent=1) + '\n', encoding='utf-8')


def _file() -> Path | None:
    """The file of this process, if the environment names one."""
    name, rank = os.environ.get(ENVIRONMENT_VARIABLE), os.environ.get('RANK', '0')
    if not name:
        return None
    path = Path(name)
    return path if rank == '0' else path.with_name(f'{path.stem}.rank{rank}{path.suffix}')


CHOICES = Choices()
"""Those of this process."""

"""Timing operators against SLaK's large kernels, in one run.

Source: Shift-ConvNets (arXiv 2401.12736), Table 5.
"""
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from timm_shiftwise.layers import LargeKernelConv2d, MergedShiftConv2d, ShiftwiseConv2d
from timm_shiftwise.sparsity.masks import random_mask, uniform_counts

from .kept import check_network, stage_blocks
from .operators import block_operator, operator_shape

DENSITIES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Kept shares that are timed unless others are asked for."""

_WARM_UP = 2


@dataclass(frozen=True)
class OperatorTime:
    """Time of an operator at one density.

    Attributes:
        density: Share of the groups that is kept; 1 for large kernels.
        milliseconds: Median time of a forward pass.
        ratio: How many times that long SLaK's operator takes.
    """
    density: float
    milliseconds: float
    ratio: float


@dataclass(frozen=True)
class StageTime:
    """Times of one stage's operator.

    Attributes:
        stage: Number of the stage, from 1.
        large_kernel_milliseconds: Median time of a forward pass of SLaK's operator: the N x M, the M x N and the N x N
            convolution as PyTorch runs them, with their BatchNorms.
        spread: How many times the lower quartile of an operator's times the upper one is, of that where it is most;
            far above 1 on a machine that does something else meanwhile.
        operators: The stage's first operator at each density.
    """
    stage: int
    large_kernel_milliseconds: float
    spread: float
    operators: tuple[OperatorTime, ...]


def time_operators(
        model: nn.Module, sizes: Sequence[tuple[int, int]], *, densities: Sequence[float] = DENSITIES,
        batch_size: int = 1, repeats: int = 10, device: str | torch.device = 'cpu') -> Iterator[StageTime]:
    """Time the first operator of each stage, forward in evaluation mode, beside SLaK's of the same width, M and N.

    The operators of a stage take turns, so that whatever slows the machine down slows them alike; the ratios are of
    medians. Groups are pruned at random, alike in every run.

    Args:
        model: A network of this package that does not lie on the ``meta`` device; it stays as it is.
        sizes: Height and width of each stage's map.
        densities: Kept shares to time, above 0 up to 1. An operator that is as fast whatever is kept, of large
            kernels or merged to them, is timed once.
        batch_size: Images in a batch.
        repeats: Turns.
        device: Where to run.

    Yields:
        The times of one stage after the other.

    Raises:
        TypeError: If the model is no network of this package.
        ValueError: If an argument is out of its range.
    """
    blocks = stage_blocks(check_network(model))
    if len(sizes) != len(blocks):
        raise ValueError(f'sizes must have one entry for each of {len(blocks)} stages, got {len(sizes)}.')
    if not densities or any(not 0 < density <= 1 for density in densities):
        raise ValueError(f'densities must be above 0 and at most 1, got {tuple(densities)!r}.')
    for name, value in (('batch_size', batch_size), ('repeats', repeats)):
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}.')
    return _time_stages(blocks, sizes, densities, batch_size, repeats, torch.device(device))


def _time_stages(
        blocks: list[list[nn.Module]], sizes: Sequence[tuple[int, int]], densities: Sequence[float], batch_size: int,
        repeats: int, device: torch.device) -> Iterator[StageTime]:
    for number, (stage, (height, width)) in enumerate(zip(blocks, sizes, strict=True), start=1):
        operator = block_operator(stage[0])
        dim, _, _, focus_length, kernel_size = operator_shape(operator)
        if isinstance(operator, (ShiftwiseConv2d, MergedShiftConv2d)):
            shares: Sequence[float] = densities
            timed: list[nn.Module] = [_pruned(operator, density) for density in densities]
        else:
            shares, timed = [1.], [copy.deepcopy(operator)]
        with torch.random.fork_rng(devices=[]):
            slak = LargeKernelConv2d(dim, focus_length, kernel_size)
        x = torch.randn(batch_size, dim, height, width, generator=torch.Generator().manual_seed(0)).to(device)
        times = take_turns([module.to(device).eval() for module in (slak, *timed)], x, repeats)
        baseline, *medians = [statistics.median(taken) for taken in times]
        yield StageTime(number, baseline, max(_spread(taken) for taken in times), tuple(
            OperatorTime(share, median, baseline / median) for share, median in zip(shares, medians, strict=True)))


def _pruned(operator: ShiftwiseConv2d | MergedShiftConv2d, density: float) -> ShiftwiseConv2d | MergedShiftConv2d:
    """A copy of an operator with weights of its own, of whose groups a share is kept."""
    copied = copy.deepcopy(operator).float()
    *_, channels, maps, _, _ = shape = copied.kernels.shape
    count, = uniform_counts([channels * maps], 1 - density)
    with torch.no_grad():
        copied.kernels.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * .02)
        copied.group_mask.copy_(random_mask((channels, maps), count, seed=0, step=0, layer=0))
    return copied


@torch.inference_mode()
def take_turns(modules: Sequence[nn.Module], x: Tensor, repeats: int) -> list[list[float]]:
    """Milliseconds of each module's forward passes, one of every module in each turn."""
    return time_calls([partial(module, x) for module in modules], x.device, repeats)


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int) -> list[list[float]]:
    """Milliseconds of each call on a device, one of every call in each turn."""
    for call in calls:
        for _ in range(_WARM_UP):
            call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, times, strict=True):
            taken.append(_milliseconds(call, device))
    return times


def _spread(taken: list[float]) -> float:
    if len(taken) < 2:
        return 1.
    lower, _, upper = statistics.quantiles(taken, n=4, method='inclusive')
    return upper / lower


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    call()
    _wait_for(device)
    return 1000 * (time.perf_counter() - start)


def _wait_for(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)

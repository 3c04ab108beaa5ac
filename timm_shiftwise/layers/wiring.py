"""Index tables of the shift-wise operator: which channels are worked on, and which group sits at which place.

The released checkpoints do not hold these tables: they follow from fixed seeds, so loading such weights needs the same
draws. All draws come from private generators; the global random state is neither read nor changed. Our own checkpoints
keep the tables as persistent buffers.

Source: Shift-ConvNets (arXiv 2401.12736), Section 3.2 (ghost split, rearranged groups).
"""
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from timm_shiftwise.geometry import num_groups

RELEASED_SEED = 123
"""Seed of the released checkpoints' tables."""

GHOST_SPLITS = ('v1', 'v2')


class Wiring(NamedTuple):
    """Index tables of one branch set; every table lies on the CPU.

    Attributes:
        horizontal: Map index of each channel at every place of the wide branch, int32 [R, C, G].
        vertical: The same for the tall branch, int32 [R, C, G].
        identity: Map index of each channel's centre branch, int32 [R, C].
        maps: K, the small kernels a channel has.
    """
    horizontal: Tensor
    vertical: Tensor
    identity: Tensor
    maps: int


@lru_cache(maxsize=64)
def split_ghost(dim: int, ghost_ratio: float, rule: str = 'v1') -> tuple[Tensor, Tensor]:
    """Choose the channels that pass through untouched.

    Args:
        dim: Number of channels.
        ghost_ratio: Share of channels that pass through, 0 up to, not including, 1.
        rule: How the share is rounded: ``'v1'`` passes ``int(dim * ratio)`` channels, ``'v2'`` works on
            ``int(dim * (1 - ratio)) // 2 * 2``.

    Returns:
        Indices of the worked-on and of the ghost channels, both int64 and ascending.

    Raises:
        ValueError: If the ratio is out of range, the rule is unknown, or no channel would be left to work on.
    """
    if not 0 <= ghost_ratio < 1:
        raise ValueError(f'ghost_ratio must be at least 0 and below 1, got {ghost_ratio}.')
    if rule not in GHOST_SPLITS:
        raise ValueError(f'ghost split must be one of {GHOST_SPLITS}, got {rule!r}.')
    if ghost_ratio == 0:
        ghosts = 0
    elif rule == 'v1':
        ghosts = int(dim * ghost_ratio)
    else:
        ghosts = dim - int(dim * (1 - ghost_ratio)) // 2 * 2
    if ghosts >= dim:
        raise ValueError(f'ghost_ratio {ghost_ratio} leaves none of {dim} channels to work on.')
    chosen = np.random.RandomState(RELEASED_SEED).choice(dim, ghosts, replace=False)
    is_ghost = np.zeros(dim, dtype=bool)
    is_ghost[chosen] = True
    return _int64(np.flatnonzero(~is_ghost)), _int64(np.flatnonzero(is_ghost))


@lru_cache(maxsize=64)
def shuffled_wiring(
        channels: int,
        focus_length: int,
        kernel_size: int,
        num_shuffles: int,
        natural_horizontal: bool = False,
) -> Wiring:
    """Branches that share their small kernels, each in an order of its own.

    Args:
        channels: Worked-on channels, C.
        focus_length: M in pixels.
        kernel_size: N in pixels.
        num_shuffles: R, how many orders are added up.
        natural_horizontal: Leave the wide branch in natural order (the paper's p-SW).

    Returns:
        The tables, with K = G maps a channel.

    Raises:
        ValueError: If the number of shuffles is below 1.
    """
    if num_shuffles < 1:
        raise ValueError(f'num_shuffles must be at least 1, got {num_shuffles}.')
    groups = num_groups(focus_length, kernel_size)
    generator = torch.Generator(device='cpu').manual_seed(RELEASED_SEED)

    def orders() -> Tensor:
        rows = [
            torch.randperm(groups, generator=generator, device='cpu')
            for _ in range(num_shuffles * channels)
        ]
        return torch.stack(rows).view(num_shuffles, channels, groups).int()

    horizontal, vertical = orders(), orders()
    picks = [torch.randint(0, groups, [channels], generator=generator, device='cpu') for _ in range(num_shuffles)]
    if natural_horizontal:
        horizontal = _natural_order(channels, 0, groups).expand(num_shuffles, -1, -1).contiguous()
    return Wiring(horizontal, vertical, torch.stack(picks).int(), groups)


@lru_cache(maxsize=64)
def separate_wiring(channels: int, focus_length: int, kernel_size: int) -> Wiring:
    """Branches with small kernels of their own, in natural order (the paper's eq-SLaK).

    A channel has K = 2 * G + 1 maps: the wide kernel's G pieces, the tall kernel's G pieces, the square kernel.

    Args:
        channels: Worked-on channels, C.
        focus_length: M in pixels.
        kernel_size: N in pixels.

    Returns:
        The tables, with R = 1.
    """
    groups = num_groups(focus_length, kernel_size)
    identity = torch.full([1, channels], 2 * groups, dtype=torch.int32, device='cpu')
    return Wiring(_natural_order(channels, 0, groups), _natural_order(channels, groups, groups), identity, 2 * groups +
    1)


def _natural_order(channels: int, first: int, groups: int) -> Tensor:
    order = torch.arange(first, first + groups, dtype=torch.int32, device='cpu')
    return order.expand(1, channels, groups).contiguous()


def _int64(indices: np.ndarray) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64, device='cpu')

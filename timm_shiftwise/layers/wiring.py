"""Index tables of the shift-wise operator: which channels are worked on, and which group sits at which place.

The released checkpoints do not hold these tables: they follow from fixed seeds, so loading such weights needs the same
draws. All draws come from private generators; the global random state is neither read nor changed. Our own checkpoints
keep the table as a persistent buffer.

Source: Shift-ConvNets (arXiv 2401.12736), Section 3.2 (ghost split, rearranged groups).
"""
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from timm_shiftwise.geometry import num_groups
from timm_shiftwise.ops.checks import index_outside

RELEASED_SEED = 123
"""Seed of the released checkpoints' tables."""

OPERATORS = ('sw', 'p_sw', 'eq_slak', 'slak')
"""Operators, the last of large kernels and not of small ones."""

GHOST_SPLITS = ('v1', 'v2')


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
def stream_order(dim: int, ghost_ratio: float, rule: str = 'v1') -> Tensor:
    """Channels of a stage in the order its maps have them: those worked on, then the ghosts; int64 [dim].

    Element ``i`` is the place that the released checkpoints give to channel ``i``. Arguments: :func:`split_ghost`.
    """
    return torch.cat(split_ghost(dim, ghost_ratio, rule))


def num_maps(operator: str, focus_length: int, kernel_size: int) -> int:
    """K, the small kernels of a channel: G where the branches share them, else 2 * G + 1; none for ``'slak'``."""
    groups = num_groups(focus_length, kernel_size)
    return {'eq_slak': 2 * groups + 1, 'slak': 0}.get(operator, groups)


@lru_cache(maxsize=64)
def released_wiring(
        operator: str, channels: int, focus_length: int, kernel_size: int, num_shuffles: int,
        single_centre: bool = False) -> Tensor:
    """Which small kernel lies at every place of the three branches, as in the released checkpoints.

    Args:
        operator: ``'sw'`` (an order of its own for each channel, in the wide and in the tall branch, and a random
            kernel in the centre branch), ``'p_sw'`` (the same, the wide branch in natural order) or ``'eq_slak'`` (the
            wide kernel's G pieces, the tall kernel's G pieces, the square kernel).
        channels: Worked-on channels, C.
        focus_length: M in pixels.
        kernel_size: N in pixels.
        num_shuffles: R, how many orders are added up; 1 for ``'eq_slak'``.
        single_centre: Put one and the same kernel of a channel into the centre branch in every order; the released
            checkpoints draw one for each order.

    Returns:
        Kernel index at every place of the wide branch, then of the tall branch, then of the centre branch; int32
        [R, C, 2 * G + 1] on the CPU.

    Raises:
        ValueError: If the number of shuffles does not fit.
    """
    if num_shuffles < 1:
        raise ValueError(f'num_shuffles must be at least 1, got {num_shuffles}.')
    groups = num_groups(focus_length, kernel_size)
    if operator == 'eq_slak':
        if num_shuffles != 1:
            raise ValueError(f"num_shuffles must be 1 for operator 'eq_slak', got {num_shuffles}.")
        return torch.arange(2 * groups + 1, dtype=torch.int32, device='cpu').repeat(1, channels, 1)
    generator = torch.Generator(device='cpu').manual_seed(RELEASED_SEED)

    def orders() -> Tensor:
        rows = [torch.randperm(groups, generator=generator, device='cpu') for _ in range(num_shuffles * channels)]
        return torch.stack(rows).view(num_shuffles, channels, groups)

    wide, tall = orders(), orders()
    picks = [torch.randint(0, groups, [channels], generator=generator, device='cpu') for _ in range(num_shuffles)]
    if single_centre:
        picks = picks[:1] * num_shuffles
    if operator == 'p_sw':
        wide = torch.arange(groups, device='cpu').expand_as(wide)
    return torch.cat([wide, tall, torch.stack(picks)[:, :, None]], dim=2).int()


def wrong_wiring(key: str, value: Tensor, shape: tuple[int, ...], maps: int) -> str:
    """What is wrong with a table that somebody hands in; empty if nothing. Kernels read memory by it.

    Args:
        key: What the table is called.
        value: The table.
        shape: What it must have, (R, C, 2 * G + 1).
        maps: K, small kernels of a channel. Where it is G, each order of the wide and of the tall branch must hold
            every one once; where branches have kernels of their own, each row must.
    """
    if value.dtype not in (torch.int32, torch.int64):
        return f'{key} must hold integers of 0 to {maps - 1}, it holds {value.dtype}'
    if tuple(value.shape) != shape:
        return f'{key} must have the shape {shape}, it has {tuple(value.shape)}'
    if value.is_meta:
        return ''
    table, groups = value.cpu().numpy(), shape[2] // 2
    outside = index_outside(table, maps)
    if outside:
        return f'{key} must hold integers of 0 to {maps - 1}, {outside}'
    orders = table[:, :, :2 * groups].reshape(*shape[:2], 2, groups) if maps == groups else table[:, :, None]
    wrong = np.argwhere((np.sort(orders, axis=3) != np.arange(maps)).any(axis=3)).tolist()
    if wrong:
        r, c, branch = wrong[0]
        return (
            f'{key} must hold each of 0 to {maps - 1} once in an order, got {orders[r, c, branch].tolist()} from '
            f'{[r, c, branch * groups]} on')
    return ''


def _int64(indices: np.ndarray) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64, device='cpu')

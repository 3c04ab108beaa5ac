"""Which of the equal ways computes a shift-wise convolution, and why.

``shift``
    The definition: small convolutions, whose K-times-larger maps are shifted and added.
``merged``
    One wide, one tall and one square kernel, assembled from the small ones (:mod:`.merged`). Only for full padding.
``fused``
    Small convolutions, shifts and additions in one Taichi kernel that skips pruned groups (:mod:`.taichi_impl`). Only
    on the CPU.
"""
import os
from typing import NamedTuple

from torch import Tensor

from timm_shiftwise.ops.backend import choose_backend, explain_backend, requested_backend

WAYS = ('shift', 'merged', 'fused')
ENVIRONMENT_VARIABLE = 'TIMM_SHIFTWISE_WAY'


class Choice(NamedTuple):
    """A way and the reason for it.

    Attributes:
        way: One of :data:`WAYS`.
        reason: A clause that explains the choice, for people.
    """
    way: str
    reason: str


def choose_way(
        x: Tensor,
        weight: Tensor,
        padding: str,
        backend: str | None = None,
        mask: Tensor | None = None,
        backward: bool = False,
) -> Choice:
    """Choose how to compute a shift-wise convolution or its gradients.

    Args:
        x: Input [B, C, H, W].
        weight: Small kernels [C, K, N, N].
        padding: ``'full'`` or ``'same'``.
        backend: Backend asked for in the call.
        mask: Kept groups, bool [C, K]; None keeps all.
        backward: Whether the gradients are to be computed.

    Returns:
        The way and the reason.

    Raises:
        ValueError: If the environment variable ``TIMM_SHIFTWISE_WAY`` names no way, or one that does not fit.
        RuntimeError: If the backend asked for cannot run.
    """
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    if asked:
        _check_asked(asked, x, padding)
        if asked == 'fused':
            choose_backend('taichi', x.device)
        return Choice(asked, f'{ENVIRONMENT_VARIABLE} asks for it')
    requested, source = requested_backend(backend)
    if requested == 'auto' and x.device.type != 'cpu':
        if padding == 'full':
            return Choice('merged', f'the fused kernel is made for CPUs, and nothing was measured on {x.device.type}')
        return Choice('shift', 'windows dropped at the border cannot be merged')
    if choose_backend(backend, x.device) == 'torch':
        reason = explain_backend(backend, x.device).reason
        if padding == 'full':
            return Choice('merged', f'the fastest in PyTorch ({reason})')
        return Choice('shift', f'windows dropped at the border cannot be merged, in PyTorch ({reason})')
    if requested == 'taichi':
        return Choice('fused' if x.device.type == 'cpu' else 'shift', f'{source} asks for Taichi')
    if weight.shape[2] > _LARGEST_UNROLLED:
        way = 'merged' if padding == 'full' else 'shift'
        return Choice(way, f'the fused kernel is made for kernels up to {_LARGEST_UNROLLED} x {_LARGEST_UNROLLED}')
    if padding != 'full':
        return Choice('fused', 'windows dropped at the border cannot be merged')
    density = 1. if mask is None else float(mask.float().mean())
    limit = fused_limit(x.shape[2] * x.shape[3], backward)
    if density <= limit:
        return Choice('fused', f'{density:.0%} of the groups are kept; up to {limit:.0%} it is faster on such maps')
    return Choice('merged', f'{density:.0%} of the groups are kept; beyond {limit:.0%} it is faster on such maps')


# Medians in ms of the fused | the merged way by share of kept groups; N = 5, R = 4, float32, batch 4, two Zen 5 cores.
#
#        map, channels   forward: 1.0       0.3        0.1       backward: 1.0         0.6        0.3       0.1
#        56 x 56,  74    19.4 | 7.9  6.4 | 5.1  3.1 | 5.1      24.2 | 27.0 15.4 | 19.7 10.9 | 19.5 6.6 | 20.1
#        28 x 28, 148     7.5 | 1.9  3.2 | 1.9  2.1 | 2.0      17.0 | 10.0  9.1 |  9.4  5.7 | 11.9 4.0 |  8.9
#        14 x 14, 296     5.8 | 0.9  2.6 | 0.9  1.5 | 0.9      15.6 |  4.3 14.4 |  4.3  4.9 |  4.5 3.0 |  4.4
#         7 x  7, 592     2.3 | 0.5  1.3 | 0.5  0.8 | 0.5       3.4 |  3.1  2.7 |  2.9  2.0 |  3.0 1.5 |  3.0
#
# Rows: pixels of a map from which they hold, and the share up to which the fused way was the faster one.
_FORWARD_LIMITS = ((2000, 0.2), (0, 0.))
_BACKWARD_LIMITS = ((2000, 1.), (500, 0.6), (100, 0.25), (0, 0.7))
_LARGEST_UNROLLED = 7
"""Kernel size up to which the fused way, which is unrolled over the kernel, compiles in reasonable time."""


def fused_limit(pixels: int, backward: bool) -> float:
    """Share of kept groups up to which the fused way is the faster one on maps of that many pixels."""
    limits = _BACKWARD_LIMITS if backward else _FORWARD_LIMITS
    return next(limit for least, limit in limits if pixels >= least)


def _check_asked(asked: str, x: Tensor, padding: str) -> None:
    if asked not in WAYS:
        raise ValueError(f'{ENVIRONMENT_VARIABLE} must be one of {WAYS}, got {asked!r}.')
    if asked == 'merged' and padding != 'full':
        raise ValueError(f"{ENVIRONMENT_VARIABLE}='merged' needs padding 'full', got {padding!r}.")
    if asked == 'fused' and x.device.type != 'cpu':
        raise ValueError(f"{ENVIRONMENT_VARIABLE}='fused' needs tensors on the CPU, got {x.device}.")

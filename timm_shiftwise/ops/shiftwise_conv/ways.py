"""Which of the equal ways computes a shift-wise convolution, and why.

``shift``
    The definition: small convolutions, whose K-times-larger maps are shifted and added.
``merged``
    One wide, one tall and one square kernel, assembled from the small ones (:mod:`.merged`). Only for full padding.
``large``
    The merged way, its gradients in one Taichi kernel (:mod:`.taichi_large`). Only for full padding, on the CPU, for
    kernels of up to 7 x 7.
``fused``
    Small convolutions, shifts and additions in one Taichi kernel that skips pruned groups (:mod:`.taichi_impl`). Only
    on the CPU.
"""
import os
from typing import NamedTuple

from torch import Tensor

from timm_shiftwise.ops.backend import choose_backend, explain_backend, requested_backend

WAYS = ('shift', 'merged', 'large', 'fused')
_IN_TAICHI = ('large', 'fused')
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
        _check_asked(asked, x, padding, weight.shape[2])
        if asked in _IN_TAICHI:
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
        return Choice(way, _TOO_LARGE)
    if padding != 'full':
        return Choice('fused', 'windows dropped at the border cannot be merged')
    density = 1. if mask is None else float(mask.float().mean())
    limit, otherwise = limits(x.shape[2] * x.shape[3], backward)
    if density <= limit:
        return Choice('fused', f'{density:.0%} of the groups are kept; up to {limit:.0%} it is faster on such maps')
    return Choice(otherwise, f'{density:.0%} of the groups are kept; beyond {limit:.0%} it is faster on such maps')


# Medians in ms by share of kept groups; N = 5, R = 4, float32, batch 4, two Zen 5 cores, with an allocator that keeps
# what is freed. The fused way is as dear as its share; the others are not, and the large one has no forward of its own.
#
#                              forward: fused                 merged  backward: fused               merged  large
#        map, channels         1.0   0.7   0.5   0.3   0.1             1.0   0.7   0.5   0.3   0.1
# 16     56 x 56,  74         10.1   7.9   6.0   4.4   2.3     5.0    15.3  11.7   9.5   7.2   4.7   18.5   14.1
# lanes  28 x 28, 148          5.6   4.5   3.7   2.8   1.7     2.2     9.2   7.2   5.8   4.5   3.2    8.8    6.3
#        14 x 14, 296          5.1   4.3   3.4   2.6   1.5     0.9     9.0   7.0   5.6   4.2   2.8    3.7    3.1
#         7 x  7, 592          2.4   2.1   1.7   1.4   0.9     0.5     3.1   2.7   2.4   2.1   1.8    2.7    2.4
# 8      56 x 56,  74         12.9   9.9   7.6   5.3   2.6     5.0    23.1  17.2  13.3   9.3   5.3   16.7   26.7
# lanes  28 x 28, 148          7.3   5.8   4.5   3.2   1.8     2.2    12.4   9.4   7.5   5.4   3.5    8.6   10.1
#        14 x 14, 296          5.8   4.7   3.8   2.7   1.6     1.0    10.4   8.0   6.3   4.7   3.0    4.0    4.0
#         7 x  7, 592          2.3   2.0   1.7   1.3   0.8     0.6     3.4   2.9   2.4   2.0   1.6    2.7    2.7
#
# By lanes and direction, rows of: pixels of a map from which they hold, and the share up to which the fused way was the
# fastest; and which way is taken beyond it.
_LIMITS = {
    (16, False): (((2000, 0.37), (500, 0.18), (0, 0.)), 'merged'),
    (16, True): (((2000, 0.9), (500, 0.57), (100, 0.14), (0, 0.5)), 'large'),
    (8, False): (((2000, 0.28), (500, 0.16), (0, 0.)), 'merged'),
    (8, True): (((2000, 0.67), (500, 0.6), (100, 0.22), (0, 0.6)), 'merged'),
}
_LARGEST_UNROLLED = 7
"""Kernel size up to which the fused way, which is unrolled over the kernel, compiles in reasonable time."""
_TOO_LARGE = f'the fused kernel is made for kernels up to {_LARGEST_UNROLLED} x {_LARGEST_UNROLLED}'


def limits(pixels: int, backward: bool) -> tuple[float, str]:
    """Share of kept groups up to which the fused way is the fastest on maps of that many pixels, and the way beyond."""
    from timm_shiftwise.ops.taichi_lanes import LANES

    rows, otherwise = _LIMITS[LANES, backward]
    return next(limit for least, limit in rows if pixels >= least), otherwise


# The same for the whole operator at inference, 56 x 56 and 96 channels with ghosts, in ms: fused 15.0 (all groups
# kept), 8.0 (0.7), 6.4 (0.5), 4.5 (0.3), 2.6 (0.1) with 16 lanes, 13.9, 11.6, 8.2, 5.3, 2.8 with 8; a tall and a wide
# convolution 4.6 to 4.7. On smaller maps these are the faster ones, or as fast, down to 0.1.
_INFERENCE_LIMITS = {16: ((2000, 0.3), (0, 0.)), 8: ((2000, 0.24), (0, 0.))}
_MOST_AT_INFERENCE = max(limit for rows in _INFERENCE_LIMITS.values() for _, limit in rows)


def choose_inference_way(
        x: Tensor,
        kernel_size: int,
        density: float,
        padding: str,
        backend: str | None = None,
) -> Choice:
    """Choose how to compute the operator in its form for inference.

    Args:
        x: Input [B, dim, H, W].
        kernel_size: N in pixels.
        density: Share of the small kernels that are kept.
        padding: ``'full'`` or ``'same'``.
        backend: Backend asked for.

    Returns:
        ``'fused'``: all in one Taichi kernel; ``'merged'``: a tall and a wide convolution; or ``'shift'``: the branches
        of :func:`choose_way`, each times its factor. And the reason.

    Raises:
        ValueError: If the environment variable ``TIMM_SHIFTWISE_WAY`` names no way, or one that does not fit.
        RuntimeError: If the backend asked for cannot run.
    """
    otherwise = 'merged' if padding == 'full' else 'shift'
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    if asked:
        _check_asked(asked, x, padding, kernel_size)
        if asked == 'fused':
            choose_backend('taichi', x.device)
        return Choice('fused' if asked == 'fused' else otherwise, f'{ENVIRONMENT_VARIABLE} asks for it')
    if x.device.type != 'cpu':
        return Choice(otherwise, f'the fused kernel is made for CPUs, and nothing was measured on {x.device.type}')
    if kernel_size > _LARGEST_UNROLLED:
        return Choice(otherwise, _TOO_LARGE)
    if padding == 'full' and density > _MOST_AT_INFERENCE and requested_backend(backend)[0] != 'taichi':
        # said without a look at Taichi, which costs as much as a convolution of a small map
        reason = f'{density:.0%} of the groups are kept; beyond {_MOST_AT_INFERENCE:.0%} it is faster on all maps'
        return Choice(otherwise, reason)
    if choose_backend(backend, x.device) == 'torch':
        return Choice(otherwise, f'PyTorch is used ({explain_backend(backend, x.device).reason})')
    if padding != 'full':
        return Choice('fused', 'windows dropped at the border cannot be merged')
    from timm_shiftwise.ops.taichi_lanes import LANES

    limit = next(limit for least, limit in _INFERENCE_LIMITS[LANES] if x.shape[2] * x.shape[3] >= least)
    reason = f'{density:.0%} of the groups are kept; up to {limit:.0%} the fused kernel is faster on such maps'
    return Choice('fused' if density <= limit else otherwise, reason)


def _check_asked(asked: str, x: Tensor, padding: str, kernel_size: int) -> None:
    if asked not in WAYS:
        raise ValueError(f'{ENVIRONMENT_VARIABLE} must be one of {WAYS}, got {asked!r}.')
    if asked in ('merged', 'large') and padding != 'full':
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={asked!r} needs padding 'full', got {padding!r}.")
    if asked in _IN_TAICHI and x.device.type != 'cpu':
        raise ValueError(f'{ENVIRONMENT_VARIABLE}={asked!r} needs tensors on the CPU, got {x.device}.')
    if asked == 'large' and kernel_size > _LARGEST_UNROLLED:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}='large' needs kernels of up to {_LARGEST_UNROLLED} x {_LARGEST_UNROLLED}, got "
            f'{kernel_size} x {kernel_size}.')

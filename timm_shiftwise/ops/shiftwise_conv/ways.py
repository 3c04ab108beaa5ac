"""Which of the equal ways computes a shift-wise convolution, and why.

A way is a file of this folder and a row of :data:`WAYS`:

``fused``
    Small convolutions, shifts and additions in one Taichi kernel that skips pruned groups (:mod:`.fused`).
``merged``
    One wide, one tall and one square convolution, their kernels assembled from the small ones (:mod:`.merged`).
``shift``
    The definition: small convolutions, whose K times larger maps are shifted and added (:mod:`.shift`).
"""
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor

from timm_shiftwise.ops.backend import choose_backend, requested_backend
from timm_shiftwise.ops.depthwise.frontend import LARGEST_UNROLLED
from timm_shiftwise.ops.taichi.runtime import LANES

ENVIRONMENT_VARIABLE = 'TIMM_SHIFTWISE_WAY'


class Limit(NamedTuple):
    """Up to which share of kept groups the fused way is the fastest.

    Attributes:
        pixels: H * W of the smallest map for which the row holds.
        density: That share; 0 where it never is.
    """
    pixels: int
    density: float


# Measured and printed by benchmarks/calibrate.py (two Zen 5 cores): by lanes and direction, largest maps first.
FUSED_UP_TO: dict[tuple[int, str], tuple[Limit, ...]] = {
    (16, 'forward'): (Limit(2000, 0.43), Limit(400, 0.14), Limit(0, 0.)),
    (16, 'backward'): (Limit(2000, 1.), Limit(400, 0.61), Limit(100, 0.2), Limit(0, 0.49)),
    (8, 'forward'): (Limit(2000, 0.37), Limit(400, 0.14), Limit(0, 0.)),
    (8, 'backward'): (Limit(2000, 0.76), Limit(400, 0.6), Limit(100, 0.27), Limit(0, 0.64)),
}


class Way(NamedTuple):
    """One way to compute a shift-wise convolution.

    Attributes:
        name: What users ask for it by.
        backends: What it runs in.
        obstacle: Says, of the input [B, C, H, W], N and the padding policy, what hinders it; None if nothing does.
        limit: Share of kept groups up to which it is the fastest of those that can run, of the input, the padding
            policy and the direction.
        forward: Computes the three branches; arguments as :func:`.merged.merged_conv2d`.
        backward: Computes the gradients; arguments as :func:`.merged.merged_conv2d_backward`.
    """
    name: str
    backends: tuple[str, ...]
    obstacle: Callable[[Tensor, int, str], str | None]
    limit: Callable[[Tensor, str, str], float]
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor | None, Tensor | None]]


class Choice(NamedTuple):
    """A way and the reason for it.

    Attributes:
        way: A row of :data:`WAYS`.
        reason: A clause that explains the choice, for people.
    """
    way: Way
    reason: str


def _at_first_call(file: str, function: str) -> Callable[..., Any]:
    """A function of a file of this folder that is imported when it is first called, as what needs Taichi must be."""
    def call(*args: Any) -> Any:
        return getattr(import_module(f'.{file}', __package__), function)(*args)
    return call


def _no_fused(x: Tensor, kernel_size: int, padding: str) -> str | None:
    if x.device.type != 'cpu':
        return f'it is made for CPUs, and the tensors are on {x.device.type}'
    if kernel_size > LARGEST_UNROLLED:
        return (
            f'it is made for kernels of up to {LARGEST_UNROLLED} x {LARGEST_UNROLLED}, not of {kernel_size} x '
            f'{kernel_size}')
    return None


def _no_merged(x: Tensor, kernel_size: int, padding: str) -> str | None:
    return None if padding == 'full' else "it needs padding 'full': windows dropped at the border cannot be merged"


def _fused_limit(x: Tensor, padding: str, direction: str) -> float:
    if padding != 'full':
        return 1.  # the shift way is slower whatever is kept
    pixels = x.shape[2] * x.shape[3]
    return next(limit.density for limit in FUSED_UP_TO[LANES, direction] if pixels >= limit.pixels)


WAYS = {way.name: way for way in (  # of those that are the fastest the first is taken
    Way('fused', ('taichi',), _no_fused, _fused_limit,
        _at_first_call('fused', 'fused_conv2d'), _at_first_call('fused', 'fused_conv2d_backward')),
    Way('merged', ('torch',), _no_merged, lambda *_: 1.,
        _at_first_call('merged', 'merged_conv2d'), _at_first_call('merged', 'merged_conv2d_backward')),
    Way('shift', ('torch', 'taichi'), lambda *_: None, lambda *_: 1.,
        _at_first_call('shift', 'shift_conv2d'), _at_first_call('shift', 'shift_conv2d_backward')),
)}


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
        ValueError: If the environment variable ``TIMM_SHIFTWISE_WAY`` names no way, or one that cannot run here.
        RuntimeError: If the backend asked for cannot run.
    """
    kernel_size = weight.shape[2]
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    if asked:
        return _asked_for(asked, x, kernel_size, padding)
    requested, source = requested_backend(backend)
    reasons = []
    for way in WAYS.values():
        obstacle = way.obstacle(x, kernel_size, padding)
        if requested != 'auto' and requested not in way.backends:
            reasons.append(f'{way.name} is not in {requested}, which {source} asks for')
        elif obstacle is not None:
            reasons.append(f'not {way.name}: {obstacle}')
        elif requested == 'auto' and way.backends == ('taichi',):
            # Taichi is looked for last, because that costs as much as a convolution of a small map
            limit = way.limit(x, padding, 'backward' if backward else 'forward')
            density = 1. if mask is None else float(mask.float().mean())
            seen = f'{density:.0%} of the groups are kept'
            if density > limit:
                reasons.append(f'{seen}; {way.name} is the faster on such maps up to {limit:.0%}')
            elif choose_backend(backend, x.device) == 'taichi':
                return Choice(way, f'{seen}; it is the faster on such maps up to {limit:.0%}')
            else:
                reasons.append(f'{way.name} needs Taichi, which does not run here')
        else:
            if requested == 'taichi':
                choose_backend(backend, x.device)  # or an error that says why it cannot run
            return Choice(way, '; '.join(reasons) or f'{source} asks for {requested}')
    raise AssertionError('nothing hinders the last way')


def _asked_for(asked: str, x: Tensor, kernel_size: int, padding: str) -> Choice:
    way = WAYS.get(asked)
    if way is None:
        raise ValueError(f'{ENVIRONMENT_VARIABLE} must be one of {", ".join(map(repr, WAYS))}, got {asked!r}.')
    obstacle = way.obstacle(x, kernel_size, padding)
    if obstacle is not None:
        raise ValueError(f'{ENVIRONMENT_VARIABLE}={asked!r} cannot be followed: {obstacle}.')
    if way.backends == ('taichi',):
        choose_backend('taichi', x.device)
    return Choice(way, f'{ENVIRONMENT_VARIABLE} asks for it')

"""Which of the equal ways computes a shift-wise convolution, and why.

A way is a file of this folder and a row of :data:`WAYS`:

``fused``
    Small convolutions, shifts and additions in one Taichi kernel that skips pruned groups (:mod:`.fused`).
``toeplitz``
    The merged kernels' convolutions as batched matrix products, for devices other than CPUs (:mod:`.toeplitz`).
``triton``
    The same products in one Triton kernel that stores no matrices, for NVIDIA GPUs (:mod:`.fused_triton`).
``merged``
    One wide, one tall and one square convolution, their kernels assembled from the small ones (:mod:`.merged`).
``channels_last``
    The same convolutions on maps with channels last, which cuDNN computes on GPUs (:mod:`.channels_last`).
``shift``
    The definition: small convolutions, whose K times larger maps are shifted and added (:mod:`.shift`).
"""
import os
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

from timm_shiftwise.ops.backend import choose_backend, requested_backend
from timm_shiftwise.ops.depthwise.frontend import LARGEST_UNROLLED
from timm_shiftwise.ops.measured import CHOICES, layer_of, may_measure
from timm_shiftwise.ops.taichi.runtime import LANES

from .call import Branches, Call, Gradients
from .channels_last import channels_last_conv2d, channels_last_conv2d_backward
from .merged import merged_conv2d, merged_conv2d_backward
from .shift import shift_conv2d, shift_conv2d_backward
from .toeplitz import toeplitz_conv2d, toeplitz_conv2d_backward

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
        obstacle: What hinders it in a call; None if nothing does.
        limit: Share of kept groups up to which it is the fastest of those that can run, by call and direction; below
            zero it is taken only where it is asked for.
        forward: Computes the three branches.
        backward: Computes the gradients, of those of the branches and the call, of x and of the kernels if wanted.
        timed: Whether it is a candidate where the fastest way is found by timing.
        blocks: Values of their last argument, ``block``, that are worth timing, beside None; empty if they have none.
    """
    name: str
    backends: tuple[str, ...]
    obstacle: Callable[[Call], str | None]
    limit: Callable[[Call, str], float]
    forward: Callable[..., Branches]
    backward: Callable[..., Gradients]
    timed: bool = False
    blocks: tuple[int, ...] = ()


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


def _no_fused(call: Call) -> str | None:
    size, most = call.weight.shape[2], LARGEST_UNROLLED
    if call.x.device.type != 'cpu':
        return f'it is made for CPUs, and the tensors are on {call.x.device.type}'
    return f'it is made for kernels of up to {most} x {most}, not of {size} x {size}' if size > most else None


def _no_merged(call: Call) -> str | None:
    if call.padding == 'full':
        return None
    return "it needs padding 'full': windows dropped at the border cannot be merged"


def _no_channels_last(call: Call) -> str | None:
    if call.x.device.type == 'cpu' and call.x.dtype in (torch.float16, torch.bfloat16):
        return 'oneDNN never returns from some wide kernels in half precision with channels last'
    return _no_merged(call)


def _no_triton(call: Call) -> str | None:
    x = call.x
    if x.device.type != 'cuda' or torch.version.hip:
        return f'it is made for NVIDIA GPUs, and the tensors are on {x.device.type}'
    if x.dtype == torch.float64:
        return 'it sums in float32, and the tensors are float64'
    try:
        fault = import_module('.fused_triton', __package__).fault
    except ImportError:
        return 'Triton is not installed'
    return fault(x.device, x.dtype, call.weight.shape[2], call.padding)


def _fused_limit(call: Call, direction: str) -> float:
    if call.padding != 'full':
        return 1.  # the shift way is slower whatever is kept
    pixels = call.x.shape[2] * call.x.shape[3]
    return next(limit.density for limit in FUSED_UP_TO[LANES, direction] if pixels >= limit.pixels)


def _toeplitz_limit(call: Call, direction: str) -> float:
    # on CPUs the merged way takes less time in every stage, in bfloat16, too: benchmarks/bench_operator.py
    return -1. if call.x.device.type == 'cpu' else 1.


WAYS = {way.name: way for way in (  # of those that are the fastest the first is taken
    Way('fused', ('taichi',), _no_fused, _fused_limit,
        _at_first_call('fused', 'fused_conv2d'), _at_first_call('fused', 'fused_conv2d_backward')),
    Way('toeplitz', ('torch',), lambda *_: None, _toeplitz_limit, toeplitz_conv2d, toeplitz_conv2d_backward,
        timed=True, blocks=(2, 4, 8)),
    Way('triton', ('torch',), _no_triton, lambda *_: -1., _at_first_call('fused_triton', 'triton_conv2d'),
        _at_first_call('fused_triton', 'triton_conv2d_backward'), timed=True),
    Way('merged', ('torch',), _no_merged, lambda *_: 1., merged_conv2d, merged_conv2d_backward, timed=True),
    Way('channels_last', ('torch',), _no_channels_last, lambda *_: -1., channels_last_conv2d,
        channels_last_conv2d_backward, timed=True),
    Way('shift', ('torch', 'taichi'), lambda *_: None, lambda *_: 1., shift_conv2d, shift_conv2d_backward),
)}


def choose_way(call: Call, backward: bool = False) -> Choice:
    """Choose how to compute a shift-wise convolution, or its gradients: as asked for, by timing, or by the table.

    Raises:
        ValueError: If the environment variable ``TIMM_SHIFTWISE_WAY``, or the file that ``TIMM_SHIFTWISE_CHOICES``
            names, asks for no way, or one that cannot run here.
        RuntimeError: If the backend asked for cannot run.
    """
    device, mask = call.x.device, call.mask
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    if asked:
        return _asked_for(asked, call)
    requested, source = requested_backend(call.backend)
    direction = 'backward' if backward else 'forward'
    if requested == 'auto' and may_measure(call.x):
        choice = _measured(call, direction)
        if choice is not None:
            return choice
    reasons = []
    for way in WAYS.values():
        if way.limit(call, direction) < 0:
            continue
        obstacle = way.obstacle(call)
        if requested != 'auto' and requested not in way.backends:
            reasons.append(f'{way.name} is not in {requested}, which {source} asks for')
        elif obstacle is not None:
            reasons.append(f'not {way.name}: {obstacle}')
        elif requested == 'auto' and way.backends == ('taichi',):
            # Taichi is looked for last, because that costs as much as a convolution of a small map
            limit = way.limit(call, direction)
            density = 1. if mask is None else float(mask.float().mean())
            seen = f'{density:.0%} of the groups are kept'
            if density > limit:
                reasons.append(f'{seen}; {way.name} is the faster on such maps up to {limit:.0%}')
            elif choose_backend(call.backend, device) == 'taichi':
                return Choice(way, f'{seen}; it is the faster on such maps up to {limit:.0%}')
            else:
                reasons.append(f'{way.name} needs Taichi, which does not run here')
        else:
            if requested == 'taichi':
                choose_backend(call.backend, device)  # or an error that says why it cannot run
            return Choice(way, '; '.join(reasons) or f'{source} asks for {requested}')
    raise AssertionError('nothing hinders the last way')


def _asked_for(asked: str, call: Call) -> Choice:
    way = WAYS.get(asked)
    if way is None:
        raise ValueError(f'{ENVIRONMENT_VARIABLE} must be one of {", ".join(map(repr, WAYS))}, got {asked!r}.')
    obstacle = way.obstacle(call)
    if obstacle is not None:
        raise ValueError(f'{ENVIRONMENT_VARIABLE}={asked!r} cannot be followed: {obstacle}.')
    if way.backends == ('taichi',):
        choose_backend('taichi', call.x.device)
    return Choice(way, f'{ENVIRONMENT_VARIABLE} asks for it')


def _measured(call: Call, direction: str) -> Choice | None:
    """The fastest of the ways that are timed (:mod:`timm_shiftwise.ops.measured`); None if no memory was enough."""
    layer, size = layer_of(call.x, direction, call.padding, call.focus_length, call.weight.shape[2])
    answer = CHOICES.fastest(layer, size, call.x.device, partial(_candidates, call, direction))
    if answer is None:
        return None
    way = _timed_ways().get(answer.name)
    if way is None:
        raise answer.refused(f'the ways that are timed are {", ".join(_timed_ways())}')
    obstacle = way.obstacle(call)
    if obstacle is not None:
        raise answer.refused(obstacle)
    return Choice(way, answer.reason)


@lru_cache
def _timed_ways() -> dict[str, Way]:
    """The ways that are timed, each as it is and with each of its blocks."""
    return {
        way.name if block is None else f'{way.name}, block {block}': way if block is None else way._replace(
            forward=partial(way.forward, block=block), backward=partial(way.backward, block=block))
        for way in WAYS.values() if way.timed for block in (None, *way.blocks)}


def _candidates(call: Call, direction: str) -> dict[str, Callable[[], Any]]:
    """What is timed: the operator as it is called in training, gradients of the map's shape standing for the real."""
    def compute(way: Way) -> None:
        grads = call.x, call.x, call.x
        outs = way.forward(call) if direction == 'forward' else way.backward(grads, call, True, True)
        for out in outs:
            assert out is not None
            out.contiguous()  # as the operator returns it

    return {name: partial(compute, way) for name, way in _timed_ways().items() if way.obstacle(call) is None}

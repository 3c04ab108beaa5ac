"""Front of the shift-add: checks what comes in, chooses a backend, and makes the operator known to PyTorch.

``torch.ops.timm_shiftwise.shift_add`` and ``torch.ops.timm_shiftwise.shift_add_backward`` are each other's gradient
(the operator is linear), so derivatives of any order exist on every backend.
"""
from typing import Any

import torch
from torch import Tensor

from timm_shiftwise.geometry import check_geometry, image_size, map_size
from timm_shiftwise.ops.backend import choose_backend
from timm_shiftwise.ops.checks import check_dtype, check_indices, check_together, check_wiring, is_empty

from .torch_impl import shift_add_backward_torch, shift_add_torch


def shift_add(
        y: Tensor, wiring: Tensor, focus_length: int, kernel_size: int, padding: str = 'full',
        backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Shift the maps of small convolutions to their places along the focus length and add them up.

    With ``s_g`` the shift of place ``g``, ``E`` the crop (:mod:`timm_shiftwise.geometry`) and zero outside of a map:

        h[b, c, i, j] = sum_{r, g} y[b, c * K + wiring[r, c, g], i + E, j - s_g]
        v[b, c, i, j] = sum_{r, g} y[b, c * K + wiring[r, c, G + g], i - s_g, j + E]
        i[b, c, i, j] = sum_r y[b, c * K + wiring[r, c, 2 * G], i + E, j + E]

    Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3. Sums are accumulated in float32 at least.

    Args:
        y: Maps [B, C * K, map(H), map(W)], K maps a channel; float64, float32, float16 or bfloat16, any memory format.
        wiring: Map index, 0 to K - 1, at every place of the wide branch, then of the tall branch, then of the centre
            branch; integer [R, C, 2 * G + 1] on the device of ``y``.
        focus_length: M in pixels.
        kernel_size: N in pixels.
        padding: Padding policy of the small convolutions, ``'full'`` or ``'same'``.
        backend: ``'auto'``, ``'taichi'`` or ``'torch'``; None follows the environment variable
            ``TIMM_SHIFTWISE_BACKEND``, else ``'auto'``.

    Returns:
        The wide, the tall and the centre branch, each [B, C, H, W] in the dtype of ``y``.

    Raises:
        TypeError: If a dtype is none of those above.
        ValueError: If a shape, a setting or an index does not fit.
        RuntimeError: If the backend asked for cannot run.
    """
    check_geometry(focus_length, kernel_size, padding)
    return torch.ops.timm_shiftwise.shift_add(y, wiring, focus_length, kernel_size, padding, backend)


def _check(y: Tensor, wiring: Tensor, focus_length: int, kernel_size: int, padding: str) -> None:
    check_wiring(wiring, focus_length, kernel_size, padding)
    check_dtype('y', y)
    check_together({'y': y, 'wiring': wiring})
    if y.ndim != 4:
        raise ValueError(f'y must have the shape [B, C * K, map(H), map(W)], got {tuple(y.shape)}.')
    channels, smallest = wiring.shape[1], map_size(1, kernel_size, padding)
    if y.shape[1] % channels or y.shape[1] < 1:
        raise ValueError(f'y must have a multiple of C = {channels} channels, got {y.shape[1]}.')
    if y.shape[2] < smallest or y.shape[3] < smallest:
        raise ValueError(
            f'maps of a {kernel_size} x {kernel_size} kernel with {padding!r} padding have at least {smallest} rows '
            f'and columns, got {tuple(y.shape[2:])}.')


def _check_backward(
        grad_h: Tensor, grad_v: Tensor, grad_i: Tensor, wiring: Tensor, maps: int, focus_length: int, kernel_size: int,
        padding: str) -> None:
    check_wiring(wiring, focus_length, kernel_size, padding)
    check_dtype('grad_h', grad_h)
    check_together({'grad_h': grad_h, 'grad_v': grad_v, 'grad_i': grad_i}, dtypes=True, shapes=True)
    check_together({'grad_h': grad_h, 'wiring': wiring})
    channels = wiring.shape[1]
    if grad_h.ndim != 4 or grad_h.shape[1] != channels or is_empty(*grad_h.shape[2:]):
        raise ValueError(
            f'gradients must have the shape [B, C = {channels}, H, W] with H and W of at least 1, got '
            f'{tuple(grad_h.shape)}.')
    if maps < 1:
        raise ValueError(f'maps must be at least 1, got {maps}.')


@torch.library.custom_op('timm_shiftwise::shift_add', mutates_args=())
def _shift_add(
        y: Tensor, wiring: Tensor, focus_length: int, kernel_size: int, padding: str,
        backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    _check(y, wiring, focus_length, kernel_size, padding)
    check_indices(wiring, y.shape[1] // wiring.shape[1])
    if choose_backend(backend, y.device) == 'taichi':
        from .taichi_impl import shift_add_taichi
        return shift_add_taichi(y, wiring, focus_length, kernel_size, padding)
    return shift_add_torch(y, wiring, focus_length, kernel_size, padding)


@_shift_add.register_fake
def _(y, wiring, focus_length, kernel_size, padding, backend):
    _check(y, wiring, focus_length, kernel_size, padding)
    size = (
        y.shape[0],
        wiring.shape[1],
        image_size(y.shape[2], kernel_size, padding),
        image_size(y.shape[3], kernel_size, padding),
    )
    return y.new_empty(size), y.new_empty(size), y.new_empty(size)


@torch.library.custom_op('timm_shiftwise::shift_add_backward', mutates_args=())
def _shift_add_backward(
        grad_h: Tensor, grad_v: Tensor, grad_i: Tensor, wiring: Tensor, maps: int, focus_length: int, kernel_size: int,
        padding: str, backend: str | None) -> Tensor:
    _check_backward(grad_h, grad_v, grad_i, wiring, maps, focus_length, kernel_size, padding)
    check_indices(wiring, maps)
    if choose_backend(backend, grad_h.device) == 'taichi':
        from .taichi_impl import shift_add_backward_taichi
        return shift_add_backward_taichi(
            grad_h, grad_v, grad_i, wiring, maps, focus_length, kernel_size, padding)
    return shift_add_backward_torch(
        grad_h, grad_v, grad_i, wiring, maps, focus_length, kernel_size, padding)


@_shift_add_backward.register_fake
def _(grad_h, grad_v, grad_i, wiring, maps, focus_length, kernel_size, padding, backend):
    _check_backward(grad_h, grad_v, grad_i, wiring, maps, focus_length, kernel_size, padding)
    batch, channels, height, width = grad_h.shape
    return grad_h.new_empty(
        (batch, channels * maps, map_size(height, kernel_size, padding), map_size(width, kernel_size, padding)))


def _setup_shift_add(ctx: Any, inputs: Any, output: Any) -> None:
    y, wiring, *ctx.settings = inputs
    ctx.maps = y.shape[1] // wiring.shape[1]
    ctx.save_for_backward(wiring)


def _grad_shift_add(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    grad_y = torch.ops.timm_shiftwise.shift_add_backward(*grads, *ctx.saved_tensors, ctx.maps, *ctx.settings)
    return grad_y, *[None] * 5


def _setup_shift_add_backward(ctx: Any, inputs: Any, output: Any) -> None:
    *_, wiring, _, focus_length, kernel_size, padding, backend = inputs
    ctx.settings = (focus_length, kernel_size, padding, backend)
    ctx.save_for_backward(wiring)


def _grad_shift_add_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.timm_shiftwise.shift_add(grad_y, *ctx.saved_tensors, *ctx.settings)
    return *grads, *[None] * 6


_shift_add.register_autograd(_grad_shift_add, setup_context=_setup_shift_add)
_shift_add_backward.register_autograd(_grad_shift_add_backward, setup_context=_setup_shift_add_backward)

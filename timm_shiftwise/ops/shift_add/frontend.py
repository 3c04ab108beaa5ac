"""Front of the shift-add: checks what comes in, chooses a backend, and makes the operator known to PyTorch.

``torch.ops.timm_shiftwise.shift_add`` and ``torch.ops.timm_shiftwise.shift_add_backward`` are each other's gradient
(the operator is linear), so derivatives of any order exist on every backend.
"""
import torch
from torch import Tensor

from timm_shiftwise.geometry import check_geometry, image_size, map_size, num_groups
from timm_shiftwise.ops.backend import choose_backend

from .torch_impl import shift_add_backward_torch, shift_add_torch

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
        ValueError: If a shape or a setting does not fit.
        RuntimeError: If the backend asked for cannot run.
    """
    check_geometry(focus_length, kernel_size, padding)
    check_wiring(wiring, focus_length, kernel_size)
    _check_maps(y, wiring.shape[1], kernel_size, padding)
    return torch.ops.timm_shiftwise.shift_add(y, wiring, focus_length, kernel_size, padding, backend)


def _check_maps(y: Tensor, channels: int, kernel_size: int, padding: str) -> None:
    if y.dtype not in _DTYPES:
        raise TypeError(f'y must be one of {", ".join(map(str, _DTYPES))}, got {y.dtype}.')
    if y.ndim != 4:
        raise ValueError(f'y must have the shape [B, C * K, map(H), map(W)], got {tuple(y.shape)}.')
    if y.shape[1] % channels or y.shape[1] < 1:
        raise ValueError(f'y must have a multiple of C = {channels} channels, got {y.shape[1]}.')
    smallest = map_size(1, kernel_size, padding)
    if y.shape[2] < smallest or y.shape[3] < smallest:
        raise ValueError(
            f'maps of a {kernel_size} x {kernel_size} kernel with {padding!r} padding have at least {smallest} rows '
            f'and columns, got {tuple(y.shape[2:])}.')


def check_wiring(wiring: Tensor, focus_length: int, kernel_size: int, channels: int | None = None) -> None:
    """Refuse a table that does not fit the geometry, or C channels if they are given.

    Raises:
        TypeError: If it does not hold integers.
        ValueError: If its shape does not fit.
    """
    if wiring.dtype not in (torch.int32, torch.int64):
        raise TypeError(f'wiring must be int32 or int64, got {wiring.dtype}.')
    groups = num_groups(focus_length, kernel_size)
    shape = tuple(wiring.shape)
    fits = len(shape) == 3 and min(shape) >= 1 and shape[2] == 2 * groups + 1 and channels in (None, shape[1])
    if not fits:
        wanted = f'[R, {"C" if channels is None else channels}, {2 * groups + 1}]'
        raise ValueError(
            f'wiring must have the shape {wanted} with R and C of at least 1 (focus length {focus_length} and kernel '
            f'size {kernel_size} make {groups} groups), got {shape}.')


@torch.library.custom_op('timm_shiftwise::shift_add', mutates_args=())
def _shift_add(
        y: Tensor, wiring: Tensor, focus_length: int, kernel_size: int, padding: str,
        backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    if choose_backend(backend, y.device) == 'taichi':
        from .taichi_impl import shift_add_taichi
        return shift_add_taichi(y, wiring, focus_length, kernel_size, padding)
    return shift_add_torch(y, wiring, focus_length, kernel_size, padding)


@_shift_add.register_fake
def _(y, wiring, focus_length, kernel_size, padding, backend):
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
    if choose_backend(backend, grad_h.device) == 'taichi':
        from .taichi_impl import shift_add_backward_taichi
        return shift_add_backward_taichi(
            grad_h, grad_v, grad_i, wiring, maps, focus_length, kernel_size, padding)
    return shift_add_backward_torch(
        grad_h, grad_v, grad_i, wiring, maps, focus_length, kernel_size, padding)


@_shift_add_backward.register_fake
def _(grad_h, grad_v, grad_i, wiring, maps, focus_length, kernel_size, padding, backend):
    batch, channels, height, width = grad_h.shape
    return grad_h.new_empty(
        (batch, channels * maps, map_size(height, kernel_size, padding), map_size(width, kernel_size, padding)))


def _setup_shift_add(ctx, inputs, output):
    y, wiring, *ctx.settings = inputs
    ctx.maps = y.shape[1] // wiring.shape[1]
    ctx.save_for_backward(wiring)


def _grad_shift_add(ctx, *grads):
    grad_y = torch.ops.timm_shiftwise.shift_add_backward(*grads, *ctx.saved_tensors, ctx.maps, *ctx.settings)
    return grad_y, *[None] * 5


def _setup_shift_add_backward(ctx, inputs, output):
    *_, wiring, _, focus_length, kernel_size, padding, backend = inputs
    ctx.settings = (focus_length, kernel_size, padding, backend)
    ctx.save_for_backward(wiring)


def _grad_shift_add_backward(ctx, grad_y):
    grads = torch.ops.timm_shiftwise.shift_add(grad_y, *ctx.saved_tensors, *ctx.settings)
    return *grads, *[None] * 6


_shift_add.register_autograd(_grad_shift_add, setup_context=_setup_shift_add)
_shift_add_backward.register_autograd(_grad_shift_add_backward, setup_context=_setup_shift_add_backward)

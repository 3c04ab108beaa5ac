"""The shift-add in plain PyTorch: the definition every other implementation is tested against.

Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3. Also what TorchScript, fx, tracing and export see.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_shiftwise.geometry import crop, image_size, map_size, margin, shift


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def shift_add_torch(
        y: Tensor, wiring: Tensor, focus_length: int, kernel_size: int, padding: str) -> tuple[Tensor, Tensor, Tensor]:
    """Shift the small convolutions' maps to their places and add them up.

    Args:
        y: Maps, [B, C * K, map(H), map(W)], K maps a channel.
        wiring: Map index at every place of the wide branch, then of the tall branch, then of the centre branch; integer
            [R, C, 2 * G + 1].
        focus_length: M in pixels.
        kernel_size: N in pixels.
        padding: ``'full'`` or ``'same'``.

    Returns:
        The wide, the tall and the centre branch, each [B, C, H, W] in the dtype of ``y``.
    """
    shuffles, channels, places = wiring.shape
    groups = places // 2
    maps = y.shape[1] // channels
    height = image_size(y.shape[2], kernel_size, padding)
    width = image_size(y.shape[3], kernel_size, padding)
    e = crop(kernel_size, padding)
    m = margin(focus_length, kernel_size, padding)
    wide = F.pad(y[:, :, e:e + height, :], [m, m, 0, 0])  # [B, C * K, H, m + map(W) + m]
    tall = F.pad(y[:, :, :, e:e + width], [0, 0, m, m])  # [B, C * K, m + map(H) + m, W]
    centre = y[:, :, e:e + height, e:e + width]
    first_map = torch.arange(channels, device=y.device) * maps

    out = torch.zeros([y.shape[0], channels, height, width], dtype=_accumulator(y.dtype), device=y.device)
    h, v, i = out, out, out
    for r in range(shuffles):
        for place in range(groups):
            start = m - shift(place, focus_length, kernel_size, padding)
            h = h + wide[:, :, :, start:start + width].index_select(1, first_map + wiring[r, :, place])
            v = v + tall[:, :, start:start + height, :].index_select(1, first_map + wiring[r, :, groups + place])
        i = i + centre.index_select(1, first_map + wiring[r, :, 2 * groups])
    return h.to(y.dtype), v.to(y.dtype), i.to(y.dtype)


def shift_add_backward_torch(
        grad_h: Tensor, grad_v: Tensor, grad_i: Tensor, wiring: Tensor, maps: int, focus_length: int, kernel_size: int,
        padding: str) -> Tensor:
    """The adjoint of :func:`shift_add_torch`, which is linear: every read becomes an addition at the place read from.

    It makes the gradient of the maps, [B, C * K, map(H), map(W)], of those of the three branches, each [B, C, H, W];
    K is ``maps``.
    """
    shuffles, channels, places = wiring.shape
    groups = places // 2
    batch, _, height, width = grad_h.shape
    extra = map_size(height, kernel_size, padding) - height
    e = crop(kernel_size, padding)
    m = margin(focus_length, kernel_size, padding)
    dtype = _accumulator(grad_h.dtype)
    out_dtype = grad_h.dtype
    grad_h, grad_v, grad_i = grad_h.to(dtype), grad_v.to(dtype), grad_i.to(dtype)
    first_map = torch.arange(channels, device=grad_h.device) * maps

    wide = torch.zeros([batch, channels * maps, height, width + extra + 2 * m], dtype=dtype, device=grad_h.device)
    tall = torch.zeros([batch, channels * maps, height + extra + 2 * m, width], dtype=dtype, device=grad_h.device)
    centre = torch.zeros([batch, channels * maps, height, width], dtype=dtype, device=grad_h.device)
    for r in range(shuffles):
        for place in range(groups):
            start = m - shift(place, focus_length, kernel_size, padding)
            wide[:, :, :, start:start + width].index_add_(1, first_map + wiring[r, :, place], grad_h)
            tall[:, :, start:start + height, :].index_add_(1, first_map + wiring[r, :, groups + place], grad_v)
        centre.index_add_(1, first_map + wiring[r, :, 2 * groups], grad_i)
    rest = extra - e
    grad_y = F.pad(wide[:, :, :, m:m + width + extra], [0, 0, e, rest])
    grad_y = grad_y + F.pad(tall[:, :, m:m + height + extra, :], [e, rest, 0, 0])
    grad_y = grad_y + F.pad(centre, [e, rest, e, rest])
    return grad_y.to(out_dtype)

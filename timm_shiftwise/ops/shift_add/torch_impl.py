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
        y: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        kernel_size: int,
        padding: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shift the small convolutions' maps to their places and add them up.

    Args:
        y: Maps, [B, C * K, map(H), map(W)], K maps a channel.
        horizontal: Map index at every place of the wide branch, integer [R, C, G].
        vertical: Map index at every place of the tall branch, integer [R, C, G].
        identity: Map index of the centre branch, integer [R, C].
        focus_length: M in pixels.
        kernel_size: N in pixels.
        padding: ``'full'`` or ``'same'``.

    Returns:
        The horizontal, vertical and identity branches, each [B, C, H, W] in the dtype of ``y``.
    """
    shuffles, channels, groups = horizontal.shape
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
            h = h + wide[:, :, :, start:start + width].index_select(1, first_map + horizontal[r, :, place])
            v = v + tall[:, :, start:start + height, :].index_select(1, first_map + vertical[r, :, place])
        i = i + centre.index_select(1, first_map + identity[r])
    return h.to(y.dtype), v.to(y.dtype), i.to(y.dtype)


def shift_add_backward_torch(
        grad_h: Tensor,
        grad_v: Tensor,
        grad_i: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        maps: int,
        focus_length: int,
        kernel_size: int,
        padding: str,
) -> Tensor:
    """The adjoint of :func:`shift_add_torch`, which is linear: every read becomes an addition at the place read from.

    Args:
        grad_h: Gradient of the horizontal branch, [B, C, H, W].
        grad_v: Gradient of the vertical branch, [B, C, H, W].
        grad_i: Gradient of the identity branch, [B, C, H, W].
        horizontal: See :func:`shift_add_torch`.
        vertical: See :func:`shift_add_torch`.
        identity: See :func:`shift_add_torch`.
        maps: K, maps a channel.
        focus_length: M in pixels.
        kernel_size: N in pixels.
        padding: ``'full'`` or ``'same'``.

    Returns:
        Gradient of the maps, [B, C * K, map(H), map(W)] in the dtype of the gradients.
    """
    shuffles, channels, groups = horizontal.shape
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
            wide[:, :, :, start:start + width].index_add_(1, first_map + horizontal[r, :, place], grad_h)
            tall[:, :, start:start + height, :].index_add_(1, first_map + vertical[r, :, place], grad_v)
        centre.index_add_(1, first_map + identity[r], grad_i)
    rest = extra - e
    grad_y = F.pad(wide[:, :, :, m:m + width + extra], [0, 0, e, rest])
    grad_y = grad_y + F.pad(tall[:, :, m:m + height + extra, :], [e, rest, 0, 0])
    grad_y = grad_y + F.pad(centre, [e, rest, e, rest])
    return grad_y.to(out_dtype)

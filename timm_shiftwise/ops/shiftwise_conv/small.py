"""The definition, step by step: small convolutions make maps, the shift-add puts them together."""
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_shiftwise.geometry import check_geometry, small_padding
from timm_shiftwise.ops.shift_add import check_tables, shift_add_torch


def check(
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        padding: str,
        mask: Tensor | None,
) -> None:
    """Refuse what does not fit together.

    Raises:
        TypeError: If a table does not hold integers.
        ValueError: If a shape or a setting does not fit.
    """
    if torch.jit.is_tracing():  # sizes are tensors then
        return
    if x.ndim != 4 or min(x.shape[1:]) < 1:
        raise ValueError(f'x must have the shape [B, C, H, W] with C, H and W of at least 1, got {tuple(x.shape)}.')
    if weight.ndim != 4 or weight.shape[0] != x.shape[1] or weight.shape[2] != weight.shape[3]:
        raise ValueError(f'weight must have the shape [C = {x.shape[1]}, K, N, N], got {tuple(weight.shape)}.')
    channels, maps, size, _ = weight.shape
    check_geometry(focus_length, size, padding)
    check_tables(horizontal, vertical, identity, channels, focus_length, size)
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (channels, maps)):
        raise ValueError(
            f'mask must be bool and have the shape {(channels, maps)}, got {mask.dtype} and {tuple(mask.shape)}.')


def small_conv2d(x: Tensor, weight: Tensor, padding: str) -> Tensor:
    """The small convolutions: [B, C, H, W] with kernels [C, K, N, N] to maps [B, C * K, map(H), map(W)]."""
    channels, _, size, _ = weight.shape
    size = int(size)  # torch.jit.trace makes it a tensor, which torch 2.8 takes for no padding
    return F.conv2d(x, weight.flatten(0, 1).unsqueeze(1), padding=small_padding(size, padding), groups=channels)


def reference_conv2d(
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        padding: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The shift-wise convolution in plain PyTorch: what every way to compute it is tested against."""
    y = small_conv2d(x, weight, padding)
    return shift_add_torch(y, horizontal, vertical, identity, focus_length, weight.shape[2], padding)


def small_shift_conv2d(
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        padding: str,
        backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The small convolutions in PyTorch, their shift-add in the backend."""
    y = small_conv2d(x, weight, padding)
    return torch.ops.timm_shiftwise.shift_add(
        y, horizontal, vertical, identity, focus_length, weight.shape[2], padding, backend)


def small_shift_conv2d_backward(
        grad_h: Tensor,
        grad_v: Tensor,
        grad_i: Tensor,
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        padding: str,
        backend: str | None,
        need_x: bool,
        need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the kernels of :func:`small_shift_conv2d`; None where not wanted."""
    channels, maps, size, _ = weight.shape
    grad_y = torch.ops.timm_shiftwise.shift_add_backward(
        grad_h, grad_v, grad_i, horizontal, vertical, identity, maps, focus_length, size, padding, backend)
    p = small_padding(size, padding)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_y, x, weight.flatten(0, 1).unsqueeze(1), None, [1, 1], [p, p], [1, 1], False, [0, 0], channels,
        [need_x, need_weight, False])
    return grad_x, grad_weight.view_as(weight) if need_weight else None

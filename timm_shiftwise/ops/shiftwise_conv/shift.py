"""The shift way, the definition step by step: small convolutions make maps, the shift-add puts them together."""
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_shiftwise.geometry import small_padding
from timm_shiftwise.ops.shift_add import shift_add_torch

from .call import Branches, Call, Gradients


def small_conv2d(x: Tensor, weight: Tensor, padding: str) -> Tensor:
    """The small convolutions: [B, C, H, W] with kernels [C, K, N, N] to maps [B, C * K, map(H), map(W)]."""
    channels, _, size, _ = weight.shape
    size = int(size)  # torch.jit.trace makes it a tensor, which not every version of torch takes for padding
    return F.conv2d(x, weight.flatten(0, 1).unsqueeze(1), padding=small_padding(size, padding), groups=channels)


def reference_conv2d(x: Tensor, weight: Tensor, wiring: Tensor, focus_length: int, padding: str) -> Branches:
    """The shift-wise convolution in plain PyTorch: what every way to compute it is tested against."""
    y = small_conv2d(x, weight, padding)
    return shift_add_torch(y, wiring, focus_length, weight.shape[2], padding)


def shift_conv2d(call: Call) -> Branches:
    """The small convolutions in PyTorch, their shift-add in the backend."""
    x, weight, wiring, _, focus_length, padding, backend = call
    y = small_conv2d(x, weight, padding)
    return torch.ops.timm_shiftwise.shift_add(y, wiring, focus_length, weight.shape[2], padding, backend)


def shift_conv2d_backward(grads: Branches, call: Call, need_x: bool, need_weight: bool) -> Gradients:
    """Gradients of the input and of the small kernels."""
    x, weight, wiring, _, focus_length, padding, backend = call
    channels, maps, size, _ = weight.shape
    grad_y = torch.ops.timm_shiftwise.shift_add_backward(*grads, wiring, maps, focus_length, size, padding, backend)
    p = small_padding(size, padding)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_y, x, weight.flatten(0, 1).unsqueeze(1), None, [1, 1], [p, p], [1, 1], False, [0, 0], channels,
        [need_x, need_weight, False])
    return grad_x, grad_weight.view_as(weight) if need_weight else None

"""The merged way: any set of small kernels, orders and repeats as one wide, one tall and one square kernel.

Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3, read backwards: with full padding (p = N - 1) every small kernel
lies at the place along the focus length that its shift stands for, and kernels at one place add up.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_shiftwise.ops.tracing import graph_leaves_python


def assemble_kernels(
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add every small kernel at its places. Differentiable.

    Args:
        weight: Small kernels [C, K, N, N].
        horizontal: Kernel index at every place of the wide branch, integer [R, C, G].
        vertical: The same for the tall branch, integer [R, C, G].
        identity: Kernel index of the centre branch, integer [R, C].

    Returns:
        The wide kernel [C, N, G * N], the tall one [C, G * N, N] and the square one [C, N, N]. Column ``M // 2`` of the
        wide and row ``M // 2`` of the tall kernel lie over the output's own position.
    """
    channels, _, size, _ = weight.shape
    groups = horizontal.shape[2]
    channel = torch.arange(channels, device=weight.device)[:, None]
    wide = weight.new_zeros([channels, groups, size, size])
    tall = wide
    square = weight.new_zeros([channels, size, size])
    for r in range(horizontal.shape[0]):
        wide = wide + weight[channel, horizontal[r].long()]  # [C, G, N, N]
        tall = tall + weight[channel, vertical[r].long()]
        square = square + weight[channel[:, 0], identity[r].long()]
    return wide.transpose(1, 2).flatten(2), tall.flatten(1, 2), square


def centred(kernel: Tensor, row: int, column: int) -> Tensor:
    """Pad kernels [C, rows, columns] with zeros to odd sides that have the given element in the middle."""
    rows, columns = kernel.shape[1], kernel.shape[2]
    above, below = row, rows - 1 - row
    left, right = column, columns - 1 - column
    return F.pad(kernel, [
        max(right - left, 0), max(left - right, 0),
        max(below - above, 0), max(above - below, 0),
    ])


def trimmed(kernel: Tensor) -> Tensor:
    """Cut zeros off the rim of kernels [C, rows, columns] of odd sides, alike on opposite sides, down to 1 x 1."""
    touched = (kernel != 0).any(dim=0)
    cut = []
    for axis in (0, 1):
        line = touched.any(dim=1 - axis)
        line = line | line.flip(0)
        cut.append(min(int(line.int().argmax()) if bool(line.any()) else len(line) // 2, len(line) // 2))
    return kernel[:, cut[0]:kernel.shape[1] - cut[0], cut[1]:kernel.shape[2] - cut[1]]


def depthwise_conv2d(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise convolution of [B, C, H, W] with kernels [C, rows, columns] of odd sides; the size stays."""
    return F.conv2d(
        x, kernel.unsqueeze(1), bias, padding=[kernel.shape[1] // 2, kernel.shape[2] // 2], groups=kernel.shape[0])


def wide_conv2d(x: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise convolution with a wide kernel on the transposed map: PyTorch's CPU kernels are made for tall ones."""
    turned = depthwise_conv2d(x.transpose(2, 3).contiguous(), kernel.transpose(1, 2).contiguous())
    return turned.transpose(2, 3)


def add_centred(first: Tensor, second: Tensor) -> Tensor:
    """Add kernels [C, rows, columns] of odd sides, middle over middle, in the larger of the sides."""
    rows, columns = max(first.shape[1], second.shape[1]), max(first.shape[2], second.shape[2])

    def grown(kernel: Tensor) -> Tensor:
        vertical, horizontal = (rows - kernel.shape[1]) // 2, (columns - kernel.shape[2]) // 2
        return F.pad(kernel, [horizontal, horizontal, vertical, vertical])

    return grown(first) + grown(second)


def large_kernel_conv2d(x: Tensor, tall: Tensor, wide: Tensor, bias: Tensor) -> Tensor:
    """A tall and a wide depthwise convolution, added.

    Args:
        x: Input [B, C, H, W].
        tall: Kernels [C, rows, columns] of odd sides.
        wide: Kernels [C, rows, columns] of odd sides.
        bias: Bias [C].

    Returns:
        Output [B, C, H, W].
    """
    out = depthwise_conv2d(x, tall, bias)
    if torch.jit.is_scripting():
        return out + depthwise_conv2d(x, wide)
    else:
        if x.device.type == 'cpu' and not graph_leaves_python():
            return out + wide_conv2d(x, wide)
        return out + depthwise_conv2d(x, wide)

"""Front of the shift-wise convolution: small depthwise convolutions whose maps are shifted and added."""
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_shiftwise.geometry import small_padding
from timm_shiftwise.ops.shift_add import shift_add, shift_add_torch
from timm_shiftwise.ops.tracing import graph_leaves_python

from .merged import merged_conv2d
from .ways import choose_way


def shiftwise_conv2d(
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        padding: str = 'full',
        backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run K small convolutions on every channel, shift their maps to their places and add them up.

    Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3. With ``padding='full'`` and tables in natural order this equals
    one wide N x (G * N), one tall (G * N) x N and one square N x N depthwise convolution. Which of the ways that are
    equal computes it is chosen by :func:`timm_shiftwise.ops.shiftwise_conv.ways.choose_way`.

    Args:
        x: Input [B, C, H, W].
        weight: Small kernels [C, K, N, N].
        horizontal: Kernel index, 0 to K - 1, at every place of the wide branch; integer [R, C, G].
        vertical: The same for the tall branch; integer [R, C, G].
        identity: Kernel index of the centre branch; integer [R, C].
        focus_length: M in pixels.
        padding: ``'full'`` or ``'same'``.
        backend: ``'auto'``, ``'taichi'``, ``'torch'`` or None, see :func:`timm_shiftwise.ops.shift_add`.

    Returns:
        The horizontal, vertical and identity branches, each [B, C, H, W].

    Raises:
        TypeError: If a dtype is not supported.
        ValueError: If a shape or a setting does not fit.
        RuntimeError: If the backend asked for cannot run.
    """
    if torch.jit.is_scripting():
        if padding == 'full':
            return merged_conv2d(x, weight, horizontal, vertical, identity, focus_length)
        y = small_conv2d(x, weight, padding)
        return shift_add_torch(y, horizontal, vertical, identity, focus_length, weight.shape[2], padding)
    else:
        return _dispatched(x, weight, horizontal, vertical, identity, focus_length, padding, backend)


def _dispatched(
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        padding: str,
        backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # PyTorch refuses the question for the meta device
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    tables = (horizontal, vertical, identity)
    if graph_leaves_python():
        if padding == 'full':
            return merged_conv2d(x, weight, *tables, focus_length)
        return shift_add_torch(small_conv2d(x, weight, padding), *tables, focus_length, weight.shape[2], padding)
    if choose_way(x, weight, padding, backend).way == 'merged':
        return merged_conv2d(x, weight, *tables, focus_length)
    return shift_add(small_conv2d(x, weight, padding), *tables, focus_length, weight.shape[2], padding, backend)


def small_conv2d(x: Tensor, weight: Tensor, padding: str) -> Tensor:
    """The small convolutions: [B, C, H, W] with kernels [C, K, N, N] to maps [B, C * K, map(H), map(W)]."""
    channels, _, size, _ = weight.shape
    return F.conv2d(x, weight.flatten(0, 1).unsqueeze(1), padding=small_padding(size, padding), groups=channels)

"""What every way to compute a shift-wise convolution is given."""
from typing import NamedTuple

from torch import Tensor

Branches = tuple[Tensor, Tensor, Tensor]
"""The wide, the tall and the centre branch, or their gradients, each [B, C, H, W]."""
Gradients = tuple[Tensor | None, Tensor | None]
"""Of the input and of the small kernels, in their dtypes; None where not wanted."""


class Call(NamedTuple):
    """Arguments of :func:`.frontend.shiftwise_conv2d`, checked before a way is given them.

    Attributes:
        x: Input [B, C, H, W].
        weight: Small kernels [C, K, N, N], pruned ones zero.
        wiring: Kernel index at every place, integer [R, C, 2 * G + 1].
        mask: Kept groups, bool [C, K]; None keeps all.
        focus_length: M in pixels.
        padding: ``'full'`` or ``'same'``.
        backend: Backend asked for, see :mod:`timm_shiftwise.ops.backend`.
    """
    x: Tensor
    weight: Tensor
    wiring: Tensor
    mask: Tensor | None
    focus_length: int
    padding: str = 'full'
    backend: str | None = None

"""Which of the equal ways computes a shift-wise convolution, and why.

``shift``
    The definition: small convolutions, whose K-times-larger maps are shifted and added.
``merged``
    One wide, one tall and one square kernel, assembled from the small ones (:mod:`.merged`). Only for full padding.
"""
import os
from typing import NamedTuple

from torch import Tensor

WAYS = ('shift', 'merged')
ENVIRONMENT_VARIABLE = 'TIMM_SHIFTWISE_WAY'


class Choice(NamedTuple):
    """A way and the reason for it.

    Attributes:
        way: One of :data:`WAYS`.
        reason: A clause that explains the choice, for people.
    """
    way: str
    reason: str


def choose_way(x: Tensor, weight: Tensor, padding: str, backend: str | None = None) -> Choice:
    """Choose how to compute a shift-wise convolution.

    Args:
        x: Input [B, C, H, W].
        weight: Small kernels [C, K, N, N].
        padding: ``'full'`` or ``'same'``.
        backend: Backend asked for in the call.

    Returns:
        The way and the reason.

    Raises:
        ValueError: If the environment variable ``TIMM_SHIFTWISE_WAY`` names no way, or one that does not fit.
    """
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    if asked:
        if asked not in WAYS:
            raise ValueError(f'{ENVIRONMENT_VARIABLE} must be one of {WAYS}, got {asked!r}.')
        if asked == 'merged' and padding != 'full':
            raise ValueError(f"{ENVIRONMENT_VARIABLE}='merged' needs padding 'full', got {padding!r}.")
        return Choice(asked, f'{ENVIRONMENT_VARIABLE} asks for it')
    if padding != 'full':
        return Choice('shift', 'windows that are dropped at the border cannot be merged')
    if backend == 'taichi':
        return Choice('shift', 'the Taichi backend was asked for')
    return Choice('merged', 'fastest way for dense layers')

"""Gradients of large depthwise convolutions, in PyTorch or in one Taichi kernel."""
from torch import Tensor

from timm_shiftwise.ops.backend import choose_backend, requested_backend
from timm_shiftwise.ops.taichi.runtime import LANES

from .torch_impl import large_kernel_gradients_torch

LARGEST_UNROLLED = 7
"""Kernel size up to which Taichi kernels that are unrolled over it compile in reasonable time."""
TAICHI_IS_FASTER = {16: True, 8: False}
"""By lanes: whether the gradients take less time in Taichi; measured by ``benchmarks/calibrate.py``."""


def large_kernel_gradients(
        grads: tuple[Tensor, Tensor, Tensor], x: Tensor, kernels: tuple[Tensor, Tensor, Tensor], backend: str | None,
        need_x: bool, need_weight: bool) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
    """Gradients of a wide, a tall and a square depthwise convolution of one input.

    Args:
        grads: Gradients of the wide, the tall and the square kernels' outputs, each [B, C, H, W].
        x: Input [B, C, H, W].
        kernels: The wide, the tall and the square kernels, each [C, rows, columns] of odd sides.
        backend: Backend asked for in the call, see :mod:`timm_shiftwise.ops.backend`.
        need_x: Whether the gradient of the input is wanted.
        need_weight: Whether the gradients of the kernels are wanted.

    Returns:
        The gradient of ``x``, and those of the wide, the tall and the square kernels in float32 at least; None where
        not wanted.

    Raises:
        RuntimeError: If the backend asked for cannot run.
    """
    if _in_taichi(x, kernels[2].shape[1], backend):
        from .taichi_impl import large_kernel_gradients_taichi
        return large_kernel_gradients_taichi(grads, x, kernels, need_x, need_weight)
    return large_kernel_gradients_torch(grads, x, kernels, need_x, need_weight)


def _in_taichi(x: Tensor, kernel_size: int, backend: str | None) -> bool:
    if x.device.type != 'cpu' or kernel_size > LARGEST_UNROLLED:
        return False
    if requested_backend(backend)[0] == 'auto' and not TAICHI_IS_FASTER[LANES]:
        return False
    return choose_backend(backend, x.device) == 'taichi'

"""The gradients of a tall, a wide and a square depthwise convolution of one input, in one Taichi kernel."""
import torch
from torch import Tensor

from timm_shiftwise.ops.taichi_lanes import MAX_ELEMENTS, flat, kinds, num_tasks, scratch
from timm_shiftwise.ops.taichi_runtime import launching, num_threads

from .taichi_large_rows import large_backward_kernel, large_layout


def large_kernel_backward_taichi(
        grad_h: Tensor,
        grad_v: Tensor,
        grad_i: Tensor,
        x: Tensor,
        wide: Tensor,
        tall: Tensor,
        square: Tensor,
        need_x: bool,
        need_weight: bool,
) -> tuple[Tensor | None, tuple[Tensor, ...] | None]:
    """Gradients of a wide, a tall and a square depthwise convolution of one input.

    Args:
        grad_h: Gradient of the wide kernels' output, [B, C, H, W].
        grad_v: Gradient of the tall kernels' output, [B, C, H, W].
        grad_i: Gradient of the square kernels' output, [B, C, H, W].
        x: Input [B, C, H, W] on the CPU; float64, float32, float16 or bfloat16, any memory format.
        wide: Kernels [C, n, columns] of odd sides.
        tall: Kernels [C, rows, n] of odd sides.
        square: Kernels [C, n, n].
        need_x: Whether the gradient of the input is wanted.
        need_weight: Whether the gradients of the kernels are wanted.

    Returns:
        The gradient of ``x`` in its dtype, and those of the wide, the tall and the square kernels in float32 at least;
        None where not wanted.
    """
    batch, channels, height, width = x.shape
    n = square.shape[2]
    kind, real = kinds(x.dtype)
    summed = torch.float64 if x.dtype == torch.float64 else torch.float32
    kernels = [kernel.detach().to(summed).contiguous() for kernel in (wide.mT, tall, square)]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    grads = [torch.zeros(kernel.shape if need_weight else [0], dtype=summed) for kernel in kernels]
    step = max(1, MAX_ELEMENTS // max(1, channels * height * width))
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        parts = grads if step >= batch else [torch.empty_like(grad) for grad in grads]
        with launching(x.device):
            turned_rows, rows = kernels[0].shape[1], kernels[1].shape[1]
            layout = large_layout(height, width, rows, turned_rows, n)
            tasks = num_tasks(channels)
            memory = scratch(tasks * layout.size, x.dtype)
            large_backward_kernel(real)(
                *(flat(plane[part].to(x.dtype)) for plane in (grad_h, grad_v, grad_i, x)),
                *(kernel.view(-1) for kernel in kernels), layout.starts, memory, memory.view(-1),
                flat(grad_x[part]) if need_x else flat(grad_x), *(grad.view(-1) for grad in parts),
                part.stop - part.start, channels, height, width, rows, turned_rows, layout.columns,
                layout.turned_columns, layout.size, tasks, n, layout.tile, layout.turned_tile, need_x, need_weight,
                num_threads(), kind)
        if parts is not grads:
            for total, share in zip(grads, parts, strict=True):
                total += share
    wide_gradient, *others = grads
    return grad_x if need_x else None, (wide_gradient.mT, *others) if need_weight else None

"""The gradients of a wide, a tall and a square depthwise convolution of one input, in one Taichi kernel."""
import torch
from torch import Tensor

from timm_shiftwise.ops.taichi.lanes import flat, image_parts, kinds, num_tasks, scratch, summed_dtype
from timm_shiftwise.ops.taichi.runtime import launching, num_threads

from .taichi_rows import large_backward_kernel, large_layout


def large_kernel_gradients_taichi(
        grads: tuple[Tensor, Tensor, Tensor], x: Tensor, kernels: tuple[Tensor, Tensor, Tensor], need_x: bool,
        need_weight: bool) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
    """See :func:`timm_shiftwise.ops.depthwise.large_kernel_gradients`; for tensors on the CPU, any memory format.

    The wide kernels are [C, n, columns], the tall ones [C, rows, n] and the square ones [C, n, n].
    """
    batch, channels, height, width = x.shape
    wide, tall, square = kernels
    n = square.shape[2]
    kind, real = kinds(x.dtype)
    summed = summed_dtype(x.dtype)
    turned, tall, square = (kernel.detach().to(summed).contiguous() for kernel in (wide.mT, tall, square))
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    totals = [torch.zeros(kernel.shape if need_weight else [0], dtype=summed) for kernel in (turned, tall, square)]
    parts = image_parts(batch, channels * height * width)
    for part in parts:
        sums = totals if len(parts) == 1 else [torch.empty_like(total) for total in totals]
        grad_h, grad_v, grad_i, image = (flat(plane[part].to(x.dtype)) for plane in (*grads, x))
        with launching(x.device):
            layout = large_layout(height, width, tall.shape[1], turned.shape[1], n)
            tasks = num_tasks(channels)
            memory = scratch(tasks * layout.size, x.dtype)
            large_backward_kernel(real)(
                **layout._asdict(), grad_h=grad_h, grad_v=grad_v, grad_i=grad_i, x=image, wide=turned.view(-1),
                tall=tall.view(-1), square=square.view(-1), memory=memory, cells=memory.view(-1),
                grad_x=flat(grad_x[part]) if need_x else grad_x, grad_wide=sums[0].view(-1),
                grad_tall=sums[1].view(-1), grad_square=sums[2].view(-1), batch=part.stop - part.start,
                channels=channels, height=height, width=width, rows=tall.shape[1], turned_rows=turned.shape[1],
                tasks=tasks, n=n, want_x=need_x, want_w=need_weight, threads=num_threads(), kind=kind)
        if len(parts) > 1:
            for total, share in zip(totals, sums, strict=True):
                total += share
    grad_turned, grad_tall, grad_square = totals
    return grad_x if need_x else None, (grad_turned.mT, grad_tall, grad_square) if need_weight else None

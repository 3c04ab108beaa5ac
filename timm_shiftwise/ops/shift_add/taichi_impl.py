"""The shift-add in Taichi, forward and backward.

Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3; :mod:`.torch_impl` is the definition. The kernels
(:mod:`.taichi_forward` and :mod:`.taichi_backward` for CPUs, :mod:`.taichi_gather` for GPUs) are in gather form: each
output element is written once, by one thread, without atomics. They sum in float32, or float64 where the maps have it.
bfloat16, which Taichi does not know, goes in and out as bits.

The CUDA side was written with care but not run: no CUDA machine was at hand.
"""
from typing import Any

import torch
from torch import Tensor

from timm_shiftwise.geometry import crop, image_size, map_size, shift
from timm_shiftwise.ops.taichi.lanes import (
    flat,
    image_parts,
    integers,
    kinds,
    most_vectors,
    num_tasks,
    pack_size,
    packed,
    scratch,
    summed_dtype,
)
from timm_shiftwise.ops.taichi.runtime import launching, num_threads

from .taichi_backward import backward_kernel, backward_layout, write_list_length
from .taichi_forward import forward_kernel, forward_layout, read_list_length
from .taichi_gather import backward_gather, forward_gather


def shift_add_taichi(
        y: Tensor, wiring: Tensor, focus_length: int, kernel_size: int, padding: str) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`.torch_impl.shift_add_torch`; maps of float64, float32, float16 or bfloat16."""
    shuffles, channels, places = wiring.shape
    groups, maps = places // 2, y.shape[1] // channels
    batch, _, map_height, map_width = y.shape
    height = image_size(map_height, kernel_size, padding)
    width = image_size(map_width, kernel_size, padding)
    outs = [y.new_empty([batch, channels, height, width]) for _ in range(3)]
    kind, real = kinds(y.dtype)
    for part in image_parts(batch, y[:1].numel()):
        branches = [out[part] for out in outs]
        planes = (part.stop - part.start) * channels
        sizes = dict(
            wiring=integers(wiring), planes=planes, channels=channels, maps=maps, height=height, width=width,
            shuffles=shuffles, groups=groups, kind=kind)
        with launching(y.device):
            if y.device.type != 'cpu':
                out_h, out_v, out_i = map(flat, branches)
                forward_gather(
                    **sizes, **_geometry(focus_length, kernel_size, padding), y=flat(y[part]), map_height=map_height,
                    map_width=map_width, out_h=out_h, out_v=out_v, out_i=out_i, real=real)
                continue
            pack = pack_size(width, *branches)
            layout = forward_layout(
                maps, height, width, focus_length, kernel_size, padding, most_vectors(), convolved=False)
            tasks, stride = num_tasks(planes), read_list_length(maps, groups, shuffles)
            out_h, out_v, out_i = (packed(branch, pack) for branch in branches)
            forward_kernel(real, pack, convolved=False)(
                **sizes, **layout._asdict(), x=flat(y[part]), weight=torch.empty(0, dtype=summed_dtype(y.dtype)),
                mask=torch.ones(channels * maps, dtype=torch.int32),
                lists=torch.empty(channels * stride, dtype=torch.int32),
                memory=scratch(tasks * layout.size, y.dtype), out_h=out_h, out_v=out_v, out_i=out_i, stride=stride,
                tasks=tasks, first_shift=shift(0, focus_length, kernel_size, 'full'), n=kernel_size,
                masked=padding == 'same', threads=num_threads())
    return outs[0], outs[1], outs[2]


def shift_add_backward_taichi(
        grad_h: Tensor, grad_v: Tensor, grad_i: Tensor, wiring: Tensor, maps: int, focus_length: int, kernel_size: int,
        padding: str) -> Tensor:
    """The adjoint of :func:`shift_add_taichi`; see :func:`.torch_impl.shift_add_backward_torch`."""
    shuffles, channels, places = wiring.shape
    groups = places // 2
    batch, _, height, width = grad_h.shape
    map_height, map_width = map_size(height, kernel_size, padding), map_size(width, kernel_size, padding)
    grad_y = grad_h.new_empty([batch, channels * maps, map_height, map_width])
    kind, real = kinds(grad_h.dtype)
    for part in image_parts(batch, grad_y[:1].numel()):
        grads = [grad[part].contiguous() for grad in (grad_h, grad_v, grad_i)]
        sizes = dict(
            wiring=integers(wiring), channels=channels, maps=maps, height=height, width=width, shuffles=shuffles,
            groups=groups, kind=kind)
        with launching(grad_h.device):
            if grad_h.device.type != 'cpu':
                flat_h, flat_v, flat_i = map(flat, grads)
                backward_gather(
                    **sizes, **_geometry(focus_length, kernel_size, padding), grad_h=flat_h, grad_v=flat_v,
                    grad_i=flat_i, grad_y=flat(grad_y[part]), planes=(part.stop - part.start) * channels,
                    map_height=map_height, map_width=map_width, real=real)
                continue
            pack = pack_size(width, *grads)
            layout = backward_layout(
                maps, height, width, focus_length, kernel_size, padding, most_vectors(), convolved=False)
            tasks = num_tasks(channels)
            packed_h, packed_v, packed_i = (packed(grad, pack) for grad in grads)
            unused = torch.empty(0, dtype=summed_dtype(grad_h.dtype))
            backward_kernel(real, pack, convolved=False)(
                **sizes, **layout._asdict(), grad_h=packed_h, grad_v=packed_v, grad_i=packed_i, x=packed_h,
                weight=unused, mask=torch.ones(channels * maps, dtype=torch.int32),
                lists=torch.empty(channels * write_list_length(maps, groups, shuffles), dtype=torch.int32),
                memory=scratch(tasks * layout.size, grad_h.dtype), grad_x=flat(grad_y[part]), grad_weight=unused,
                batch=part.stop - part.start, first_shift=shift(0, focus_length, kernel_size, 'full'), tasks=tasks,
                n=kernel_size, masked=padding == 'same', want_x=False, want_w=False, threads=num_threads())
    return grad_y


def _geometry(focus_length: int, kernel_size: int, padding: str) -> dict[str, Any]:
    return dict(
        first_shift=shift(0, focus_length, kernel_size, padding), kernel_size=kernel_size,
        e=crop(kernel_size, padding))

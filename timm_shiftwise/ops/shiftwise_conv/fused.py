"""The fused way: small convolutions, shifts and additions in one Taichi kernel that makes only kept groups' maps.

Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3. Nothing K times as large as the input is written to memory, neither
here nor for backward, and the cost is in proportion to the share of kept groups.
"""
import torch

from timm_shiftwise.geometry import shift
from timm_shiftwise.ops.shift_add.taichi_backward import backward_kernel, backward_layout, write_list_length
from timm_shiftwise.ops.shift_add.taichi_forward import forward_kernel, forward_layout, read_list_length
from timm_shiftwise.ops.taichi.lanes import (
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

from .call import Branches, Call, Gradients


def fused_conv2d(call: Call) -> Branches:
    """The three branches, of tensors on the CPU in any memory format; without a mask, groups of zeros are skipped."""
    x, weight, wiring, mask, focus_length, padding, _ = call
    batch, channels, height, width = x.shape
    maps, size = weight.shape[1], weight.shape[2]
    shuffles, groups = wiring.shape[0], wiring.shape[2] // 2
    mask = (weight.detach() != 0).flatten(2).any(2) if mask is None else mask
    kind, real = kinds(x.dtype)
    outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(3)]
    stride = read_list_length(maps, groups, shuffles)
    for part in image_parts(batch, channels * height * width):
        planes = (part.stop - part.start) * channels
        image, branches = x[part].contiguous(), [out[part] for out in outs]
        pack = pack_size(width, image, *branches)
        with launching(x.device):
            layout = forward_layout(maps, height, width, focus_length, size, padding, most_vectors(), convolved=True)
            tasks = num_tasks(planes)
            out_h, out_v, out_i = (packed(branch, pack) for branch in branches)
            forward_kernel(real, pack, convolved=True)(
                **layout._asdict(), x=packed(image, pack),
                weight=weight.detach().to(summed_dtype(x.dtype)).contiguous().view(-1), mask=integers(mask),
                wiring=integers(wiring), lists=torch.empty(channels * stride, dtype=torch.int32),
                memory=scratch(tasks * layout.size, x.dtype), out_h=out_h, out_v=out_v, out_i=out_i, planes=planes,
                channels=channels, maps=maps, height=height, width=width, shuffles=shuffles, groups=groups,
                first_shift=shift(0, focus_length, size, 'full'), stride=stride, tasks=tasks, n=size,
                masked=padding == 'same', threads=num_threads(), kind=kind)
    return outs[0], outs[1], outs[2]


def fused_conv2d_backward(grads: Branches, call: Call, need_x: bool = True, need_weight: bool = True) -> Gradients:
    """Gradients; without a mask, a kernel that happens to be zero has one, too."""
    x, weight, wiring, mask, focus_length, padding, _ = call
    batch, channels, height, width = x.shape
    maps, size = weight.shape[1], weight.shape[2]
    shuffles, groups = wiring.shape[0], wiring.shape[2] // 2
    mask = torch.ones(channels, maps, dtype=torch.int32) if mask is None else mask
    kind, real = kinds(x.dtype)
    summed = summed_dtype(x.dtype)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    grad_weight = torch.zeros(weight.shape if need_weight else [0], dtype=summed)
    part_weight = torch.empty_like(grad_weight)
    for part in image_parts(batch, channels * height * width):
        planes = [plane[part].to(x.dtype).contiguous() for plane in (*grads, x)]
        grad_part = grad_x[part] if need_x else grad_x
        pack = pack_size(width, *planes, grad_part)
        with launching(x.device):
            layout = backward_layout(maps, height, width, focus_length, size, padding, most_vectors(), convolved=True)
            tasks = num_tasks(channels)
            grad_h, grad_v, grad_i, image = (packed(plane, pack) for plane in planes)
            backward_kernel(real, pack, convolved=True)(
                **layout._asdict(), grad_h=grad_h, grad_v=grad_v, grad_i=grad_i, x=image,
                weight=weight.detach().to(summed).contiguous().view(-1), mask=integers(mask), wiring=integers(wiring),
                lists=torch.empty(channels * write_list_length(maps, groups, shuffles), dtype=torch.int32),
                memory=scratch(tasks * layout.size, x.dtype), grad_x=packed(grad_part, pack),
                grad_weight=part_weight.view(-1), batch=part.stop - part.start, channels=channels, maps=maps,
                height=height, width=width, shuffles=shuffles, groups=groups,
                first_shift=shift(0, focus_length, size, 'full'), tasks=tasks, n=size, masked=padding == 'same',
                want_x=need_x, want_w=need_weight, threads=num_threads(), kind=kind)
        grad_weight += part_weight
    return grad_x if need_x else None, grad_weight.to(weight.dtype) if need_weight else None

"""Run the Taichi kernels that are made for GPUs on Vulkan, and compare them with the definition.

    apt-get install mesa-vulkan-drivers libvulkan1  # a Vulkan in software, where there is no GPU
    python ci/vulkan.py

Vulkan stands in for CUDA: the kernels are the same, the code that is generated from them is not.
"""
import sys
from typing import Any

import torch

from timm_shiftwise.geometry import crop, map_size, shift
from timm_shiftwise.layers.wiring import num_maps, released_wiring
from timm_shiftwise.ops.shift_add.torch_impl import shift_add_backward_torch, shift_add_torch
from timm_shiftwise.ops.taichi.lanes import flat, integers, kinds
from timm_shiftwise.ops.taichi.runtime import import_taichi

CASES = [
    ('sw', 51, 5, 'full', (2, 3, 9, 14)),
    ('p_sw', 13, 5, 'same', (1, 4, 7, 7)),
    ('eq_slak', 7, 3, 'full', (2, 2, 1, 5)),
    ('sw', 4, 2, 'same', (1, 3, 6, 1)),
    ('sw', 5, 7, 'full', (3, 1, 5, 8)),
]
"""Operator, M, N, padding, and the shape of the image."""
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def difference(seen: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, as a share of the largest element."""
    return float((seen.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def errors(case: tuple[Any, ...], dtype: torch.dtype) -> tuple[float, float]:
    """How far the forward and the backward kernel are from the definition in float64."""
    from timm_shiftwise.ops.shift_add.taichi_gather import backward_gather, forward_gather

    operator, length, size, padding, (batch, channels, height, width) = case
    wiring = released_wiring(operator, channels, length, size, 1 if operator == 'eq_slak' else 2)
    maps, generator = num_maps(operator, length, size), torch.Generator().manual_seed(0)
    map_height, map_width = map_size(height, size, padding), map_size(width, size, padding)
    y = torch.randn(batch, channels * maps, map_height, map_width, generator=generator).to(dtype)
    grads = [torch.randn(batch, channels, height, width, generator=generator).to(dtype) for _ in range(3)]
    outs, grad_y = [torch.empty_like(grad) for grad in grads], torch.empty_like(y)
    kind, real = kinds(dtype)
    sizes = dict(
        wiring=integers(wiring), planes=batch * channels, channels=channels, maps=maps, height=height, width=width,
        map_height=map_height, map_width=map_width, shuffles=wiring.shape[0], groups=wiring.shape[2] // 2,
        first_shift=shift(0, length, size, padding), kernel_size=size, e=crop(size, padding), kind=kind, real=real)
    forward_gather(**sizes, y=flat(y), **dict(zip(('out_h', 'out_v', 'out_i'), map(flat, outs), strict=True)))
    backward_gather(
        **sizes, **dict(zip(('grad_h', 'grad_v', 'grad_i'), map(flat, grads), strict=True)), grad_y=flat(grad_y))
    wanted = shift_add_torch(y.double(), wiring, length, size, padding)
    grad_h, grad_v, grad_i = (grad.double() for grad in grads)
    wanted_grad = shift_add_backward_torch(grad_h, grad_v, grad_i, wiring, maps, length, size, padding)
    return max(map(difference, outs, wanted)), difference(grad_y, wanted_grad)


def main() -> int:
    """Run all cases in all dtypes and return 1 if any is wrong, or if there is no Vulkan."""
    ti = import_taichi()
    ti.init(arch=ti.vulkan, log_level=ti.ERROR)
    if ti.lang.impl.current_cfg().arch != ti.vulkan:
        print('There is no Vulkan here: install mesa-vulkan-drivers and libvulkan1.')
        return 1
    wrong = 0
    for dtype, tolerance in TOLERANCES.items():
        found = [error for case in CASES for error in errors(case, dtype)]
        wrong += not max(found) <= tolerance
        print(f'{dtype}: largest error {max(found):.1e} of {len(found)} calls, at most {tolerance:.0e} is allowed')
    return int(wrong > 0)


if __name__ == '__main__':
    sys.exit(main())

"""What the Triton kernels compile to for GPUs that need not be there: registers, shared memory, instructions.

    python benchmarks/triton_ahead_of_time.py

For each stage of sw_tiny at batch 128, and for a map that is not square. A kernel that spills registers, or that has no
matrix instructions, is an error.
"""
import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from _common import RESULTS, STAGES, console, show, write_csv
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.tools.disasm import get_sass

from timm_shiftwise.layers.wiring import released_wiring
from timm_shiftwise.ops.shiftwise_conv.call import Call
from timm_shiftwise.ops.shiftwise_conv.fused_triton import (
    OPTIONS,
    Launch,
    forward_launch,
    input_gradient_launch,
    tap_products_launch,
)

KERNEL_SIZE = 5
MAPS = {
    **{f'stage {number}': (width, side, side, length) for number, (width, side, length) in enumerate(STAGES, 1)},
    'not square': (8, 9, 70, 13),
}
"""Channels, height, width and focus length by name."""
CAPABILITIES = (80, 90)  # A100, H100
KINDS = (
    (torch.bfloat16, torch.contiguous_format, 'full'),
    (torch.float16, torch.contiguous_format, 'full'),
    (torch.bfloat16, torch.channels_last, 'full'),
    (torch.bfloat16, torch.contiguous_format, 'same'),
)
"""Dtype, memory format of all maps that are read, and padding."""
POINTED = {torch.bfloat16: '*bf16', torch.float16: '*fp16', torch.float32: '*fp32'}


def launches(
        channels: int, height: int, width: int, focus_length: int, dtype: torch.dtype,
        memory_format: torch.memory_format, padding: str) -> Iterator[tuple[str, Launch]]:
    """What a layer starts in a training step, by name, on tensors without memory."""
    wiring = released_wiring('sw', channels, focus_length, KERNEL_SIZE, 1).to('meta')
    maps = torch.empty(4, 128, channels, height, width, dtype=dtype, device='meta')
    x, *grads = (each.contiguous(memory_format=memory_format) for each in maps)
    weight = x.new_empty(channels, wiring.shape[2] // 2, KERNEL_SIZE, KERNEL_SIZE)
    call = Call(x, weight, wiring, None, focus_length, padding)
    outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(4)]
    yield 'forward', forward_launch(call, outs[:3])
    yield 'input gradient', input_gradient_launch(call, grads, outs[3])
    for grad, branch in zip(grads, ('wide', 'tall'), strict=False):  # the square one's is the wide one's
        yield f'products, {branch}', tap_products_launch(call, grad, branch)[0]


def compiled(launch: Launch, capability: int) -> CompiledKernel:
    """The kernel as it is compiled at its first start on a GPU of a compute capability, which is given times ten."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = 'constexpr'
            constants[parameter.name] = value
            continue
        pointed = POINTED.get(getattr(value, 'dtype', None))
        signature[parameter.name] = pointed or 'i32'
        if pointed or value % 16 == 0:
            attributes[index,] = [['tt.divisibility', 16]]
    return triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes), target=GPUTarget('cuda', capability, 32),
        options=OPTIONS)


def facts(kernel: CompiledKernel) -> dict[str, Any]:
    """What a program of the kernel takes, and its instructions that matter."""
    binary = kernel.asm['cubin']
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(binary)
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, '--dump-resource-usage', file.name], check=True, capture_output=True,
            text=True).stdout
    registers, stack, local = (int(re.search(rf'\b{name}:(\d+)', usage)[1]) for name in ('REG', 'STACK', 'LOCAL'))
    code = get_sass(binary)
    matrix = re.findall(r'\b(HG?MMA)\.', code)
    return {
        'registers': registers, 'shared_bytes': kernel.metadata.shared, 'spilled_bytes': stack + local,
        'spills': len(re.findall(r'\b(?:STL|LDL)\b', code)), 'matrix': '/'.join(sorted(set(matrix))),
        'matrix_instructions': len(matrix), 'asynchronous_loads': len(re.findall(r'\bLDGSTS\.', code)),
    }


def main() -> None:
    """Compile, check, print and write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('--quick', action='store_true', help='two of the maps, in bfloat16 only')
    options.add_argument('--output', type=Path, default=RESULTS / 'triton', help='where to write: .csv is added')
    args = options.parse_args()
    rows = []
    for shown, shape in MAPS.items():
        if args.quick and shown not in ('stage 1', 'not square'):
            continue
        for dtype, memory_format, padding in KINDS[:1] if args.quick else KINDS:
            kind = {
                'map': shown, 'dtype': str(dtype).removeprefix('torch.'), 'padding': padding,
                'layout': 'contiguous' if memory_format == torch.contiguous_format else 'channels last'}
            for name, launch in launches(*shape, dtype, memory_format, padding):
                for capability in CAPABILITIES:
                    row = {'kernel': name, **kind, 'capability': capability, **facts(compiled(launch, capability))}
                    if row['spills'] or row['spilled_bytes'] or not row['matrix_instructions']:
                        raise AssertionError(f'It spills registers, or multiplies no matrices: {row}')
                    rows.append(row)
    show('compiled', [name.replace('_', ' ') for name in rows[0]], [list(map(str, row.values())) for row in rows])
    path = write_csv(args.output, rows, torch.device('cpu'), {'triton': triton.__version__})
    console.print(f'wrote {path}')


if __name__ == '__main__':
    main()

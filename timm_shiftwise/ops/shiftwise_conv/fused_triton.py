"""The Triton way: the three branches in one kernel of matrix products whose Toeplitz matrices are never stored.

Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3, read backwards. Maps of any layout are read as they lie. Beside the
results only products for the gradient of the kernels are written, one branch's after the other's, in float32: N * W for
each column of a channel, or up to about N * (M + 90) where the map is wider than a tile; for the tall branch with rows.
"""
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from timm_shiftwise.geometry import num_groups
from timm_shiftwise.ops.depthwise.torch_impl import diagonal_sums
from timm_shiftwise.ops.large_kernels import assemble_centred, merged_sides, small_kernel_gradient

from .call import Branches, Call, Gradients
from .shift import shift_conv2d, shift_conv2d_backward
from .triton_kernels import forward_kernel, input_gradient_kernel, tap_products_kernel

LEAST_CAPABILITY = (8, 0)
"""Of GPUs: from there on they multiply bfloat16 and load asynchronously."""
BRANCHES = ('wide', 'tall', 'square')
"""In the order of the operator's results."""
OPTIONS = {'maxnreg': 255}
"""Of the compiler: all registers that there are, for left alone it spills a few so that more programs fit."""
_SMALLEST, _LARGEST = 16, {2: 64, 4: 32}
"""Side of a tile, by bytes of an element: what matrix instructions take at least, and what registers hold."""
_LINES = 64
"""Lines of a tile: of a map or of several images' small maps."""
_DEPTH = 32
"""Products that are summed at a time, at most; with more of them registers spill."""


class Launch(NamedTuple):
    """A kernel and what it is started with.

    Attributes:
        kernel: The kernel.
        programs: How many programs run, each for a tile.
        arguments: Tensors, numbers and constants by name.
    """
    kernel: Any
    programs: int
    arguments: dict[str, Any]

    def run(self, device: torch.device) -> None:
        """Start it on the device where its tensors are."""
        if self.programs:
            with torch.cuda.device(device if device.type == 'cuda' else -1):
                self.kernel[(self.programs,)](**self.arguments, **OPTIONS)


def triton_conv2d(call: Call) -> Branches:
    """The three branches, in float16, bfloat16 or float32."""
    x = call.x
    wide, tall, centre = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(3))
    forward_launch(call, (wide, tall, centre)).run(x.device)
    return wide, tall, centre


def triton_conv2d_backward(grads: Branches, call: Call, need_x: bool, need_weight: bool) -> Gradients:
    """Gradients; every run adds up in the same order."""
    x, weight, wiring, _, focus_length, *_ = call
    planes = [grad.to(x.dtype) for grad in grads]
    if len({plane.stride() for plane in planes}) > 1:
        planes = [plane.contiguous() for plane in planes]
    grad_x = grad_weight = None
    if need_x:
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        input_gradient_launch(call, planes, grad_x).run(x.device)
    if need_weight:
        wide, tall, square = (_tap_gradient(call, *each) for each in zip(planes, BRANCHES, strict=True))
        grad_weight = small_kernel_gradient(
            wide, tall.mT, square, wiring, weight.shape[1], weight.shape[2], focus_length).to(weight.dtype)
    return grad_x, grad_weight


@lru_cache
def fault(device: torch.device, dtype: torch.dtype, kernel_size: int, padding: str) -> str | None:
    """What is wrong with the kernels on a device, as a clause; None if a small call is computed right there.

    It is found out once in a process, before anything relies on them: a compiler of C may be missing, which Triton
    needs to start kernels, and nobody would notice one that was compiled wrong.
    """
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        seen, least = torch.cuda.get_device_capability(device), LEAST_CAPABILITY
        return f'it is made for GPUs of compute capability {least[0]}.{least[1]} and up, not {seen[0]}.{seen[1]}'
    generator = torch.Generator().manual_seed(0)
    focus_length, channels = 7, 2
    groups = num_groups(focus_length, kernel_size)
    where: dict[str, Any] = dict(generator=generator, device=generator.device)
    maps = torch.randn(4, 3, channels, 5, 66, **where).to(dtype)  # some tiles side by side
    weight = torch.randn(channels, groups, kernel_size, kernel_size, **where).to(dtype)
    wiring = torch.randint(groups, [2, channels, 2 * groups + 1], **where)

    def computed(
            forward: Callable[..., Branches], backward: Callable[..., Gradients], maps: Tensor, weight: Tensor,
            wiring: Tensor) -> list[Tensor]:
        x, *grads = maps
        call = Call(x, weight, wiring, None, focus_length, padding, 'torch')
        return [*forward(call), *(grad for grad in backward(grads, call, True, True) if grad is not None)]

    wanted = computed(shift_conv2d, shift_conv2d_backward, maps.double(), weight.double(), wiring)
    try:
        found = computed(
            triton_conv2d, triton_conv2d_backward, maps.to(device), weight.to(device), wiring.to(device))
        off = float(torch.stack([
            (a.cpu().double() - b).abs().max() / b.abs().max() for a, b in zip(found, wanted, strict=True)]).max())
    except Exception as error:  # noqa: BLE001  (whatever a compiler or a driver raises)
        return f'it fails on {device}: {type(error).__name__}, {" ".join(str(error).split())[:200]}'
    most = 8 * (2 ** -10 if _precision() == 'tf32' else torch.finfo(dtype).eps)
    return None if off <= most else f'it is wrong on {device}: off by {off:.1g} where rounding is at most {most:.1g}'


def forward_launch(call: Call, outs: Sequence[Tensor]) -> Launch:
    """What computes the three branches into contiguous maps."""
    return _launch(forward_kernel, call, call.x, {'x': call.x}, outs, 'out', 3)


def input_gradient_launch(call: Call, grads: Sequence[Tensor], grad_x: Tensor) -> Launch:
    """What computes the gradient of the input into a contiguous map, of gradients with the same strides."""
    return _launch(input_gradient_kernel, call, grads[0], {'grad_x': grad_x}, grads, 'grad', 1)


def _launch(
        kernel: Any, call: Call, read: Tensor, maps: dict[str, Tensor], branches: Sequence[Tensor], name: str,
        programs: int) -> Launch:
    """A launch of so many programs for each tile, which read maps laid out like one of them."""
    batch, channels, height, width = call.x.shape
    wide, tall, square = assemble_centred(call.weight, call.wiring, call.focus_length, height, width)
    block_height, block_width = _side(height, read), _side(width, read)
    depth = min(_DEPTH, block_height, block_width)
    images = _LINES // max(block_height, block_width)
    zeros = max(block_height, block_width) + depth
    tiles = triton.cdiv(batch, images) * triton.cdiv(height, block_height) * triton.cdiv(width, block_width)
    return Launch(kernel, programs * tiles * channels, dict(
        maps, **{f'{name}_{branch}': each for branch, each in zip(BRANCHES, branches, strict=True)},
        **{branch: F.pad(taps, [zeros, zeros]).contiguous()
           for branch, taps in zip(BRANCHES, (wide, tall.mT, square), strict=True)},
        batch=batch, channels=channels, height=height, width=width, **_strides('stride', read),
        reach_wide=wide.shape[2] // 2, reach_tall=tall.shape[1] // 2, align=_alignment(read), zeros=zeros,
        images=images, block_height=block_height, block_width=block_width, depth=depth, **_settings(call)))


def tap_products_launch(call: Call, grad: Tensor, branch: str) -> tuple[Launch, Tensor, range]:
    """What computes products of a branch's gradient with the input, these, and their diagonals by the taps' order."""
    x, size = call.x, call.weight.shape[2]
    batch, channels, height, width = x.shape
    lines, columns = (width, height) if branch == 'tall' else (height, width)
    block_lines, block_columns = min(_side(lines, x), _DEPTH), _side(columns, x)
    reach = size // 2 if branch == 'square' else min(merged_sides(call.focus_length, size)[0] // 2, columns - 1)
    tiles = triton.cdiv(columns, block_columns)
    lead = 0 if tiles == 1 else triton.cdiv(reach, 16) * 16  # what is left of a tile; a multiple keeps it aligned
    span = columns if tiles == 1 else block_columns + 2 * lead
    settings = _settings(call)
    settings['same'] &= branch != 'square'
    products = x.new_empty([channels, settings['rows'], tiles, block_columns, span], dtype=torch.float32)
    programs = math.prod(products.shape[:3]) * triton.cdiv(span, block_columns)
    return Launch(tap_products_kernel, programs, dict(
        x=x, grad=grad, products=products, batch=batch, channels=channels, height=height, width=width,
        **_strides('x', x), **_strides('grad', grad), tiles=tiles, span=span, lead=lead, align=_alignment(x, grad),
        tall=branch == 'tall', images=_DEPTH // block_lines, block_lines=block_lines, block_columns=block_columns,
        **settings)), products, range(lead - reach, lead + reach + 1)


def _tap_gradient(call: Call, grad: Tensor, branch: str) -> Tensor:
    """Gradient [C, rows, 2 * reach + 1] of a branch's kernels, which lie along its lines."""
    launch, products, diagonals = tap_products_launch(call, grad, branch)
    launch.run(grad.device)
    return diagonal_sums(products, diagonals.start, len(diagonals)).sum(2)


def _side(length: int, read: Tensor) -> int:
    return min(max(triton.next_power_of_2(length), _SMALLEST), _LARGEST[read.element_size()])


def _strides(name: str, read: Tensor) -> dict[str, int]:
    return dict(zip((f'{name}_image', f'{name}_channel', f'{name}_row', f'{name}_column'), read.stride(), strict=True))


def _alignment(*read: Tensor) -> int:
    """Elements, up to 8, that rows are aligned to: so many are loaded at once."""
    return math.gcd(8, *(number for each in read for number in (each.shape[3], *each.stride()[:3])))


def _precision() -> str:
    """How float32 is multiplied: as in PyTorch's own matrix products."""
    return 'tf32' if torch.backends.cuda.matmul.fp32_precision == 'tf32' else 'ieee'


def _settings(call: Call) -> dict[str, Any]:
    size = call.weight.shape[2]
    return dict(
        rows=2 * (size // 2) + 1, focus_length=call.focus_length, size=size, same=call.padding == 'same',
        precision=_precision(),
        upcast=triton.knobs.runtime.interpret)  # Triton's interpreter multiplies the bits of bfloat16

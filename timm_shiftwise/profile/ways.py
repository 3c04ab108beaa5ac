"""How an operator is computed, and why so."""
from typing import NamedTuple

import torch
from torch import Tensor

from timm_shiftwise.layers import LargeKernelConv2d, MergedConv2d, MergedShiftConv2d, ShiftwiseConv2d
from timm_shiftwise.ops.backend import explain_backend
from timm_shiftwise.ops.shiftwise_conv.call import Call
from timm_shiftwise.ops.shiftwise_conv.ways import choose_way
from timm_shiftwise.sparsity.masks import random_mask

from .operators import Operator, operator_shape


class Way(NamedTuple):
    """How an operator is computed.

    Attributes:
        name: The way in a few words.
        reason: A clause that says why it is taken, for people.
    """
    name: str
    reason: str


def call_of(operator: ShiftwiseConv2d | MergedShiftConv2d, x: Tensor, kept: int | None = None) -> Call:
    """A call of an operator of small kernels, with weights of no meaning.

    Args:
        operator: The operator.
        x: Its input [B, C, H, W], without the ghosts.
        kept: Small kernels that it keeps, of all channels together; None for a call without a mask.
    """
    _, channels, maps, _, size = operator_shape(operator)
    mask = None if kept is None else random_mask((channels, maps), kept, seed=0, step=0, layer=0).to(x.device)
    return Call(
        x, x.new_zeros(channels, maps, size, size), torch.zeros_like(operator.wiring, device=x.device), mask,
        operator.focus_length, operator.padding, operator.backend)


@torch.inference_mode()
def way_of(operator: Operator, height: int, width: int, kept: int, device: torch.device) -> Way:
    """Tell how an operator is computed at inference.

    Args:
        operator: The operator.
        height: H of its map.
        width: W of its map.
        kept: Small kernels that it keeps, of all channels together.
        device: Where its input is.

    Raises:
        RuntimeError: If the operator asks for a backend that cannot run here.
    """
    if isinstance(operator, LargeKernelConv2d):
        return Way('large', "SLaK's operator convolves with its large kernels")
    if isinstance(operator, MergedConv2d):
        return Way('merged', 'the network is reparameterized: one tall and one wide convolution, whatever is kept')
    x = torch.empty(1, operator_shape(operator).channels, height, width, device=device)
    choice = choose_way(call_of(operator, x, kept))
    if choice.way.name != 'shift':
        return Way(choice.way.name, choice.reason)
    backend = explain_backend(operator.backend, device)
    library = {'taichi': 'Taichi', 'torch': 'PyTorch'}[backend.backend]
    return Way('shift', f'{choice.reason}; maps are added in {library}: {backend.reason}')

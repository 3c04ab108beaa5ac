"""How an operator is computed, and why so."""
from typing import NamedTuple

import torch

from timm_shiftwise.layers import LargeKernelConv2d, MergedConv2d
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
    _, channels, maps, _, size = operator_shape(operator)
    x = torch.empty(1, channels, height, width, device=device)
    weight = torch.empty(channels, maps, size, size, device=device)
    mask = random_mask((channels, maps), kept, seed=0, step=0, layer=0).to(device)
    wiring = torch.zeros_like(operator.wiring, device=device)
    choice = choose_way(Call(x, weight, wiring, mask, operator.focus_length, operator.padding, operator.backend))
    if choice.way.name != 'shift':
        return Way(choice.way.name, choice.reason)
    backend = explain_backend(operator.backend, device)
    library = {'taichi': 'Taichi', 'torch': 'PyTorch'}[backend.backend]
    return Way('shift', f'{choice.reason}; maps are added in {library}: {backend.reason}')

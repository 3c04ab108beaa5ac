"""Taking the ghosts out of a map and putting them back, with gradients that cost no more than that.

PyTorch's derivative of a selection of channels adds into zeros channel by channel, and its BatchNorm on the CPU is
slow, forward and backward, for a gradient that is not laid out as its input is. Both take longer than a convolution.
"""
import torch
from torch import Tensor
from torch.autograd import Function

from .tracing import graph_leaves_python


class _SplitChannels(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kept: Tensor, ghost: Tensor) -> tuple[Tensor, Tensor]:
        x = x.contiguous()  # or each of the two selections makes a copy of its own
        return x.index_select(1, kept), x.index_select(1, ghost)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, kept, ghost = inputs
        ctx.save_for_backward(kept, ghost)

    @staticmethod
    def backward(ctx, grad_worked, grad_ghosts):
        kept, ghost = ctx.saved_tensors
        places = torch.cat([kept, ghost]).argsort()  # of every channel of x among those of the two gradients
        return torch.cat([grad_worked, grad_ghosts], dim=1).index_select(1, places), None, None


class _ContiguousGradient(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous()


def split_channels(x: Tensor, kept: Tensor, ghost: Tensor) -> tuple[Tensor, Tensor]:
    """Part the channels of a map.

    Args:
        x: Map [B, dim, H, W].
        kept: Channels of the first part, [C].
        ghost: Those of the second, [dim - C]; each channel is in one of the two.

    Returns:
        The channels worked on, [B, C, H, W], and the ghosts, [B, dim - C, H, W].
    """
    if torch.jit.is_scripting():
        return x.index_select(1, kept), x.index_select(1, ghost)
    else:
        if graph_leaves_python():
            return x.index_select(1, kept), x.index_select(1, ghost)
        return _SplitChannels.apply(x, kept, ghost)


def contiguous_gradient(x: Tensor) -> Tensor:
    """The tensor itself; its gradient, which may come with channels last, is made contiguous once for all its uses."""
    if torch.jit.is_scripting():
        return x
    else:
        if graph_leaves_python():
            return x
        return _ContiguousGradient.apply(x)

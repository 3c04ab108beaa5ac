"""Gradients in the layout that what they meet is fast with."""
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .tracing import graph_leaves_python


class _ContiguousGradient(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def contiguous_gradient(x: Tensor) -> Tensor:
    """The tensor itself; its gradient, which may come with channels last, is made contiguous once for all its uses.

    PyTorch's BatchNorm on the CPU is slow, forward and backward, for a gradient that is not laid out as its input is.
    """
    if torch.jit.is_scripting():
        return x
    else:
        if graph_leaves_python():
            return x
        return _ContiguousGradient.apply(x)

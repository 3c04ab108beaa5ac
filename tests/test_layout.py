"""Gradients in the layout that what they meet is fast with."""
import pytest
import torch

from timm_shiftwise.ops import contiguous_gradient


@pytest.mark.parametrize('size', [(2, 5, 3, 7), (1, 2, 1, 1), (3, 7, 1, 4)])
def test_contiguous_gradient_changes_the_layout_of_the_gradient_alone(size):
    x = torch.randn(size, requires_grad=True)
    seen = []
    middle = x * 1
    middle.register_hook(lambda grad: seen.append(grad.is_contiguous()))
    grad = torch.randn(size).contiguous(memory_format=torch.channels_last)
    out = contiguous_gradient(middle)
    out.backward(grad)
    assert seen == [True]
    assert torch.equal(out, x) and torch.equal(x.grad, grad)


def test_contiguous_gradient_is_differentiable_twice():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: contiguous_gradient(x).square(), x)


def test_contiguous_gradient_goes_through_the_transforms_of_torch_func():
    x = torch.randn(3, 2, 5, 4, 4)
    grads = torch.func.vmap(torch.func.grad(lambda x: contiguous_gradient(2 * x).sum()))(x)
    assert torch.equal(grads, torch.full_like(x, 2))

import pytest
import torch

from timm_shiftwise.ops import contiguous_gradient, split_channels

SIZES = [(2, 5, 3, 7), (1, 2, 1, 1), (3, 7, 1, 4)]


def parts(dim):
    order = torch.randperm(dim, generator=torch.Generator().manual_seed(0))
    return order[dim // 2:].sort().values, order[:dim // 2].sort().values


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_split_parts_the_channels_and_its_gradients_are_exact(size, memory_format):
    kept, ghost = parts(size[1])
    x = torch.randn(size, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    worked, ghosts = split_channels(x, kept, ghost)
    assert torch.equal(worked, x[:, kept]) and torch.equal(ghosts, x[:, ghost])
    assert torch.autograd.gradcheck(lambda x: split_channels(x, kept, ghost), x)
    assert torch.autograd.gradgradcheck(lambda x: split_channels(x, kept, ghost), x)


def test_gradient_of_a_split_of_which_one_part_is_not_used():
    kept, ghost = parts(5)
    x = torch.randn(2, 5, 3, 3, requires_grad=True)
    split_channels(x, kept, ghost)[1].sum().backward()
    wanted = torch.zeros(5)
    wanted[ghost] = 1
    assert torch.equal(x.grad, wanted[None, :, None, None].expand(2, 5, 3, 3))


@pytest.mark.parametrize('size', SIZES)
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


def test_under_the_transforms_of_torch_func():
    kept, ghost = parts(5)

    def loss(x):
        worked, ghosts = split_channels(x, kept, ghost)
        return contiguous_gradient(torch.cat([worked, 2 * ghosts], dim=1)).sum()

    x = torch.randn(3, 2, 5, 4, 4)
    grads = torch.func.vmap(torch.func.grad(loss))(x)
    wanted = torch.ones(5)
    wanted[ghost] = 2
    assert torch.equal(grads, wanted[None, None, :, None, None].expand_as(x))

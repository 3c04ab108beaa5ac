"""Depthwise convolutions with large kernels, and their gradients, against PyTorch's own."""
import pytest
import torch
import torch.nn.functional as F
from pairwise import pairwise
from torch import Tensor

from timm_shiftwise.ops.depthwise import large_depthwise_conv2d, large_kernel_gradients, torch_impl

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

pytestmark = pytest.mark.usefixtures('poisoned_memory')


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_conv2d(x: Tensor, kernel: Tensor) -> Tensor:
    rows, columns = kernel.shape[1:]
    return F.conv2d(x, kernel.unsqueeze(1), padding=(rows // 2, columns // 2), groups=x.shape[1])


def assert_near(seen: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert seen.shape == wanted.shape
    if wanted.numel():
        scale = max(wanted.abs().max().item(), 1.)
        assert (seen.double() - wanted.double()).abs().max().item() <= tolerance * scale


@pairwise({'rows': [1, 3, 9], 'columns': [1, 3, 7], 'height, width': [(1, 1), (5, 4), (31, 2)]})
def test_the_weight_gradient_is_pytorchs(rows, columns, height, width, monkeypatch):
    monkeypatch.setitem(torch_impl._WINDOW_ELEMENTS, 'cpu', 100)  # several chunks of channels
    x, grad = noise(2, 5, height, width), noise(2, 5, height, width, seed=1)
    wanted = torch.nn.grad.conv2d_weight(
        x, (5, 1, rows, columns), grad, padding=(rows // 2, columns // 2), groups=5).squeeze(1)
    seen = torch_impl.depthwise_weight_gradient(x, grad, rows, columns)
    torch.testing.assert_close(seen, wanted, rtol=1e-12, atol=1e-12)
    seen = torch_impl.large_depthwise_weight_gradient(x, grad, rows, columns)
    torch.testing.assert_close(seen, wanted, rtol=1e-12, atol=1e-12)


@pairwise({'rows, columns': [(1, 1), (51, 5), (5, 51), (3, 3)], 'height, width': [(1, 1), (5, 4), (31, 2), (1, 60)]})
def test_what_lies_beyond_the_map_makes_no_difference(rows, columns, height, width):
    x, kernel = noise(2, 3, height, width), noise(3, rows, columns, seed=1)
    assert_near(large_depthwise_conv2d(x, kernel), plain_conv2d(x, kernel), 1e-12)


@pairwise({
    'backend': ['torch', 'taichi'],
    'size': [1, 3, 5],
    'long, height, width': [(51, 7, 11), (9, 1, 1), (5, 23, 31), (1, 2, 17), (15, 13, 8)],
    'dtype': TOLERANCE,
    'batch': [3, 1, 0],
    'want': [(True, True), (True, False), (False, True)],
})
@pytest.mark.usefixtures('needs_taichi')
def test_the_gradients_of_three_kernels_are_autograds(backend, size, long, height, width, dtype, batch, want):
    sides = [(size, max(long, size)), (max(long, size), size), (size, size)]
    x = noise(batch, 3, height, width, dtype=dtype)
    kernels = [noise(3, *side, seed=1, dtype=dtype) for side in sides]
    grads = [noise(batch, 3, height, width, seed=seed, dtype=dtype) for seed in (2, 3, 4)]
    exact_x, exact = x.double().requires_grad_(), [kernel.double().requires_grad_() for kernel in kernels]
    out = [plain_conv2d(exact_x, kernel) for kernel in exact]
    wanted_x, *wanted = torch.autograd.grad(out, (exact_x, *exact), [grad.double() for grad in grads])

    grad_x, grad_kernels = large_kernel_gradients(tuple(grads), x, tuple(kernels), backend, *want)
    assert (grad_x is not None, grad_kernels is not None) == want
    if grad_x is not None:
        assert grad_x.dtype == dtype
        assert_near(grad_x, wanted_x, TOLERANCE[dtype])
    for seen, kernel in zip(grad_kernels or (), wanted, strict=grad_kernels is not None):
        assert seen.dtype == torch.promote_types(dtype, torch.float32)
        assert_near(seen, kernel, TOLERANCE[dtype])


def test_kernels_too_large_to_be_unrolled_have_their_gradients_in_pytorch(monkeypatch):
    called = []
    monkeypatch.setattr(
        'timm_shiftwise.ops.depthwise.frontend.large_kernel_gradients_torch', lambda *args: called.append(args))
    grads = kernels = (noise(1, 9, 9),) * 3
    large_kernel_gradients(grads, noise(1, 1, 4, 4), kernels, 'taichi', True, True)
    assert len(called) == 1


def test_gradients_in_taichi_are_those_of_a_program_that_can_run(monkeypatch):
    from timm_shiftwise.ops.taichi import runtime
    monkeypatch.setattr(runtime, 'obstacle', lambda device: 'it rains')
    grads = kernels = (noise(1, 3, 3),) * 3
    with pytest.raises(RuntimeError, match='it rains'):
        large_kernel_gradients(grads, noise(1, 1, 4, 4), kernels, 'taichi', True, True)

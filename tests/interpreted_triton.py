"""The Triton way against the definition, in Triton's interpreter on the CPU; ``test_triton.py`` runs this file.

The environment variable TRITON_INTERPRET chooses the interpreter when Triton is imported: hence a process of its own.
"""
import pytest
import torch
from pairwise import pairwise
from test_shiftwise_conv import TOLERANCE, assert_close, make

from timm_shiftwise.ops import shiftwise_conv2d
from timm_shiftwise.ops.shiftwise_conv import fused_triton, ways
from timm_shiftwise.ops.shiftwise_conv.call import Call
from timm_shiftwise.ops.shiftwise_conv.fused_triton import fault, forward_launch
from timm_shiftwise.ops.shiftwise_conv.shift import reference_conv2d

CPU = torch.device('cpu')

pytestmark = pytest.mark.usefixtures('poisoned_memory')


@pytest.fixture
def forced(monkeypatch):
    """Have the Triton way taken, which nothing hinders."""
    way = ways.WAYS['triton']._replace(obstacle=lambda call: None)
    monkeypatch.setitem(ways.WAYS, 'triton', way)
    monkeypatch.setenv(ways.ENVIRONMENT_VARIABLE, 'triton')


def laid_out(layout, x, *grads):
    """Tensors in a memory layout: mixed, that of the last gradient is another, as it comes out of a sum."""
    memory_format = torch.contiguous_format if layout == 'contiguous' else torch.channels_last
    x, *grads = (each.contiguous(memory_format=memory_format) for each in (x, *grads))
    if layout == 'mixed':
        grads[2] = grads[2][:1, :1, :1, :1].expand(x.shape)
    return x, *grads


@pairwise({
    'batch, channels, height, width, focus_length, kernel_size': [
        (3, 2, 7, 7, 13, 5),
        (1, 2, 14, 14, 47, 5),
        (2, 1, 5, 70, 9, 3),  # tiles side by side
        (1, 1, 67, 12, 21, 4),  # one below the other; even
        (1, 2, 1, 1, 3, 1),
    ],
    'padding': ['full', 'same'],
    'dtype': [torch.float32, torch.float16, torch.bfloat16],
    'layout': ['contiguous', 'channels last', 'mixed'],
    'density': [None, 0.5],
})
def test_branches_and_gradients_equal_the_definition(
        batch, channels, height, width, focus_length, kernel_size, padding, dtype, layout, density, forced):
    x, weight, wiring = make(channels, focus_length, kernel_size, 2, height, width, dtype, batch)
    generator = torch.Generator().manual_seed(1)
    mask = None if density is None else torch.rand(weight.shape[:2], generator=generator) < density
    grads = torch.randn(3, *x.shape, generator=generator).to(dtype)
    x, *grads = laid_out(layout, x, *grads)
    inputs = x.requires_grad_(), weight.requires_grad_()
    branches = shiftwise_conv2d(x, weight, wiring, focus_length, padding, mask)
    seen = *branches, *torch.autograd.grad(branches, inputs, grads)
    exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    kept = exact[1] if mask is None else exact[1] * mask[:, :, None, None]
    branches = reference_conv2d(exact[0], kept, wiring, focus_length, padding)
    wanted = *branches, *torch.autograd.grad(branches, exact, [grad.double() for grad in grads])
    assert_close(seen, wanted, TOLERANCE[dtype], dtype)


def test_an_empty_batch(forced):
    x, weight, wiring = make(2, 7, 3, 1, 5, 3, torch.float32, batch=0)
    branches = shiftwise_conv2d(x.requires_grad_(), weight.requires_grad_(), wiring, 7)
    sum(branch.sum() for branch in branches).backward()
    assert branches[0].shape == x.grad.shape == x.shape
    assert weight.grad.eq(0).all()


def test_float32_is_multiplied_as_in_pytorchs_matrix_products():
    x, weight, wiring = make(1, 3, 3, 1, 2, 2, torch.float32)
    call = Call(x, weight, wiring, None, 3)
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (('highest', 'ieee'), ('high', 'tf32')):
            torch.set_float32_matmul_precision(setting)
            assert forward_launch(call, [x, x, x]).arguments['precision'] == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_no_fault_is_found_with_what_is_right(dtype):
    fault.cache_clear()
    assert fault(CPU, dtype, 3, 'same') is None


def test_a_wrong_result_and_an_error_are_faults(monkeypatch):
    fault.cache_clear()
    right = fused_triton.diagonal_sums
    monkeypatch.setattr(fused_triton, 'diagonal_sums', lambda *args: 1.001 * right(*args))
    assert 'wrong on cpu: off by 0.001' in fault(CPU, torch.float32, 3, 'full')
    monkeypatch.setattr(fused_triton, 'forward_kernel', {})
    assert fault(CPU, torch.float32, 5, 'full').startswith('it fails on cpu: KeyError')

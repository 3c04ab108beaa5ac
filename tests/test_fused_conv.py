"""The fused Taichi way of the shift-wise convolution against the small convolutions and the shift-add in PyTorch."""
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from timm_shiftwise.geometry import num_groups
from timm_shiftwise.ops.shiftwise_conv.call import Call
from timm_shiftwise.ops.shiftwise_conv.shift import reference_conv2d

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# relative to the largest value: the reference rounds its maps to the type, the fused kernel only its results
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

pytestmark = pytest.mark.usefixtures('poisoned_memory', 'needs_taichi')


def problem(batch, channels, maps, height, width, shuffles, focus_length, kernel_size, density, dtype, seed=0):
    """Input, kernels of which some are pruned, their mask, and a wiring with repeats."""
    generator = torch.Generator().manual_seed(seed)
    places = 2 * num_groups(focus_length, kernel_size) + 1
    x = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(channels, maps, generator=generator) < density
    weight = torch.randn(channels, maps, kernel_size, kernel_size, generator=generator, dtype=torch.float64).to(dtype)
    wiring = torch.randint(maps, [shuffles, channels, places], generator=generator, dtype=torch.int32)
    return x, weight * mask[:, :, None, None], mask, wiring


def assert_near(got, want, dtype):
    assert got.dtype == dtype
    scale = want.double().abs().max().clamp(min=1).item() if want.numel() else 1
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


def compare(x, weight, mask, wiring, focus_length, padding, dtype):
    """Branches and both gradients, with the mask given and found from the kernels."""
    from timm_shiftwise.ops.shiftwise_conv.fused import fused_conv2d, fused_conv2d_backward
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    branches = reference_conv2d(exact_x, exact_weight, wiring, focus_length, padding)
    grads = [torch.randn(b.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for b in branches]
    grads = [grad.to(dtype) for grad in grads]
    want_x, want_weight = torch.autograd.grad(branches, (exact_x, exact_weight), [grad.double() for grad in grads])
    for given_mask in (None, mask):
        call = Call(x, weight, wiring, given_mask, focus_length, padding)
        for got, want in zip(fused_conv2d(call), branches, strict=True):
            assert_near(got, want, dtype)
        grad_x, grad_weight = fused_conv2d_backward(grads, call)
        assert_near(grad_x, want_x, dtype)
        kept = torch.ones_like(mask) if given_mask is None else given_mask
        assert_near(grad_weight, want_weight * kept[:, :, None, None], dtype)


@pytest.mark.parametrize('channels, size, focus_length, dtype, density', [
    (2, 56, 51, torch.float32, 0.3),
    (3, 28, 49, torch.float32, 1.0),
    (4, 14, 47, torch.float32, 0.3),
    (5, 7, 13, torch.float32, 0.0),
    (3, 28, 49, torch.float64, 0.3),
    (4, 14, 47, torch.bfloat16, 1.0),
    (5, 7, 13, torch.float16, 0.3),
], ids=str)
def test_at_the_sizes_of_the_networks(channels, size, focus_length, dtype, density):
    maps = num_groups(focus_length, 5)
    x, weight, mask, wiring = problem(2, channels, maps, size, size, 4, focus_length, 5, density, dtype)
    compare(x, weight, mask, wiring, focus_length, 'full', dtype)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    focus_length=st.integers(1, 70),
    kernel_size=st.sampled_from([1, 3]),
    padding=st.sampled_from(['full', 'same']),
    batch=st.integers(0, 2),
    channels=st.integers(1, 3),
    maps=st.integers(1, 6),
    height=st.integers(1, 40),
    width=st.sampled_from([1, 7, 8, 18, 20, 33, 40]),  # each is a kernel to be compiled
    shuffles=st.integers(1, 3),
    density=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 2 ** 16),
)
def test_on_any_shape(
        focus_length, kernel_size, padding, batch, channels, maps, height, width, shuffles, density, seed):
    x, weight, mask, wiring = problem(
        batch, channels, maps, height, width, shuffles, focus_length, kernel_size, density, torch.float64, seed)
    compare(x, weight, mask, wiring, focus_length, padding, torch.float64)


def test_a_map_of_horizontal_vertical_and_identity_kernels_of_their_own():
    """K = 2G + 1."""
    x, weight, mask, _ = problem(2, 3, 7, 9, 11, 1, 13, 5, 1.0, torch.float64)
    wiring = torch.arange(7, dtype=torch.int32).repeat(1, 3, 1)
    compare(x, weight, mask, wiring, 13, 'full', torch.float64)


@pytest.mark.parametrize('width, pack', [(11, 1), (18, 2), (12, 4), (24, 8)])
def test_memory_layout_does_not_matter(width, pack):
    from timm_shiftwise.ops.shiftwise_conv.fused import fused_conv2d
    from timm_shiftwise.ops.taichi.lanes import pack_size
    x, weight, mask, wiring = problem(2, 3, 4, 9, width, 2, 20, 5, 1.0, torch.float32)
    want = fused_conv2d(Call(x, weight, wiring, mask, 20))
    unaligned, by_two = (torch.zeros(x.numel() + n)[n:].view(x.shape).copy_(x) for n in (1, 2))
    assert [pack_size(width, each) for each in (x, unaligned, by_two)] == [pack, 1, min(pack, 2)]
    for variant in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT, unaligned, by_two):
        for got, expected in zip(fused_conv2d(Call(variant, weight, wiring, mask, 20)), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize('need_x, need_weight', [(True, False), (False, True)])
def test_only_the_gradients_wanted_are_made(need_x, need_weight):
    from timm_shiftwise.ops.shiftwise_conv.fused import fused_conv2d_backward
    x, weight, mask, wiring = problem(2, 3, 4, 9, 11, 2, 20, 5, 0.7, torch.float64)
    arguments = [torch.randn_like(x) for _ in range(3)], Call(x, weight, wiring, mask, 20)
    both = fused_conv2d_backward(*arguments)
    some = fused_conv2d_backward(*arguments, need_x=need_x, need_weight=need_weight)
    for got, want, needed in zip(some, both, (need_x, need_weight), strict=True):
        if needed:
            torch.testing.assert_close(got, want, rtol=0, atol=0)
        else:
            assert got is None

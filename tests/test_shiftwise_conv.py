"""Every way to compute a shift-wise convolution equals the definition: small convolutions, then the shift-add."""
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from timm_shiftwise.layers.wiring import Wiring, separate_wiring, shuffled_wiring
from timm_shiftwise.ops import shiftwise_conv2d
from timm_shiftwise.ops.shiftwise_conv import merged, ways
from timm_shiftwise.ops.shiftwise_conv.small import reference_conv2d

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def definition(x: Tensor, weight: Tensor, wiring: Wiring, focus_length: int, padding: str) -> tuple[Tensor, ...]:
    return reference_conv2d(x, weight, *wiring[:3], focus_length, padding)


def make(channels, focus_length, kernel_size, shuffles, height, width, dtype=torch.float64, batch=2, density=1.):
    generator = torch.Generator().manual_seed(0)
    wiring = (
        separate_wiring(channels, focus_length, kernel_size) if shuffles == 0
        else shuffled_wiring(channels, focus_length, kernel_size, shuffles)
    )
    x = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(
        channels, wiring.maps, kernel_size, kernel_size, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(channels, wiring.maps, generator=generator) <= density
    return x, weight * mask[:, :, None, None], wiring


def assert_close(seen, wanted, tolerance):
    for a, b in zip(seen, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = max(b.abs().max().item(), 1.) if b.numel() else 1.
        assert (a.double() - b.double()).abs().max().item() <= tolerance * scale if b.numel() else True


def fitting(padding: str) -> list[str]:
    return [way for way in ways.WAYS if way not in ('merged', 'large') or padding == 'full']


WAYS_AND_PADDINGS = [(way, padding) for padding in ('full', 'same') for way in fitting(padding)]


@pytest.fixture
def forced(monkeypatch, request):
    """Force one way."""
    def force(way: str) -> None:
        if way in ('large', 'fused'):
            request.getfixturevalue('needs_taichi')
        monkeypatch.setenv(ways.ENVIRONMENT_VARIABLE, way)
    return force


@pytest.mark.parametrize('way, padding', WAYS_AND_PADDINGS)
@pytest.mark.parametrize('focus_length, kernel_size, shuffles, height, width', [
    (51, 5, 4, 7, 11),  # the kernel is larger than the map
    (13, 5, 1, 13, 6),
    (7, 3, 2, 1, 1),
    (7, 3, 0, 1, 9),
    (4, 2, 3, 5, 3),
    (3, 5, 2, 6, 6),
    (5, 1, 2, 4, 7),
    (1, 1, 1, 3, 2),
    (3, 3, 1, 23, 31),  # far larger than the kernel
    (9, 4, 0, 2, 17),
    (7, 5, 2, 3, 24),  # rows are whole packs of eight
    (9, 3, 2, 2, 20),  # of four
])
@pytest.mark.parametrize('density', [1., 0.3, 0.])
def test_forward_and_gradients_equal_the_definition(
        way, padding, focus_length, kernel_size, shuffles, height, width, density, forced):
    x, weight, wiring = make(5, focus_length, kernel_size, shuffles, height, width, density=density)
    kept = weight != 0
    results = []
    for compute in ('definition', way):
        xs, ws = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if compute == 'definition':
            out = definition(xs, ws * kept, wiring, focus_length, padding)
        else:
            forced(way)
            out = shiftwise_conv2d(xs, ws * kept, *wiring[:3], focus_length, padding)
        loss = sum((branch * (k + 1)).cos().sum() for k, branch in enumerate(out))
        results.append((*out, *torch.autograd.grad(loss, (xs, ws))))
    assert_close(results[1], results[0], TOLERANCE[torch.float64])


@pytest.mark.parametrize('way, padding', WAYS_AND_PADDINGS)
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_every_dtype_and_memory_format(way, padding, dtype, memory_format, forced):
    x, weight, wiring = make(6, 13, 3, 2, 9, 8, dtype=dtype)
    wanted = definition(x.double(), weight.double(), wiring, 13, padding)
    forced(way)
    seen = shiftwise_conv2d(x.to(memory_format=memory_format), weight, *wiring[:3], 13, padding)
    assert_close(seen, [w.to(dtype) for w in wanted], TOLERANCE[dtype])


@pytest.mark.parametrize('way, padding', WAYS_AND_PADDINGS)
def test_gradcheck_and_gradgradcheck(way, padding, forced):
    x, weight, wiring = make(2, 5, 3, 2, 4, 3, batch=1)
    forced(way)

    def compute(x, weight):
        return shiftwise_conv2d(x, weight, *wiring[:3], 5, padding)

    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(compute, inputs)
    assert torch.autograd.gradgradcheck(compute, inputs)


@pytest.mark.parametrize('way, padding', WAYS_AND_PADDINGS)
@pytest.mark.parametrize('batch', [0, 1, 3])
def test_any_batch(way, padding, batch, forced):
    x, weight, wiring = make(3, 7, 3, 2, 5, 4, batch=batch)
    x.requires_grad_()
    weight.requires_grad_()
    forced(way)
    out = shiftwise_conv2d(x, weight, *wiring[:3], 7, padding)
    assert_close(out, definition(x, weight, wiring, 7, padding), 1e-12)
    sum(branch.sum() for branch in out).backward()
    assert x.grad.shape == x.shape and weight.grad.shape == weight.shape


@pytest.mark.parametrize('way, padding', WAYS_AND_PADDINGS)
@pytest.mark.usefixtures('threads')
def test_any_number_of_threads_and_inference_mode(way, padding, forced):
    x, weight, wiring = make(4, 13, 5, 4, 12, 9, dtype=torch.float32)
    wanted = definition(x, weight, wiring, 13, padding)
    forced(way)
    with torch.inference_mode():
        seen = shiftwise_conv2d(x, weight, *wiring[:3], 13, padding)
    assert_close(seen, wanted, 1e-5)


@pytest.mark.parametrize('way, padding', WAYS_AND_PADDINGS)
def test_autocast_computes_in_its_own_dtype(way, padding, forced):
    x, weight, wiring = make(4, 13, 5, 4, 12, 9, dtype=torch.float32)
    x.requires_grad_()
    weight.requires_grad_()
    wanted = definition(x.bfloat16(), weight.bfloat16(), wiring, 13, padding)
    forced(way)
    with torch.autocast('cpu', torch.bfloat16):
        seen = shiftwise_conv2d(x, weight, *wiring[:3], 13, padding)
    assert_close(seen, wanted, TOLERANCE[torch.bfloat16])
    sum(branch.float().square().sum() for branch in seen).backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize('way, padding', WAYS_AND_PADDINGS)
def test_compiled_equals_eager(way, padding, forced):
    forced(way)
    torch._dynamo.reset()

    def compute(x, weight):
        # torch 2.8 cannot compile a slice of a named tuple
        return shiftwise_conv2d(x, weight, wiring.horizontal, wiring.vertical, wiring.identity, 13, padding)

    compiled = torch.compile(compute, fullgraph=True, backend='aot_eager')
    for height in (9, 12):
        x, weight, wiring = make(4, 13, 5, 2, height, 10)
        x.requires_grad_()
        weight.requires_grad_()
        results = []
        for function in (compute, compiled):
            out = function(x, weight)
            results.append((*out, *torch.autograd.grad(sum(o.sin().sum() for o in out), (x, weight))))
        assert_close(results[1], results[0], 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 16), st.integers(1, 6), st.integers(0, 3), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from(['full', 'same']),
)
def test_any_shape(channels, focus_length, kernel_size, shuffles, height, width, padding):
    x, weight, wiring = make(channels, focus_length, kernel_size, shuffles, height, width)
    wanted = definition(x, weight, wiring, focus_length, padding)
    with pytest.MonkeyPatch.context() as patch:
        for way in fitting(padding):
            patch.setenv(ways.ENVIRONMENT_VARIABLE, way)
            assert_close(shiftwise_conv2d(x, weight, *wiring[:3], focus_length, padding), wanted, 1e-12)


@pytest.mark.parametrize('rows, columns', list(itertools.product([1, 3, 9], [1, 3, 7])))
@pytest.mark.parametrize('height, width', [(1, 1), (5, 4), (31, 2)])
def test_the_weight_gradient_is_pytorchs(rows, columns, height, width, monkeypatch):
    monkeypatch.setattr(merged, '_WINDOW_ELEMENTS', 100)  # several chunks of channels
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 2, 5, height, width, generator=generator, dtype=torch.float64)
    kernel = torch.zeros(5, 1, rows, columns, dtype=torch.float64)
    wanted = torch.nn.grad.conv2d_weight(
        x, kernel.shape, grad, padding=(rows // 2, columns // 2), groups=5).squeeze(1)
    seen = merged.depthwise_weight_gradient(x, grad, rows, columns)
    torch.testing.assert_close(seen, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('way', ways.WAYS)
def test_nothing_larger_than_the_input_is_kept_for_backward(way, forced):
    forced(way)
    x, weight, wiring = make(8, 51, 5, 4, 16, 16, dtype=torch.float32, batch=4)
    x.requires_grad_()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        shiftwise_conv2d(x, weight.requires_grad_(), *wiring[:3], 51)
    kept.pop(x.untyped_storage().data_ptr())
    tables = sum(table.nbytes for table in wiring[:3])
    assert sum(kept.values()) <= weight.nbytes + tables


@pytest.mark.parametrize('way, padding', WAYS_AND_PADDINGS)
@pytest.mark.parametrize('density', [1., 0.4, 0.])
def test_a_mask_silences_groups_and_stops_their_gradient(way, padding, density, forced):
    x, weight, wiring = make(5, 13, 3, 2, 7, 9)
    mask = torch.rand(weight.shape[:2], generator=torch.Generator().manual_seed(1)) < density
    results = []
    for compute in ('definition', way):
        xs, ws = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if compute == 'definition':
            out = definition(xs, ws * mask[:, :, None, None], wiring, 13, padding)
        else:
            forced(way)
            out = shiftwise_conv2d(xs, ws, *wiring[:3], 13, padding, mask)
        results.append((*out, *torch.autograd.grad(sum(o.cos().sum() for o in out), (xs, ws))))
    assert_close(results[1], results[0], 1e-12)
    assert results[1][-1][~mask].eq(0).all()


@pytest.mark.parametrize('way, padding', WAYS_AND_PADDINGS)
def test_gradgradcheck_under_a_mask(way, padding, forced):
    x, weight, wiring = make(2, 5, 3, 1, 3, 4, batch=1)
    mask = torch.tensor([[True, False], [False, True]])
    forced(way)

    def compute(x, weight):
        return shiftwise_conv2d(x, weight, *wiring[:3], 5, padding, mask)

    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(compute, inputs)
    assert torch.autograd.gradgradcheck(compute, inputs)


def test_the_operators_pass_opcheck():
    x, weight, wiring = make(3, 7, 3, 2, 5, 4)
    mask = torch.rand(weight.shape[:2]) < 0.5
    ops = torch.ops.timm_shiftwise
    for kept in (None, mask):
        masked = weight if kept is None else weight * kept[:, :, None, None]
        arguments = (x.clone().requires_grad_(), masked.clone().requires_grad_(), *wiring[:3], kept, 7, 'full', None)
        torch.library.opcheck(ops.shiftwise_conv2d.default, arguments)
        grads = [torch.randn_like(x).requires_grad_() for _ in range(3)]
        torch.library.opcheck(ops.shiftwise_conv2d_backward.default, (*grads, *arguments, True, True))


def test_what_does_not_fit_together_is_refused():
    x, weight, wiring = make(2, 5, 3, 1, 4, 4)
    with pytest.raises(ValueError, match=r'\[C = 2, K, N, N\]'):
        shiftwise_conv2d(x, weight[:1], *wiring[:3], 5)
    with pytest.raises(ValueError, match='horizontal'):
        shiftwise_conv2d(x, weight, *wiring[:3], 9)
    with pytest.raises(ValueError, match='mask'):
        shiftwise_conv2d(x, weight, *wiring[:3], 5, 'full', torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="'valid'"):
        shiftwise_conv2d(x, weight, *wiring[:3], 5, 'valid')
    with pytest.raises(TypeError, match='float32'):
        shiftwise_conv2d(x.float(), weight, *wiring[:3], 5)


def test_a_way_that_does_not_fit_is_refused(forced):
    x, weight, wiring = make(2, 5, 3, 1, 4, 4)
    forced('magic')
    with pytest.raises(ValueError, match="'magic'"):
        shiftwise_conv2d(x, weight, *wiring[:3], 5)
    forced('merged')
    with pytest.raises(ValueError, match='full'):
        shiftwise_conv2d(x, weight, *wiring[:3], 5, 'same')

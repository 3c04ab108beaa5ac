"""Every way to compute a shift-wise convolution equals the definition: small convolutions, then the shift-add."""
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from families import WAYS_ON_CPUS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from torch import Tensor

from timm_shiftwise.layers.wiring import released_wiring
from timm_shiftwise.ops import shiftwise_conv2d
from timm_shiftwise.ops.shiftwise_conv import ways
from timm_shiftwise.ops.shiftwise_conv.call import Call
from timm_shiftwise.ops.shiftwise_conv.shift import reference_conv2d

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Computation(NamedTuple):
    """A way, the padding, and the backend of what the way leaves to one: its shift-add, or its gradients."""
    way: str
    padding: str
    backend: str

    def __call__(self, x: Tensor, weight: Tensor, wiring: Tensor, focus_length: int, mask: Tensor | None = None):
        return shiftwise_conv2d(x, weight, wiring, focus_length, self.padding, mask, self.backend)

    def __str__(self) -> str:
        return '-'.join(self)


COMPUTATIONS = [
    Computation('fused', 'full', 'taichi'),
    Computation('fused', 'same', 'taichi'),
    Computation('toeplitz', 'full', 'torch'),
    Computation('toeplitz', 'same', 'torch'),
    Computation('merged', 'full', 'torch'),
    Computation('merged', 'full', 'taichi'),
    Computation('channels_last', 'full', 'torch'),
    Computation('shift', 'full', 'torch'),
    Computation('shift', 'full', 'taichi'),
    Computation('shift', 'same', 'torch'),
    Computation('shift', 'same', 'taichi'),
]
each_computation = pytest.mark.parametrize('computation', COMPUTATIONS, ids=str)


@pytest.fixture
def forced(monkeypatch, request) -> Callable[[Computation], Computation]:
    """Have a way taken from now on, whatever the selector says."""
    def force(computation: Computation) -> Computation:
        if computation.backend == 'taichi':
            request.getfixturevalue('needs_taichi')
        monkeypatch.setenv(ways.ENVIRONMENT_VARIABLE, computation.way)
        return computation
    return force


def make(channels, focus_length, kernel_size, shuffles, height, width, dtype=torch.float64, batch=2, density=1.):
    """Input, kernels of which some are zero, and a wiring; no shuffles stand for kernels of each branch's own."""
    generator = torch.Generator().manual_seed(0)
    wiring = released_wiring('sw' if shuffles else 'eq_slak', channels, focus_length, kernel_size, shuffles or 1)
    maps = int(wiring.max()) + 1
    x = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(channels, maps, kernel_size, kernel_size, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(channels, maps, generator=generator) <= density
    return x, weight * mask[:, :, None, None], wiring


def run_with_gradients(compute, x, weight, wiring, focus_length, mask=None) -> list[Tensor]:
    """The three branches, and the gradients of the input and of the kernels."""
    inputs = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    out = compute(*inputs, wiring, focus_length, mask)
    loss = sum((branch * (k + 1)).cos().sum() for k, branch in enumerate(out))
    return [*(branch.detach() for branch in out), *torch.autograd.grad(loss, inputs)]


def definition(x, weight, wiring, focus_length, padding, mask=None) -> list[Tensor]:
    """The same by the definition, in float64."""
    def compute(x, weight, wiring, focus_length, mask):
        kept = weight if mask is None else weight * mask[:, :, None, None]
        return reference_conv2d(x, kept, wiring, focus_length, padding)
    return run_with_gradients(compute, x.double(), weight.double(), wiring, focus_length, mask)


def assert_close(seen, wanted, tolerance, dtype=torch.float64):
    for a, b in zip(seen, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        scale = max(b.abs().max().item(), 1.) if b.numel() else 1.
        assert (a.double() - b.double()).abs().max().item() <= tolerance * scale if b.numel() else True


def test_every_way_is_tested_with_every_padding_and_backend_that_it_takes():
    x, weight, wiring = make(1, 3, 3, 1, 2, 2)
    fitting = {
        (way.name, padding) for way in ways.WAYS.values() for padding in ('full', 'same')
        if way.obstacle(Call(x, weight, wiring, None, 3, padding)) is None}
    assert {computation[:2] for computation in COMPUTATIONS} == fitting


@pairwise({
    'computation': COMPUTATIONS,
    'focus_length, kernel_size, shuffles, height, width': [
        (51, 5, 4, 7, 11),  # the kernel is larger than the map
        (3, 3, 1, 23, 31),  # far larger than the kernel
        (9, 4, 0, 2, 17),
        (7, 5, 2, 3, 24),  # rows are whole packs of eight
        (9, 3, 2, 2, 20),  # of four
    ],
    'density': [1., 0.3, 0.],
})
def test_forward_and_gradients_equal_the_definition(
        computation, focus_length, kernel_size, shuffles, height, width, density, forced):
    x, weight, wiring = make(5, focus_length, kernel_size, shuffles, height, width, density=density)
    seen = run_with_gradients(forced(computation), x, weight, wiring, focus_length)
    assert_close(seen, definition(x, weight, wiring, focus_length, computation.padding), TOLERANCE[torch.float64])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    focus_length=st.sampled_from([1, 2, 3, 5, 7, 11, 16]),
    kernel_size=st.integers(1, 3),
    padding=st.sampled_from(['full', 'same']),
    shuffles=st.integers(0, 3),
    batch=st.integers(0, 2),
    channels=st.integers(1, 5),
    height=st.sampled_from([1, 2, 3, 5, 7, 13, 16, 23]),
    width=st.sampled_from([1, 3, 7, 8, 13]),
    density=st.sampled_from([None, 1., 0.5, 0.]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@pytest.mark.usefixtures('poisoned_memory', 'needs_taichi')
def test_every_way_equals_the_definition_on_any_shape(
        focus_length, kernel_size, padding, shuffles, batch, channels, height, width, density, dtype):
    x, weight, wiring = make(channels, focus_length, kernel_size, shuffles, height, width, dtype, batch)
    mask = None if density is None else (
        torch.rand(weight.shape[:2], generator=torch.Generator().manual_seed(1)) < density)
    wanted = definition(x, weight, wiring, focus_length, padding, mask)
    with pytest.MonkeyPatch.context() as patch:
        for computation in COMPUTATIONS:
            # the shift-add in Taichi has a property test of its own
            if computation.padding == padding and computation[::2] != ('shift', 'taichi'):
                patch.setenv(ways.ENVIRONMENT_VARIABLE, computation.way)
                seen = run_with_gradients(computation, x, weight, wiring, focus_length, mask)
                assert_close(seen, wanted, TOLERANCE[dtype], dtype)


@pairwise({
    'computation': COMPUTATIONS,
    'dtype': TOLERANCE,
    'memory_format': [torch.contiguous_format, torch.channels_last],
})
def test_every_dtype_and_memory_format(computation, dtype, memory_format, forced):
    x, weight, wiring = make(6, 13, 3, 2, 9, 8, dtype=dtype)
    wanted = reference_conv2d(x.double(), weight.double(), wiring, 13, computation.padding)
    compute = partial(forced(computation), x.to(memory_format=memory_format), weight, wiring, 13)
    if computation.way == 'channels_last' and dtype.itemsize == 2:
        with pytest.raises(ValueError, match='oneDNN'):
            compute()
        return
    seen = compute()
    assert_close(seen, [w.to(dtype) for w in wanted], TOLERANCE[dtype], dtype)


@each_computation
@pytest.mark.parametrize('masked', [False, True])
def test_gradcheck_and_gradgradcheck(computation, masked, forced):
    x, weight, wiring = make(2, 5, 3, 2, 2, 8, batch=1)
    mask = torch.tensor([[True, False], [False, True]]) if masked else None
    compute = forced(computation)

    def function(x, weight):
        return compute(x, weight, wiring, 5, mask)

    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@each_computation
@pytest.mark.parametrize('batch', [0, 1, 3])
def test_any_batch(computation, batch, forced):
    x, weight, wiring = make(3, 7, 3, 2, 5, 3, batch=batch)
    x.requires_grad_()
    weight.requires_grad_()
    out = forced(computation)(x, weight, wiring, 7)
    assert_close(out, reference_conv2d(x, weight, wiring, 7, computation.padding), 1e-12)
    sum(branch.sum() for branch in out).backward()
    assert x.grad.shape == x.shape and weight.grad.shape == weight.shape


@each_computation
@pytest.mark.usefixtures('threads')
def test_any_number_of_threads_and_inference_mode(computation, forced):
    x, weight, wiring = make(4, 13, 3, 2, 12, 8, dtype=torch.float32)
    wanted = reference_conv2d(x, weight, wiring, 13, computation.padding)
    compute = forced(computation)
    with torch.inference_mode():
        seen = compute(x, weight, wiring, 13)
    assert_close(seen, wanted, 1e-5, torch.float32)


# channels_last refuses half precision on the CPU, see above
@pytest.mark.parametrize('computation', [each for each in COMPUTATIONS if each.way != 'channels_last'], ids=str)
def test_autocast_computes_in_its_own_dtype(computation, forced):
    x, weight, wiring = make(4, 13, 3, 2, 12, 8, dtype=torch.float32)
    x.requires_grad_()
    weight.requires_grad_()
    wanted = reference_conv2d(x.bfloat16(), weight.bfloat16(), wiring, 13, computation.padding)
    compute = forced(computation)
    with torch.autocast('cpu', torch.bfloat16):
        seen = compute(x, weight, wiring, 13)
    assert_close(seen, wanted, TOLERANCE[torch.bfloat16], torch.bfloat16)
    sum(branch.float().square().sum() for branch in seen).backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()


@each_computation
def test_compiled_equals_eager(computation, forced):
    compute = forced(computation).__call__  # PyTorch before 2.11 compiles no call of a tuple
    torch._dynamo.reset()
    wiring = released_wiring('sw', 4, 13, 3, 2)

    def function(x, weight):
        return compute(x, weight, wiring, 13)

    compiled = torch.compile(function, fullgraph=True, backend='aot_eager')
    for height in (9, 12):
        x, weight, _ = make(4, 13, 3, 2, height, 8)
        x.requires_grad_()
        weight.requires_grad_()
        results = []
        for each in (function, compiled):
            out = each(x, weight)
            results.append((*out, *torch.autograd.grad(sum(o.sin().sum() for o in out), (x, weight))))
        assert_close(results[1], results[0], 1e-12)


@pytest.mark.parametrize('way', WAYS_ON_CPUS)
def test_nothing_larger_than_the_input_is_kept_for_backward(way, monkeypatch, needs_taichi):
    monkeypatch.setenv(ways.ENVIRONMENT_VARIABLE, way)
    x, weight, wiring = make(8, 51, 5, 4, 16, 16, dtype=torch.float32, batch=4)
    x.requires_grad_()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        shiftwise_conv2d(x, weight.requires_grad_(), wiring, 51)
    kept.pop(x.untyped_storage().data_ptr())
    assert sum(kept.values()) <= weight.nbytes + wiring.nbytes


@pairwise({'computation': COMPUTATIONS, 'density': [1., 0.4, 0.]})
def test_a_mask_silences_groups_and_stops_their_gradient(computation, density, forced):
    x, weight, wiring = make(5, 13, 3, 2, 12, 8)
    mask = torch.rand(weight.shape[:2], generator=torch.Generator().manual_seed(1)) < density
    seen = run_with_gradients(forced(computation), x, weight, wiring, 13, mask)
    assert_close(seen, definition(x, weight, wiring, 13, computation.padding, mask), 1e-12)
    assert seen[-1][~mask].eq(0).all()


@each_computation
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_a_pruned_kernel_holds_is_never_seen(computation, value, forced):
    x, weight, wiring = make(5, 13, 3, 2, 12, 8)
    mask = torch.rand(weight.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.4
    held = torch.where(mask[:, :, None, None], weight, value)
    compute = forced(computation)
    seen = run_with_gradients(compute, x, held, wiring, 13, mask)
    assert_close(seen, definition(x, weight, wiring, 13, computation.padding, mask), 1e-12)
    assert seen[-1][~mask].eq(0).all()
    x.requires_grad_()
    loss = sum(branch.square().sum() for branch in compute(x, held.requires_grad_(), wiring, 13, mask))
    first = torch.autograd.grad(loss, (x, held), create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), (x, held))
    assert all(grad.isfinite().all() for grad in (*first, *second)) and second[1][~mask].eq(0).all()


@pairwise({
    'computation': COMPUTATIONS,
    'value': [float('nan'), float('inf')],
    'density': [1., 0.4],
    'focus_length, kernel_size': [(13, 5), (12, 4), (51, 3)],
})
def test_what_is_not_finite_reaches_what_kept_kernels_see_and_no_other_image_or_channel(
        computation, value, density, focus_length, kernel_size, forced):
    x, weight, wiring = make(3, focus_length, kernel_size, 2, 21, 24)
    mask = torch.rand(weight.shape[:2], generator=torch.Generator().manual_seed(1)) < density
    broken, spot = x.clone(), torch.zeros_like(x)
    broken[0, 1, 9, 11] = value
    spot[0, 1, 9, 11] = 1
    met = reference_conv2d(
        spot, mask[:, :, None, None].expand(weight.shape).double(), wiring, focus_length, computation.padding)
    wanted = definition(x, weight, wiring, focus_length, computation.padding, mask)
    for branch, reached, clean in zip(
            forced(computation)(broken, weight, wiring, focus_length, mask), met, wanted, strict=False):
        lost = ~branch.isfinite()
        assert lost[reached > 0].all() and lost.sum() == lost[0, 1].sum()
        torch.testing.assert_close(branch[~lost], clean[~lost], rtol=0, atol=1e-12)


def test_the_operators_pass_opcheck():
    x, weight, wiring = make(3, 7, 3, 2, 5, 3)
    mask = torch.rand(weight.shape[:2]) < 0.5
    ops = torch.ops.timm_shiftwise
    for kept in (None, mask):
        masked = weight if kept is None else weight * kept[:, :, None, None]
        arguments = (x.clone().requires_grad_(), masked.clone().requires_grad_(), wiring, kept, 7, 'full', None)
        torch.library.opcheck(ops.shiftwise_conv2d.default, arguments)
        grads = [torch.randn_like(x).requires_grad_() for _ in range(3)]
        torch.library.opcheck(ops.shiftwise_conv2d_backward.default, (*grads, *arguments, True, True))


def test_what_does_not_fit_together_is_refused():
    x, weight, wiring = make(2, 5, 3, 1, 4, 4)
    with pytest.raises(ValueError, match=r'\[C = 2, K, N, N\]'):
        shiftwise_conv2d(x, weight[:1], wiring, 5)
    with pytest.raises(ValueError, match=r'wiring must have .*\[R, 2, 7\].*focus length 9.*got \(1, 2, 5\)'):
        shiftwise_conv2d(x, weight, wiring, 9)
    with pytest.raises(ValueError, match=r'wiring must have .*\[R, 2, 5\].*got \(1, 1, 5\)'):
        shiftwise_conv2d(x, weight, wiring[:, :1], 5)
    with pytest.raises(ValueError, match='mask'):
        shiftwise_conv2d(x, weight, wiring, 5, 'full', torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="'valid'"):
        shiftwise_conv2d(x, weight, wiring, 5, 'valid')
    with pytest.raises(TypeError, match='float32'):
        shiftwise_conv2d(x.float(), weight, wiring, 5)

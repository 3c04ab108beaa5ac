"""The operator as Toeplitz products: exact, bounded in memory, and on fake CUDA tensors in few calls without a wait."""
from collections import Counter
from itertools import accumulate

import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, registered_families, unsettle
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from test_shiftwise_conv import assert_close, definition, make
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from timm_shiftwise.layers import ShiftwiseConv2d
from timm_shiftwise.layers.merged import _as_products
from timm_shiftwise.layers.wiring import released_wiring
from timm_shiftwise.ops.depthwise import toeplitz
from timm_shiftwise.ops.depthwise.toeplitz import Kernels, convolve, kernel_gradients, tall_wide_conv2d
from timm_shiftwise.ops.shiftwise_conv import frontend
from timm_shiftwise.ops.shiftwise_conv.call import Call
from timm_shiftwise.ops.shiftwise_conv.toeplitz import toeplitz_conv2d, toeplitz_conv2d_backward
from timm_shiftwise.ops.shiftwise_conv.ways import WAYS, choose_way

EXACT = 1e-10


def assert_equals_the_definition(x, weight, wiring, focus_length, padding, block=None) -> None:
    """Compare branches and gradients of the way, called as it is, with those of the definition."""
    *branches, grad_x, grad_weight = definition(x, weight, wiring, focus_length, padding)
    call = Call(x, weight, wiring, None, focus_length, padding)
    assert_close(toeplitz_conv2d(call, block), branches, EXACT)
    grads = tuple(-(branch * (k + 1)).sin() * (k + 1) for k, branch in enumerate(branches))  # as in `definition`
    assert_close(toeplitz_conv2d_backward(grads, call, True, True, block), (grad_x, grad_weight), EXACT)
    assert toeplitz_conv2d_backward(grads, call, False, False) == (None, None)


@pairwise({
    'focus_length, kernel_size, shuffles': [(51, 5, 4), (13, 1, 2), (3, 7, 1), (9, 4, 0), (7, 3, 2), (1, 1, 1)],
    'padding': ['full', 'same'],
    'height, width': [(1, 1), (7, 7), (5, 130), (141, 6), (28, 33)],
    'block': [None, 1, 3, 200],
    'density': [1., .3],
})
@pytest.mark.usefixtures('poisoned_memory')
def test_it_equals_the_definition(focus_length, kernel_size, shuffles, padding, height, width, block, density):
    arguments = make(2, focus_length, kernel_size, shuffles, height, width, density=density)
    assert_equals_the_definition(*arguments, focus_length, padding, block)


@pytest.mark.parametrize('padding', ['full', 'same'])
def test_it_equals_the_definition_on_a_map_of_a_detector(padding):
    assert_equals_the_definition(*make(1, 51, 5, 1, 200, 304, batch=1), 51, padding)


@settings(max_examples=40, deadline=None)
@given(
    focus_length=st.integers(1, 12), kernel_size=st.integers(1, 7), shuffles=st.integers(0, 2),
    padding=st.sampled_from(['full', 'same']), batch=st.integers(0, 2), channels=st.integers(1, 3),
    height=st.integers(1, 40), width=st.integers(1, 40), block=st.sampled_from([None, 1, 2, 5]),
    tile=st.sampled_from([1, 8, 64]), room=st.sampled_from([1, 2 ** 26]))
def test_it_equals_the_definition_on_any_shape_however_it_is_cut(
        focus_length, kernel_size, shuffles, padding, batch, channels, height, width, block, tile, room):
    arguments = make(channels, focus_length, kernel_size, shuffles, height, width, batch=batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toeplitz, '_TILE', tile)
        patch.setattr(toeplitz, 'LEAST_TEMPORARIES', room)
        patch.setattr(toeplitz, 'TEMPORARIES_PER_INPUT', 0)
        assert_equals_the_definition(*arguments, focus_length, padding, block)


@pairwise({'kernel_size': [1, 3, 5, 7], 'padding': ['full', 'same'], 'tile': [8, 64], 'masked': [False, True]})
def test_gradcheck_and_gradgradcheck_tiled_or_not(kernel_size, padding, tile, masked, monkeypatch):
    monkeypatch.setenv('TIMM_SHIFTWISE_WAY', 'toeplitz')
    monkeypatch.setattr(toeplitz, '_TILE', tile)
    x, weight, wiring = make(1, 9, kernel_size, 2, 2, 29, batch=1)
    mask = torch.arange(weight.shape[1])[None] % 2 == 0 if masked else None

    def function(x, weight):
        return frontend.shiftwise_conv2d(x, weight, wiring, 9, padding, mask)

    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('width', [28, 150])
def test_half_precision_is_as_exact_as_a_convolution(dtype, width):
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(size, generator=generator).to(dtype) for size in ((2, 4, 12, width), (4, 5, 51), (2, 4, 12, width)))

    def plain(x: Tensor, weight: Tensor) -> list[Tensor]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = F.conv2d(x, weight.unsqueeze(1), padding=(2, 25), groups=4)
        return [out.detach(), *torch.autograd.grad(out, (x, weight), grad.to(x.dtype))]

    kernels = Kernels(weight, 2, 25)
    out, grad_x = torch.empty_like(x), torch.empty_like(x)
    convolve([x], [[kernels]], [out])
    convolve([grad], [[kernels.turn()]], [grad_x])
    seen = [out, grad_x, *kernel_gradients(x, [grad], [kernels])]
    for mine, pytorchs, exact in zip(seen, plain(x, weight), plain(x.double(), weight.double()), strict=True):
        mine, pytorchs = ((each.double() - exact).square().mean().sqrt() for each in (mine, pytorchs))
        assert mine <= 1.1 * pytorchs


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('height, width', [(9, 9), (5, 100), (1, 1)])
def test_a_tall_and_a_wide_convolution_are_added(height, width, memory_format):
    x, tall, wide = torch.randn(2, 3, height, width), torch.randn(3, 21, 5), torch.randn(3, 5, 21)
    x = x.double().contiguous(memory_format=memory_format)
    tall, wide = tall.double(), wide.double()
    wanted = (
        F.conv2d(x, tall.unsqueeze(1), padding=(10, 2), groups=3)
        + F.conv2d(x, wide.unsqueeze(1), padding=(2, 10), groups=3))
    seen = tall_wide_conv2d(x, tall, wide)
    assert seen.is_contiguous(memory_format=memory_format)
    assert_close([seen], [wanted], EXACT)
    torch.library.opcheck(tall_wide_conv2d, (x, tall, wide))


def test_a_pixel_of_a_large_map_costs_the_same_whatever_its_size():
    def cost(side: int) -> float:
        """Multiply-adds of the three branches for a pixel."""
        x, weight = torch.empty(1, 1, side, side, device='meta'), torch.empty(1, 11, 5, 5, device='meta')
        wiring = torch.zeros(1, 1, 23, dtype=torch.int32, device='meta')
        with FlopCounterMode(display=False) as counter:
            toeplitz_conv2d(Call(x, weight, wiring, None, 51))
        return counter.get_total_flops() / 2 / side ** 2

    assert cost(56) == 3 * 8 * 56  # the wide, the square and the tall kernel: 8 rows of 56 columns are seen
    costs = [cost(side) for side in (120, 128, 200, 304, 512, 1024)]
    assert max(costs) <= 1.2 * min(costs) <= 3 * cost(56)


@pytest.mark.parametrize('ghost_ratio', [0., .4])
def test_a_merged_layer_as_products_is_the_layer(ghost_ratio):
    layer = unsettle(ShiftwiseConv2d(10, 13, 3, ghost_ratio=ghost_ratio, dtype=torch.float64)).eval().fuse()
    x = torch.randn(2, 10, 9, 14, dtype=torch.float64)
    with torch.no_grad():
        seen = _as_products(x, layer.tall.weight, layer.tall.bias, layer.wide.weight, layer.num_worked)
        assert_close([seen], [layer(x)], EXACT)


@pairwise({
    'padding': ['full', 'same'],
    'batch, side, focus_length': [(16, 14, 47), (4, 28, 49), (1, 100, 11), (32, 7, 13)],
    'dtype': [torch.float32, torch.bfloat16],
})
def test_temporary_memory_is_bounded(padding, batch, side, focus_length, dtype, monkeypatch):
    monkeypatch.setattr(toeplitz, 'LEAST_TEMPORARIES', 2 ** 23)
    x, weight, wiring = make(32, focus_length, 5, 1, side, side, dtype, batch)
    call = Call(x, weight, wiring, None, focus_length, padding)

    def peak(function) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            results = function()
        sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
        return max(accumulate(sizes)) - sum(result.nbytes for result in results)

    bound = max(8 * x.nbytes, 2 ** 23) + 16 * weight.nbytes  # the assembled kernels, which are little beside a map
    assert peak(lambda: toeplitz_conv2d(call)) <= bound
    assert peak(lambda: toeplitz_conv2d_backward((x, x, x), call, True, True)) <= bound


# --- on fake CUDA tensors ---------------------------------------------------------------------------------------------

class Trace(TorchDispatchMode):
    """Runs the bodies of this package's operators, which fakes would hide, and counts the calls in each of them.

    Every operator that has a gradient is followed by that. A view is no call: nothing is launched for it.
    """

    def __init__(self, parts: list[int]) -> None:
        super().__init__()
        self.parts = parts
        self.calls: Counter[str] = Counter()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name == 'timm_shiftwise::tall_wide_conv2d':
            return self.run(tall_wide_conv2d, func, args, 60)
        if name == 'timm_shiftwise::shiftwise_conv2d':
            call = Call(*args)
            for backward in (False, True):
                assert choose_way(call, backward).way.name == 'toeplitz'
            branches = self.run(frontend._shiftwise_conv2d, func, args, 60)
            gradient = torch.ops.timm_shiftwise.shiftwise_conv2d_backward.default
            self.run(frontend._shiftwise_conv2d_backward, gradient, (*branches, *args, True, True), 90)
            return branches
        assert not name.startswith('timm_shiftwise::'), 'an operator that this does not know'
        is_view = any(made.alias_info and not made.alias_info.is_write for made in func._schema.returns)
        if name.startswith('aten::') and not is_view and name != 'aten::promote_types':  # which is no call on tensors
            self.calls[name] += 1
        return func(*args, **kwargs or {})

    def run(self, operator, func, args, budget):
        """The results of an operator's body, which are what its fake promises, in at most so many calls."""
        self.calls.clear()
        self.parts.clear()
        with self:
            results = operator._init_fn(*args)
        assert self.calls.total() <= budget, self.calls
        assert set(self.parts) == {1}, 'one piece of all channels'
        self.seen.append(func.name().split('::')[1])
        promised = func(*args)
        for result, fake in zip(*(([each] if isinstance(each, Tensor) else each) for each in (results, promised)),
                                strict=True):
            assert (result.shape, result.dtype, result.device) == (fake.shape, fake.dtype, fake.device)
            assert result.stride() == fake.stride() and result.device.type == 'cuda'
        return results


def test_every_registered_family_is_traced():
    assert set(FAMILIES) == registered_families()


@pairwise({
    'family': FAMILIES,
    'reparameterized': [False, True],
    'dtype': [torch.float32, torch.float16, torch.bfloat16, 'autocast'],
    'memory_format': [torch.contiguous_format, torch.channels_last],
})
def test_a_network_on_cuda_waits_for_nothing_and_makes_few_calls(
        family, reparameterized, dtype, memory_format, monkeypatch):
    parts: list[int] = []
    whole = toeplitz._parts
    monkeypatch.setattr(
        toeplitz, '_parts', lambda *args: parts.append(len(pieces := [*whole(*args)])) or iter(pieces))
    autocast = dtype == 'autocast'
    wanted = torch.float16 if autocast else dtype
    model = timm.create_model(
        FAMILIES[family], depths=(1, 1, 1, 1), reparameterized=reparameterized, device='meta',
        dtype=torch.float32 if autocast else dtype).train(not reparameterized)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device='cuda')
        x = torch.empty(128, 3, 224, 224, device='cuda', dtype=torch.float32 if autocast else dtype)
        x = x.contiguous(memory_format=memory_format)
        was = torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')
        try:
            torch.set_autocast_enabled('cuda', autocast)
            torch.set_autocast_dtype('cuda', torch.float16)
            with torch.no_grad(), Trace(parts) as trace:
                out = model(x)
        finally:
            torch.set_autocast_enabled('cuda', was[0])
            torch.set_autocast_dtype('cuda', was[1])
    assert out.shape == (128, 1000) and out.dtype == wanted
    if reparameterized and family != 'p2_sw':
        assert trace.seen == ['tall_wide_conv2d'] * 4
    elif family == 'slak':
        assert not trace.seen, 'it trains with the convolutions of PyTorch'
    else:
        assert trace.seen == ['shiftwise_conv2d', 'shiftwise_conv2d_backward'] * 4


def test_a_merged_network_on_cuda_that_is_differentiated_takes_pytorchs_convolutions():
    model = timm.create_model('sw_tiny', depths=(1, 1, 1, 1), reparameterized=True, device='meta').eval()
    with FakeTensorMode(allow_non_fake_inputs=True), Trace([]) as trace:
        out = model.to_empty(device='cuda')(torch.empty(2, 3, 64, 64, device='cuda'))
    assert out.requires_grad and not trace.seen


@pytest.mark.parametrize('channels, side, focus_length', [(74, 56, 51), (148, 28, 49), (296, 14, 47), (592, 7, 13)])
def test_the_merged_way_makes_its_kernels_gradients_in_few_pieces_on_cuda(channels, side, focus_length):
    wiring = released_wiring('sw', channels, focus_length, 5, 4)
    with FakeTensorMode(), Trace([]) as trace:
        x = torch.empty(128, channels, side, side, device='cuda', dtype=torch.bfloat16)
        weight = torch.empty(channels, wiring.shape[2] // 2, 5, 5, device='cuda', dtype=torch.bfloat16)
        call = Call(x, weight, torch.empty(wiring.shape, dtype=wiring.dtype, device='cuda'), None, focus_length)
        trace.calls.clear()
        WAYS['merged'].backward((x, x, x), call, True, True)
    assert trace.calls.total() <= 90, trace.calls

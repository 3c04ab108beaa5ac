"""The shift-add against the released operator, large kernels and its definition, and as an operator of PyTorch."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from safetensors import safe_open

from timm_shiftwise import geometry
from timm_shiftwise.ops.shift_add import shift_add

CONFORMANCE = Path(__file__).parent / 'conformance'
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# both backends sum in float32 at least and round once: one unit in the last place of the result's type between them
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2 ** -10, torch.bfloat16: 2 ** -7}

pytestmark = pytest.mark.usefixtures('poisoned_memory')


def random_wiring(shuffles, channels, maps, focus_length, kernel_size, dtype=torch.int32, seed=0):
    """A table of random map indices: repeats are allowed, and maps that nobody reads."""
    places = 2 * geometry.num_groups(focus_length, kernel_size) + 1
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(maps, [shuffles, channels, places], generator=generator, dtype=dtype)


def wired(wide, tall, centre, channels=1, shuffles=1, dtype=torch.int32):
    """A table in which every channel reads the same maps: those of the wide and the tall branch, and of the centre."""
    return torch.tensor([*wide, *tall, centre], dtype=dtype).repeat(shuffles, channels, 1)


def random_maps(batch, channels, maps, height, width, kernel_size, padding='full', dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (geometry.map_size(size, kernel_size, padding) for size in (height, width))
    return torch.randn([batch, channels * maps, rows, columns], generator=generator, dtype=torch.float64).to(dtype)


def gradients_of(branches, seed=1):
    """Random gradients of the branches."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b.shape, generator=generator, dtype=torch.float64).to(b.dtype) for b in branches]


def run_with_gradient(y, wiring, focus_length, kernel_size, padding, backend, seed=1):
    """The three branches and the gradient of the maps for random gradients of the branches."""
    y = y.detach().requires_grad_()
    branches = shift_add(y, wiring, focus_length, kernel_size, padding, backend)
    return [b.detach() for b in branches] + list(torch.autograd.grad(branches, y, gradients_of(branches, seed)))


# -- against the released operator -------------------------------------------------------------------------------------


@pytest.mark.parametrize('focus_length, kernel_size', [(13, 5), (7, 3)])
def test_the_released_operator_gives_the_same_branches_and_gradient(focus_length, kernel_size, backend):
    with safe_open(CONFORMANCE / f'add_shift_{focus_length}x{kernel_size}.safetensors', 'pt') as file:
        vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        assert json.loads(file.metadata()['config'])
    groups = geometry.num_groups(focus_length, kernel_size)
    shuffles = vectors['pad_hv'].shape[1] // 2
    channels = vectors['horizontal'].shape[1]
    place_of = {
        geometry.shift(place, focus_length, kernel_size, 'full'): place for place in range(groups)}
    wiring = torch.empty([shuffles, channels, 2 * groups + 1], dtype=torch.int32)
    for k, shifts in enumerate(vectors['pad_hv'].tolist()):
        for column, shift in enumerate(shifts):
            branch, r = divmod(column, shuffles)
            wiring[r, k // groups, branch * groups + place_of[int(shift)]] = k % groups
    first_map = torch.arange(channels)[:, None] * groups
    wiring[:, :, -1] = (vectors['idx_identity'].view(channels, shuffles) - first_map).T

    y = vectors['y'].requires_grad_()
    branches = shift_add(y, wiring, focus_length, kernel_size, 'full', backend)
    names = ('horizontal', 'vertical', 'identity')
    for name, branch in zip(names, branches, strict=True):
        torch.testing.assert_close(branch, vectors[name], rtol=0, atol=1e-4)
    grad_y, = torch.autograd.grad(branches, y, [vectors[f'grad_{name}'] for name in names])
    torch.testing.assert_close(grad_y, vectors['grad_y'], rtol=0, atol=1e-4)


# -- against large kernels: the paper's claim --------------------------------------------------------------------------


def large_convolution(x, kernel):
    """A depthwise convolution [C, rows, columns] with zeros outside, centred at (rows // 2, columns // 2)."""
    rows, columns = kernel.shape[1:]
    x = F.pad(x, [columns // 2, columns - 1 - columns // 2, rows // 2, rows - 1 - rows // 2])
    return F.conv2d(x, kernel.unsqueeze(1), groups=x.shape[1])


def cut(kernel, kernel_size):
    """Cut wide kernels [C, N, M] into square pieces [C, G, N, N], the last one filled up with zeros."""
    rest = -kernel.shape[2] % kernel_size
    return F.pad(kernel, [0, rest]).unflatten(2, (-1, kernel_size)).movedim(2, 1)


@pytest.mark.parametrize('focus_length, kernel_size, height, width', [
    (51, 5, 9, 11), (13, 5, 14, 14), (13, 5, 1, 1), (13, 5, 1, 8), (7, 3, 13, 7), (9, 3, 5, 6), (8, 4, 6, 7), (10, 4,
    9, 5), (9, 4, 7, 7), (6, 2, 4, 9), (5, 2, 2, 3), (5, 1, 3, 4), (3, 5, 6, 4), (2, 4, 5, 5), (1, 3, 4, 4), (5, 5, 6,
    7), (1, 1, 2, 2), (13, 5, 3, 40), (9, 3, 2, 20),
])
def test_small_convolutions_and_shifts_equal_the_large_kernels(focus_length, kernel_size, height, width, backend):
    """The paper's Eq. 1-3, each branch with kernels of its own: K = 2G + 1 maps a channel."""
    channels, groups = 2, geometry.num_groups(focus_length, kernel_size)
    torch.manual_seed(0)
    x = torch.randn(2, channels, height, width, dtype=torch.float64)
    wide = torch.randn(channels, kernel_size, focus_length, dtype=torch.float64)
    tall = torch.randn(channels, focus_length, kernel_size, dtype=torch.float64)
    square = torch.randn(channels, kernel_size, kernel_size, dtype=torch.float64)
    expected = [large_convolution(x, kernel) for kernel in (wide, tall, square)]

    pieces = [cut(wide, kernel_size), cut(tall.mT, kernel_size).mT, square.unsqueeze(1)]
    weight = torch.cat(pieces, dim=1)  # [C, 2G + 1, N, N]
    y = F.conv2d(x, weight.flatten(0, 1).unsqueeze(1), padding=kernel_size - 1, groups=channels)
    wiring = wired(range(groups), range(groups, 2 * groups), 2 * groups, channels)
    branches = shift_add(y, wiring, focus_length, kernel_size, 'full', backend)
    for branch, want in zip(branches, expected, strict=True):
        torch.testing.assert_close(branch, want, rtol=0, atol=1e-10)


def test_branches_may_share_their_maps(backend):
    """K = G: the same pieces in natural order make a wide and a tall kernel, and piece 1 is the centre."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 10, dtype=torch.float64)
    pieces = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    y = F.conv2d(x, pieces.flatten(0, 1).unsqueeze(1), padding=4, groups=3)
    h, v, i = shift_add(y, wired(range(3), range(3), 1, channels=3, dtype=torch.int64), 15, 5, backend=backend)
    torch.testing.assert_close(h, large_convolution(x, torch.cat(pieces.unbind(1), dim=2)), rtol=0, atol=1e-10)
    torch.testing.assert_close(v, large_convolution(x, torch.cat(pieces.unbind(1), dim=1)), rtol=0, atol=1e-10)
    torch.testing.assert_close(i, large_convolution(x, pieces[:, 1]), rtol=0, atol=1e-10)


@pytest.mark.parametrize('focus_length, kernel_size', [(7, 3), (5, 3), (11, 5), (3, 1)])
def test_same_padding_drops_the_windows_whose_centre_lies_outside(focus_length, kernel_size, backend):
    height, width, groups, half = 4, 5, geometry.num_groups(focus_length, kernel_size), kernel_size // 2
    torch.manual_seed(0)
    x = torch.randn(height, width, dtype=torch.float64)
    weight = torch.randn(groups, kernel_size, kernel_size, dtype=torch.float64)

    def window(g, row, column):
        """Group g centred at a pixel: zero if that pixel is outside of the image, as is every pixel read outside."""
        if not (0 <= row < height and 0 <= column < width):
            return 0.0
        return sum(
            weight[g, a, b].item() * x[row + a - half, column + b - half].item()
            for a in range(kernel_size) for b in range(kernel_size)
            if 0 <= row + a - half < height and 0 <= column + b - half < width)

    offset = [g * kernel_size + half - focus_length // 2 for g in range(groups)]
    pixels = [(row, column) for row in range(height) for column in range(width)]
    expected_h = [sum(window(g, row, column + offset[g]) for g in range(groups)) for row, column in pixels]
    expected_v = [sum(window(g, row + offset[g], column) for g in range(groups)) for row, column in pixels]
    expected_i = [window(0, row, column) for row, column in pixels]

    y = F.conv2d(x[None, None], weight.unsqueeze(1), padding=half)
    branches = shift_add(y, wired(range(groups), range(groups), 0), focus_length, kernel_size, 'same', backend)
    for branch, want in zip(branches, (expected_h, expected_v, expected_i), strict=True):
        torch.testing.assert_close(branch.flatten(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-12)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('padding', ['full', 'same'])
@pytest.mark.parametrize('focus_length, kernel_size, height, width', [(7, 3, 3, 2), (5, 2, 2, 3), (3, 4, 1, 3)])
def test_numerical_first_and_second_derivatives(focus_length, kernel_size, height, width, padding, backend):
    y = random_maps(2, 2, 3, height, width, kernel_size, padding).requires_grad_()
    wiring = random_wiring(2, 2, 3, focus_length, kernel_size)

    def function(maps):
        return shift_add(maps, wiring, focus_length, kernel_size, padding, backend)

    assert torch.autograd.gradcheck(function, y)
    # a linear operator has a second derivative of zero everywhere, so make the function quadratic
    assert torch.autograd.gradgradcheck(lambda maps: function(maps * maps), y)


def test_backward_is_the_adjoint_at_real_size(backend):
    y = random_maps(1, 3, 11, 56, 56, 5)
    wiring = random_wiring(4, 3, 11, 51, 5)
    *branches, grad_y = run_with_gradient(y, wiring, 51, 5, 'full', backend)
    forward = sum((b * g).sum() for b, g in zip(branches, gradients_of(branches), strict=True))
    torch.testing.assert_close(forward, (y * grad_y).sum(), rtol=1e-11, atol=0)


# -- one backend against the other -------------------------------------------------------------------------------------


@pytest.mark.usefixtures('needs_taichi')
@pytest.mark.parametrize('channels, size, focus_length, dtype', [
    (3, 56, 51, torch.float32),
    (5, 28, 49, torch.float32),
    (6, 14, 47, torch.float32),
    (9, 7, 13, torch.float32),
    (5, 28, 49, torch.float64),
    (6, 14, 47, torch.bfloat16),
    (9, 7, 13, torch.float16),
], ids=str)
def test_backends_agree_at_the_sizes_of_the_networks(channels, size, focus_length, dtype):
    maps = geometry.num_groups(focus_length, 5)
    y = random_maps(2, channels, maps, size, size, 5, dtype=dtype)
    wiring = random_wiring(4, channels, maps, focus_length, 5)
    results = [run_with_gradient(y, wiring, focus_length, 5, 'full', backend) for backend in ('taichi', 'torch')]
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.usefixtures('needs_taichi')
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    focus_length=st.integers(1, 70),
    kernel_size=st.sampled_from([1, 2, 3, 5, 8]),
    padding=st.sampled_from(['full', 'same']),
    batch=st.integers(0, 3),
    channels=st.integers(1, 4),
    maps=st.integers(1, 6),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    shuffles=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    table_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2 ** 16),
)
def test_backends_agree_on_any_shape(
        focus_length, kernel_size, padding, batch, channels, maps, height, width, shuffles, dtype, table_dtype, seed):
    y = random_maps(batch, channels, maps, height, width, kernel_size, padding, dtype, seed)
    wiring = random_wiring(shuffles, channels, maps, focus_length, kernel_size, table_dtype, seed)
    results = [run_with_gradient(y, wiring, focus_length, kernel_size, padding, b, seed) for b in ('taichi', 'torch')]
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_sums_in_float32(dtype, backend):
    """One large map and many small ones: a sum kept in the type of the maps would lose every small one."""
    maps = 11
    y = torch.full([1, maps, 12, 12], 2 ** -6, dtype=dtype)
    y[:, 0] = 16
    wiring = wired(range(maps), range(maps), 0, shuffles=8)
    h, *_ = shift_add(y, wiring, 55, 5, 'full', backend)
    want, *_ = shift_add(y.double(), wiring, 55, 5, 'full', 'torch')
    torch.testing.assert_close(h, want.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
def test_what_is_not_finite_stays_so_and_stays_local(value, dtype, backend):
    y = torch.zeros(1, 2, 10, 10, dtype=dtype)
    y[0, 1, 5, 4] = value
    branches = shift_add(y, wired([0, 1, 0], [0, 1, 0], 1), 15, 5, 'full', backend)
    # the middle place of M = 15 has the shift -2 and the crop is 2: every branch reads the pixel at the same place
    want = torch.zeros(1, 1, 6, 6, dtype=dtype)
    want[0, 0, 3, 2] = value
    for branch in branches:
        torch.testing.assert_close(branch, want, equal_nan=True)


# -- layouts and empty batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_memory_layout_does_not_matter(dtype, backend):
    y = random_maps(2, 3, 4, 6, 9, 3, dtype=dtype)
    wiring = random_wiring(2, 3, 4, 10, 3)
    want = run_with_gradient(y, wiring, 10, 3, 'full', backend)
    storage = torch.zeros(2, 12, 2 * y.shape[2], y.shape[3] + 3, dtype=dtype)
    view = storage[:, :, ::2, 3:].copy_(y)
    flat = torch.zeros(y.numel() + 1, dtype=dtype)
    unaligned = flat[1:].view(y.shape).copy_(y)
    channels_last = y.contiguous(memory_format=torch.channels_last)
    for variant in (channels_last, view, unaligned, y.mT.contiguous().mT):
        for got, expected in zip(run_with_gradient(variant, wiring, 10, 3, 'full', backend), want, strict=True):
            torch.testing.assert_close(got, expected)


def test_gradients_of_any_layout(backend):
    y = random_maps(2, 3, 4, 6, 9, 3, dtype=torch.float32).requires_grad_()
    wiring = random_wiring(2, 3, 4, 10, 3)
    branches = shift_add(y, wiring, 10, 3, 'full', backend)
    want, = torch.autograd.grad(branches, y, [torch.ones_like(b) for b in branches], retain_graph=True)
    expanded = [torch.ones((), dtype=b.dtype).expand(b.shape) for b in branches]
    got, = torch.autograd.grad(branches, y, expanded)
    torch.testing.assert_close(got, want)


def test_a_wiring_of_any_layout_and_integer_type(backend):
    y = random_maps(1, 3, 4, 6, 9, 3)
    wiring = random_wiring(2, 3, 4, 10, 3)
    want = shift_add(y, wiring, 10, 3, 'full', backend)
    for dtype in (torch.int32, torch.int64):
        view = wiring.to(dtype).movedim(0, -1).contiguous().movedim(-1, 0)
        assert not view.is_contiguous()
        for got, expected in zip(shift_add(y, view, 10, 3, 'full', backend), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize('batch', [0, 1])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_batches_of_none_and_one(batch, dtype, backend):
    y = random_maps(batch, 2, 3, 4, 5, 3, dtype=dtype)
    *branches, grad_y = run_with_gradient(y, random_wiring(1, 2, 3, 7, 3), 7, 3, 'full', backend)
    assert [tuple(b.shape) for b in branches] == [(batch, 2, 4, 5)] * 3
    assert grad_y.shape == y.shape and torch.isfinite(grad_y).all()


def test_the_gradient_of_the_input_tensor_is_left_alone(backend):
    y = random_maps(1, 2, 3, 4, 5, 3).requires_grad_()
    shift_add(y, random_wiring(1, 2, 3, 7, 3), 7, 3, 'full', backend)
    assert y.grad is None


# -- as an operator of PyTorch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('padding', ['full', 'same'])
def test_opcheck(padding, backend):
    y = random_maps(2, 2, 3, 4, 5, 3, padding).requires_grad_()
    wiring = random_wiring(2, 2, 3, 7, 3)
    torch.library.opcheck(torch.ops.timm_shiftwise.shift_add.default, (y, wiring, 7, 3, padding, backend))
    grads = [torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(
        torch.ops.timm_shiftwise.shift_add_backward.default, (*grads, wiring, 3, 7, 3, padding, backend))


def conv_and_shift_add(x, weight, wiring, focus_length, backend):
    channels, _, kernel_size, _ = weight.shape
    y = F.conv2d(x, weight.flatten(0, 1).unsqueeze(1), padding=kernel_size - 1, groups=channels)
    h, v, i = shift_add(y, wiring, focus_length, kernel_size, 'full', backend)
    return h * 2 + v.relu() + i


@pytest.mark.parametrize('compiler, dynamic', [
    ('aot_eager', False), ('aot_eager', True), pytest.param('inductor', False, marks=pytest.mark.slow)])
def test_a_compiled_graph_is_whole_and_gives_the_same_values_and_gradients(compiler, dynamic, backend):
    torch.manual_seed(0)
    wiring = random_wiring(2, 3, 4, 10, 3)
    compiled = torch.compile(conv_and_shift_add, fullgraph=True, backend=compiler, dynamic=dynamic)
    for size in ((2, 3, 6, 9), (1, 3, 8, 7)) if dynamic else ((2, 3, 6, 9),):
        results = []
        for function in (conv_and_shift_add, compiled):
            torch.manual_seed(1)
            x = torch.randn(size, dtype=torch.float64, requires_grad=True)
            weight = torch.randn(3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
            out = function(x, weight, wiring, 10, backend)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), (x, weight))])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


def test_inference_mode_changes_nothing(backend):
    y = random_maps(1, 2, 3, 4, 5, 3)
    wiring = random_wiring(1, 2, 3, 7, 3)
    want = shift_add(y, wiring, 7, 3, 'full', backend)
    with torch.inference_mode():
        for got, expected in zip(shift_add(y, wiring, 7, 3, 'full', backend), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


# -- what is refused ---------------------------------------------------------------------------------------------------


def good_arguments():
    y = torch.zeros(1, 6, 8, 9)
    return {'y': y, 'wiring': random_wiring(2, 2, 3, 7, 3), 'focus_length': 7, 'kernel_size': 3, 'padding': 'full'}


@pytest.mark.parametrize('change, error, message', [
    ({'y': torch.zeros(1, 6, 8, 9, dtype=torch.int32)}, TypeError, 'y must be one of torch.float64.*got torch.int32'),
    ({'y': torch.zeros(6, 8, 9)}, ValueError, r'y must have the shape .*got \(6, 8, 9\)'),
    ({'y': torch.zeros(1, 7, 8, 9)}, ValueError, 'multiple of C = 2 channels, got 7'),
    ({'y': torch.zeros(1, 6, 2, 9)}, ValueError, r'at least 3 rows and columns, got \(2, 9\)'),
    ({'wiring': torch.zeros(2, 7, dtype=torch.int32)}, ValueError, r'wiring must have .*\[R, C, 7\].*got \(2, 7\)'),
    ({'wiring': torch.zeros(2, 2, 6, dtype=torch.int32)}, ValueError, r'wiring .*\[R, C, 7\].*got \(2, 2, 6\)'),
    ({'wiring': torch.zeros(0, 2, 7, dtype=torch.int32)}, ValueError, r'R and C of at least 1.*got \(0, 2, 7\)'),
    ({'wiring': torch.zeros(2, 2, 7)}, TypeError, 'wiring must be int32 or int64, got torch.float32'),
    ({'focus_length': 0}, ValueError, 'focus_length must be .*got 0'),
    ({'focus_length': 11}, ValueError, r'wiring .*\[R, C, 9\].*focus length 11.*got \(2, 2, 7\)'),
    ({'kernel_size': -3}, ValueError, 'kernel_size must be .*got -3'),
    ({'padding': 'valid'}, ValueError, "'full' or 'same', got 'valid'"),
    ({'backend': 'cuda'}, ValueError, "backend argument must be one of 'auto', 'taichi', 'torch', got 'cuda'"),
])
def test_wrong_arguments_are_refused_and_named(change, error, message):
    with pytest.raises(error, match=message):
        shift_add(**{**good_arguments(), **change})


@pairwise({
    'focus_length, kernel_size, height, width': [(13, 5, 9, 4), (4, 2, 1, 7), (7, 3, 5, 5)],
    'padding': ['full', 'same'],
    'dtype': DTYPES,
})
@pytest.mark.usefixtures('needs_taichi')
def test_the_kernels_for_gpus_agree_on_the_cpu(focus_length, kernel_size, height, width, padding, dtype):
    from timm_shiftwise.ops.shift_add.taichi_gather import backward_gather, forward_gather
    from timm_shiftwise.ops.taichi.lanes import flat, kinds
    from timm_shiftwise.ops.taichi.runtime import launching
    groups = geometry.num_groups(focus_length, kernel_size)
    wiring = random_wiring(2, 3, groups, focus_length, kernel_size)
    y = random_maps(2, 3, groups, height, width, kernel_size, padding, dtype)
    *branches, grad_y = run_with_gradient(y, wiring, focus_length, kernel_size, padding, 'torch')
    grads = gradients_of(branches)
    seen = [torch.empty_like(tensor) for tensor in (*branches, y)]
    kind, real = kinds(dtype)
    common = dict(
        wiring=wiring.flatten(), planes=2 * 3, channels=3, maps=groups, height=height, width=width,
        map_height=y.shape[2], map_width=y.shape[3], shuffles=2, groups=groups,
        first_shift=geometry.shift(0, focus_length, kernel_size, padding), kernel_size=kernel_size,
        e=geometry.crop(kernel_size, padding), kind=kind, real=real)
    with launching(y.device):
        names = ('h', 'v', 'i')
        forward_gather(
            **common, y=flat(y), **{f'out_{name}': flat(out) for name, out in zip(names, seen[:3], strict=True)})
        backward_gather(
            **common, **{f'grad_{name}': flat(grad) for name, grad in zip(names, grads, strict=True)},
            grad_y=flat(seen[3]))
    for a, b in zip(seen, (*branches, grad_y), strict=True):
        torch.testing.assert_close(a, b, rtol=8 * TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])

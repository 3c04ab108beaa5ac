"""Operators and networks in their form for inference give what they gave before."""
import copy
import subprocess
import sys

import pytest
import timm
import torch
from families import FAMILIES, assert_all_close, each_family, image, make, merged, unsettle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from timm.utils import reparameterize_model
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn

from timm_shiftwise.layers import LargeKernelConv2d, MergedConv2d, MergedShiftConv2d, ShiftwiseConv2d
from timm_shiftwise.layers import merged as merged_layers
from timm_shiftwise.models.variants import SHIFTWISE, SHIFTWISE_V2
from timm_shiftwise.ops.shiftwise_conv.ways import ENVIRONMENT_VARIABLE

SMALL = dict(dims=(12, 16, 24, 32), depths=(1, 1, 2, 1), num_classes=7)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
FORMATS = [torch.contiguous_format, torch.channels_last]
OPERATORS = [('sw', 4), ('sw', 1), ('p_sw', 1), ('eq_slak', 1)]
FULL = [family for family in FAMILIES if family != 'p2_sw']
each_full_family = pytest.mark.parametrize('family', FULL)


def relative_error(seen: Tensor, wanted: Tensor) -> float:
    return ((seen - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()


def shiftwise(dim: int, focus_length: int, kernel_size: int, **kwargs) -> ShiftwiseConv2d:
    """An operator in evaluation mode with nothing at its initial value."""
    kwargs = dict(dict(backend='torch', dtype=torch.float64), **kwargs)
    return unsettle(ShiftwiseConv2d(dim, focus_length, kernel_size, **kwargs)).eval()


def operators(model: nn.Module) -> list[nn.Module]:
    return [block.conv_dw for stage in model.stages for block in stage.blocks]


# --- operators ------------------------------------------------------------------------------------------------------

@pairwise({
    'operator, shuffles': OPERATORS,
    'focus_length, kernel_size': [(51, 5), (13, 5), (7, 3), (4, 2), (3, 5), (6, 4), (1, 1)],
    'padding': ['full', 'same'],
    'backend': ['torch', 'taichi'],
})
@pytest.mark.usefixtures('needs_taichi')
def test_a_merged_operator_gives_the_same(operator, shuffles, padding, focus_length, kernel_size, backend):
    layer = shiftwise(
        9, focus_length, kernel_size, operator=operator, num_paths=3, num_shuffles=shuffles, ghost_ratio=0.3,
        padding=padding, backend=backend)
    x = image(2, 9, 8, 5, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(layer.fuse()(x), layer(x)) < 1e-10


@pairwise({
    'operator, ghost_ratio': [('sw', 0.3), ('p_sw', 0.), ('eq_slak', 0.3)],
    'dtype': TOLERANCE,
    'focus_length, kernel_size, height, width': [
        (51, 5, 19, 19), (51, 5, 8, 19), (7, 3, 1, 1), (4, 2, 5, 5), (6, 4, 11, 11), (3, 5, 17, 2), (13, 5, 7, 24)],
    'padding': ['full', 'same'],
    'memory_format': FORMATS,
})
@pytest.mark.usefixtures('poisoned_memory', 'threads')
def test_a_merged_operator_gives_the_same_in_the_type_and_the_layout_of_its_input(
        operator, ghost_ratio, dtype, focus_length, kernel_size, height, width, padding, memory_format):
    layer = shiftwise(
        9, focus_length, kernel_size, operator=operator, num_paths=2, num_shuffles=1, ghost_ratio=ghost_ratio,
        padding=padding)
    x = image(3, 9, height, width, dtype=torch.float64)
    with torch.no_grad():
        seen, wanted = layer.fuse().to(dtype)(x.to(dtype, memory_format=memory_format)), layer(x)
    assert seen.dtype == dtype
    assert relative_error(seen.double(), wanted) < TOLERANCE[dtype]
    if padding == 'full':
        assert seen.is_contiguous(memory_format=memory_format)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    focus_length=st.integers(1, 23),
    kernel_size=st.integers(1, 6),
    operator=st.sampled_from([*(name for name, _ in OPERATORS), 'slak']),
    padding=st.sampled_from(['full', 'full', 'same']),
    batch=st.integers(1, 3),
    dim=st.sampled_from([1, 2, 7, 16, 32]),
    ghost_ratio=st.sampled_from([0., 0.23, 0.6]),
    ghost_split=st.sampled_from(['v1', 'v2']),
    height=st.sampled_from([1, 2, 3, 7, 13, 16]),
    width=st.sampled_from([1, 3, 7, 8, 13]),
    dtype=st.sampled_from(list(TOLERANCE)),
    memory_format=st.sampled_from(FORMATS),
    capability=st.sampled_from(['AVX2', 'AVX512']),
    with_gradient=st.booleans(),
    seed=st.integers(0, 9),
)
@pytest.mark.usefixtures('poisoned_memory')
def test_the_merged_form_equals_the_training_form_on_any_shape(
        focus_length, kernel_size, operator, padding, batch, dim, ghost_ratio, ghost_split, height, width, dtype,
        memory_format, capability, with_gradient, seed):
    if operator == 'slak':
        layer = LargeKernelConv2d(dim, focus_length, kernel_size, dtype=torch.float64)
    else:
        ratio = 0. if dim < 3 else ghost_ratio
        layer = ShiftwiseConv2d(
            dim, focus_length, kernel_size, operator=operator, num_paths=2, ghost_ratio=ratio, ghost_split=ghost_split,
            padding=padding, backend='torch', dtype=torch.float64)
    unsettle(layer, seed).eval()
    x = image(batch, dim, height, width, seed=seed, dtype=torch.float64).requires_grad_(with_gradient)
    low = x.detach().to(dtype, memory_format=memory_format).requires_grad_(with_gradient)
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(with_gradient):
        patch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
        seen, wanted = layer.fuse().to(dtype)(low), layer(x)
        assert seen.dtype == dtype and seen.shape == wanted.shape
        assert relative_error(seen.double(), wanted) < TOLERANCE[dtype]
        if with_gradient:
            grad = image(*seen.shape, seed=seed + 1, dtype=torch.float64)
            got, = torch.autograd.grad(seen, low, grad.to(dtype))
            want, = torch.autograd.grad(wanted, x, grad)
            assert relative_error(got.double(), want) < TOLERANCE[dtype]


@pairwise({
    'capability': ['AVX512', 'AVX2'],
    'focus_length, kernel_size, height, width': [
        (51, 5, 9, 9), (51, 5, 8, 19), (7, 3, 1, 2), (4, 2, 5, 5), (6, 4, 11, 3)],
    'operator, ghost_ratio': [('sw', 0.3), ('p_sw', 0.)],
})
@pytest.mark.usefixtures('poisoned_memory')
def test_channels_last_both_forms_give_the_same(
        operator, ghost_ratio, focus_length, kernel_size, height, width, capability, monkeypatch):
    layer = shiftwise(32, focus_length, kernel_size, operator=operator, ghost_ratio=ghost_ratio)
    x = image(2, 32, height, width, dtype=torch.float64)
    on_planes = []
    plain = merged_layers._on_planes
    monkeypatch.setattr(merged_layers, '_on_planes', lambda *args: on_planes.append(args) or plain(*args))
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    with torch.no_grad():
        seen = layer.fuse().float()(x.to(torch.float32, memory_format=torch.channels_last))
        assert relative_error(seen.double(), layer(x)) < 1e-5
    assert seen.is_contiguous(memory_format=torch.channels_last)
    assert len(on_planes) == (capability == 'AVX2')


@pytest.mark.parametrize('dtype', [*TOLERANCE, torch.float16])
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('capability', ['AVX512', 'AVX2'])
@pytest.mark.parametrize('padding', ['full', 'same'])
def test_ghosts_pass_bit_for_bit(padding, capability, memory_format, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    layer = shiftwise(32, 13, 5, ghost_ratio=0.23, padding=padding).fuse().to(dtype)
    x = image(2, 32, 6, 6, dtype=dtype, memory_format=memory_format)
    assert layer.num_ghost == 7
    for x_of_size in (x, x[:, :, :, :5].contiguous(memory_format=memory_format)):
        with torch.no_grad():
            assert torch.equal(layer(x_of_size)[:, -7:], x_of_size[:, -7:])
        assert torch.equal(layer(x_of_size)[:, -7:], x_of_size[:, -7:])


@pytest.mark.usefixtures('needs_taichi')
def test_a_way_asked_for_starts_taichi_by_itself():
    code = (
        'import os, torch; from timm_shiftwise.layers import ShiftwiseConv2d\n'
        'layer = ShiftwiseConv2d(4, 7, 3, padding="same").eval().fuse(); os.environ["TIMM_SHIFTWISE_WAY"] = "fused"\n'
        'with torch.no_grad(): print(layer(torch.zeros(1, 4, 5, 8)).shape)\n')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert 'torch.Size([1, 4, 5, 8])' in done.stdout, done.stderr


@pytest.mark.parametrize('padding, operator_runs', [('full', False), ('same', True)])
@pytest.mark.parametrize('way', ['fused', 'shift'])
@pytest.mark.usefixtures('needs_taichi')
def test_only_where_windows_are_dropped_the_merged_form_has_small_kernels_to_compute(
        padding, operator_runs, way, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, way)
    merged_layer = shiftwise(6, 13, 3, num_shuffles=2, ghost_ratio=0.3, padding=padding).fuse()
    with torch.profiler.profile() as seen, torch.no_grad():
        merged_layer(image(1, 6, 9, 8, dtype=torch.float64))
    names = {event.name for event in seen.events()}
    assert ('timm_shiftwise::shiftwise_conv2d' in names) == operator_runs
    assert ('timm_shiftwise::shift_add' in names) == (operator_runs and way == 'shift')


@pytest.mark.parametrize('focus_length, kernel_size', [(51, 5), (7, 3), (4, 2), (3, 5), (5, 4)])
def test_a_merged_large_kernel_gives_the_same(focus_length, kernel_size):
    layer = unsettle(LargeKernelConv2d(6, focus_length, kernel_size, dtype=torch.float64)).eval()
    x = image(2, 6, 8, 5, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(layer.fuse()(x), layer(x)) < 1e-10


@pytest.mark.parametrize('padding', ['full', 'same'])
@pytest.mark.parametrize('form', [
    lambda layer, x: layer,
    lambda layer, x: layer.fuse(),
    lambda layer, x: torch.jit.script(layer),
    torch.jit.trace,
    lambda layer, x: torch.export.export(layer, (x,)).module(),
], ids=['trained', 'merged', 'scripted', 'traced', 'exported'])
@torch.no_grad()
def test_what_pruned_kernels_hold_is_seen_in_no_form(form, padding):
    layer = unsettle(ShiftwiseConv2d(6, 13, 5, padding=padding, num_paths=2, backend='torch')).eval()
    x = image(2, 6, 9, 12)
    wanted = layer(x)
    layer.kernels[~layer.group_mask] = float('nan')
    torch.testing.assert_close(form(layer, x)(x), wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_of_pruned_groups_merges_to_its_skip_and_bias():
    layer = shiftwise(4, 9, 3, num_shuffles=2)
    layer.group_mask.fill_(False)
    merged_layer = layer.fuse()
    x = image(1, 4, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(merged_layer(x), x + merged_layer.tall.bias[:, None, None])
        torch.testing.assert_close(merged_layer(x), layer(x))


@pairwise({
    'operator': ['sw', 'p_sw', 'eq_slak'],
    'focus_length, kernel_size, long, short': [
        (51, 5, 59, 5), (13, 5, 17, 5), (7, 3, 11, 3), (4, 2, 5, 3), (6, 4, 9, 5), (3, 5, 7, 5), (1, 1, 1, 1)],
    'kept': ['all', 'one', 'none'],
})
def test_the_sides_follow_from_the_lengths_alone(operator, focus_length, kernel_size, long, short, kept):
    layer = shiftwise(8, focus_length, kernel_size, operator=operator, ghost_ratio=0.3)
    layer.group_mask.fill_(kept == 'all')
    layer.group_mask[:, :, 0] |= kept == 'one'
    merged_layer = layer.fuse()
    assert merged_layer.tall.weight.shape == (8, 1, long, short)
    assert merged_layer.wide.weight.shape == (8, 1, short, long)
    assert long == 2 * max(focus_length // 2, layer.wiring.shape[2] // 2 * kernel_size - 1 - focus_length // 2) + 1
    assert torch.equal(merged_layer.group_mask, layer.kept_groups())
    built = MergedConv2d(8, focus_length, kernel_size, operator=operator, ghost_ratio=0.3, dtype=torch.float64)
    built.load_state_dict(merged_layer.state_dict())


@pytest.mark.parametrize('focus_length, kernel_size, long, short', [(51, 5, 51, 5), (4, 2, 5, 3), (3, 5, 3, 5)])
def test_the_sides_of_merged_large_kernels_are_their_own_made_odd(focus_length, kernel_size, long, short):
    merged_layer = LargeKernelConv2d(3, focus_length, kernel_size).fuse()
    assert merged_layer.tall.weight.shape == (3, 1, max(long, short), short)
    assert merged_layer.wide.weight.shape == (3, 1, short, max(long, short))


def test_a_merged_operator_moves_with_its_model():
    merged_layer = shiftwise(4, 9, 3, dtype=torch.float32).fuse()
    assert isinstance(merged_layer, MergedConv2d)
    x = image(1, 4, 5, 6, dtype=torch.float64)
    assert merged_layer.double()(x).dtype == torch.float64
    assert merged_layer.to('meta')(x.to('meta')).shape == x.shape
    for kind in (MergedConv2d, MergedShiftConv2d):
        on_meta = kind(4, 9, 3, device='meta', dtype=torch.bfloat16).eval()
        assert on_meta(x.to('meta', torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize('padding', ['full', 'same'])
def test_weights_of_another_geometry_are_refused(padding):
    state = shiftwise(4, 9, 3, padding=padding).fuse().state_dict()
    with pytest.raises(RuntimeError, match='focus length'):
        shiftwise(4, 8, 3, padding=padding).fuse().load_state_dict(state)


# --- networks -------------------------------------------------------------------------------------------------------

@pairwise({'family': FAMILIES, 'dtype': TOLERANCE, 'memory_format': FORMATS, 'capability': ['AVX512', 'AVX2']})
@torch.no_grad()
def test_a_merged_network_gives_the_same(family, dtype, memory_format, capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    model = make(family, dims=(16, 32), backend='torch', dtype=torch.float64).eval()
    x = image(2, 3, 32, 48, dtype=torch.float64)
    seen = merged(model).to(dtype)(x.to(dtype, memory_format=memory_format))
    assert seen.dtype == dtype
    assert relative_error(seen.double(), model(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('name', [*FAMILIES.values(), 'test_sw'])
def test_every_network_merges_completely_and_reloads(name, dtype, tmp_path):
    model = unsettle(timm.create_model(name, dtype=dtype, **SMALL)).eval()
    x = image(2, 3, 64, 96, dtype=dtype)
    merged_model = reparameterize_model(model)
    with torch.no_grad():
        wanted, seen = model(x), merged_model(x)
        assert relative_error(seen, wanted) < TOLERANCE[dtype]
        assert torch.equal(reparameterize_model(merged_model)(x), seen), 'merging twice changes nothing'
        timm.models.save_for_hf(
            merged_model, tmp_path / 'hub', model_args=dict(SMALL, reparameterized=True), safe_serialization=True)
        reloaded = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True, dtype=dtype).eval()
        assert torch.equal(reloaded(x), seen)
    kinds = {type(module) for module in merged_model.modules()}
    assert not kinds & {ShiftwiseConv2d, LargeKernelConv2d}
    assert {tensor.dtype for tensor in merged_model.state_dict().values() if tensor.is_floating_point()} == {dtype}


@pytest.mark.parametrize('name', [*SHIFTWISE, *SHIFTWISE_V2])
def test_a_network_is_merged_to_what_is_built_merged(name):
    small = dict(SMALL, device='meta')
    seen = reparameterize_model(timm.create_model(name, **small)).state_dict()
    wanted = timm.create_model(name, reparameterized=True, **small).state_dict()
    assert {key: value.shape for key, value in seen.items()} == {key: value.shape for key, value in wanted.items()}


@each_full_family
def test_no_batch_norm_is_left(family):
    merged_model = merged(make(family))
    assert not [module for module in merged_model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    assert all(isinstance(operator, MergedConv2d) for operator in operators(merged_model))


@each_family
def test_frozen_batch_norms_are_merged_like_others(family):
    model, x = make(family, centre_norm=False) if family == 'sw' else make(family), image(2, 3, 32, 48)
    frozen = freeze_batch_norm_2d(copy.deepcopy(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    assert_all_close([merged(frozen)(x), frozen(x)], [merged(model)(x), model.eval()(x)])


def test_the_norm_behind_an_operator_stays_where_it_cannot_be_folded():
    model = make('sw_v2', padding='same', backend='torch').eval()
    merged_model = merged(model)
    assert all(isinstance(block.norm, nn.BatchNorm2d) for stage in merged_model.stages for block in stage.blocks)
    x = image(2, 3, 32, 48)
    with torch.no_grad():
        assert relative_error(merged_model(x), model(x)) < 1e-5


@each_full_family
def test_merging_leaves_the_original_as_it_was(family):
    model = make(family, backend='torch').eval()
    before = copy.deepcopy(model.state_dict())
    merged_model = reparameterize_model(model)
    for parameter in merged_model.parameters():
        parameter.data.zero_()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


both_forms = pytest.mark.parametrize('form', ['unmerged', 'merged'])


def in_form(model: nn.Module, form: str) -> nn.Module:
    return merged(model) if form == 'merged' else model.eval()


@both_forms
@each_family
def test_every_buffer_is_in_the_state_dict(family, form):
    model = in_form(make(family), form)
    assert {key for key, _ in model.named_buffers()} <= model.state_dict().keys()


@both_forms
@each_family
@torch.no_grad()
def test_a_network_built_without_memory_takes_its_weights_by_reference(family, form):
    args = dict(dims=(8, 12), depths=(1, 1), focus_lengths=(15, 7), num_classes=10, backend='torch')
    model = in_form(make(family, **args), form)
    with torch.device('meta'):
        empty = timm.create_model(FAMILIES[family], reparameterized=form == 'merged', **args).eval()
    assert all(value.is_meta for value in [*empty.parameters(), *empty.buffers()])
    empty.load_state_dict(model.state_dict(), assign=True)
    x = image(2, 3, 32, 48)
    assert torch.equal(empty(x), model(x))


@pytest.mark.parametrize('family', [family for family in FAMILIES if family != 'slak'])
def test_a_merged_network_has_the_masks_of_the_network(family):
    model = make(family)
    for operator, merged_operator in zip(operators(model), operators(merged(model)), strict=True):
        assert not operator.kept_groups().all()
        assert torch.equal(operator.kept_groups(), merged_operator.kept_groups())


def test_a_merged_network_refuses_to_be_trained():
    model = reparameterize_model(timm.create_model('test_sw')).train()
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(RuntimeError, match='reparameterized'):
        model(x)
    with torch.no_grad():
        model(x)
    x.requires_grad_()
    model.eval()(x).sum().backward()
    assert x.grad.abs().sum() > 0

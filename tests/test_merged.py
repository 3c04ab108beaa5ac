"""Operators and networks in their form for inference give what they gave before."""
import subprocess
import sys

import pytest
import timm
import torch
from timm.utils import reparameterize_model

from timm_shiftwise.layers import LargeKernelConv2d, MergedShiftwiseConv2d, ShiftwiseConv2d
from timm_shiftwise.models.variants import SHIFTWISE, SHIFTWISE_V2
from timm_shiftwise.ops.shiftwise_conv.ways import ENVIRONMENT_VARIABLE, choose_inference_way

SMALL = dict(dims=(12, 16, 24, 32), depths=(1, 1, 2, 1), num_classes=7)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights, BatchNorm statistics and masks, of a size that keeps outputs near one."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith('running_var'):
            tensor.data.uniform_(0.5, 2.)
        elif name.endswith('mask'):
            tensor.copy_(torch.rand(tensor.shape) > 0.5)
        elif tensor.is_floating_point():
            tensor.data.normal_(std=0.3)
    return module.eval()


def relative_error(seen: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((seen - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()


def merged_output(
        way: str,
        layer: ShiftwiseConv2d,
        x: torch.Tensor,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        tolerance: float,
        monkeypatch: pytest.MonkeyPatch,
) -> torch.Tensor:
    """What a layer gives merged, in a dtype and a layout, computed in one way; it must be what it gives as it is."""
    merged = layer.fuse().to(dtype)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, way)
    with torch.no_grad():
        seen, wanted = merged(x.to(dtype, memory_format=memory_format)), layer(x)
    assert seen.dtype == dtype
    assert relative_error(seen.double(), wanted) < tolerance
    return seen


@pytest.mark.parametrize('focus_length, kernel_size', [(51, 5), (13, 5), (7, 3), (4, 2), (3, 5), (6, 4), (1, 1)])
@pytest.mark.parametrize('padding', ['full', 'same'])
@pytest.mark.parametrize('operator, shuffles', [('sw', 4), ('sw', 1), ('p_sw', 1), ('eq_slak', 1)])
def test_a_merged_operator_gives_the_same(operator, shuffles, padding, focus_length, kernel_size, backend):
    torch.manual_seed(0)
    layer = randomise(ShiftwiseConv2d(
        9, focus_length, kernel_size, operator=operator, num_paths=3, num_shuffles=shuffles, ghost_ratio=0.3,
        padding=padding, backend=backend, dtype=torch.float64))
    x = torch.randn(2, 9, 8, 5, dtype=torch.float64)
    merged = layer.fuse()
    with torch.no_grad():
        assert relative_error(merged(x), layer(x)) < 1e-10


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('focus_length, kernel_size, height, width', [
    (51, 5, 8, 19), (7, 3, 1, 1), (4, 2, 5, 33), (3, 5, 17, 2), (5, 1, 3, 16), (13, 5, 7, 24), (6, 4, 9, 36)])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize('padding', ['full', 'same'])
@pytest.mark.parametrize('operator, ghost_ratio', [('sw', 0.3), ('p_sw', 0.)])
@pytest.mark.usefixtures('poisoned_memory', 'needs_taichi', 'threads')
def test_a_merged_operator_in_one_kernel_gives_the_same(
        operator, ghost_ratio, padding, dtype, tolerance, focus_length, kernel_size, height, width, memory_format,
        monkeypatch):
    torch.manual_seed(0)
    layer = randomise(ShiftwiseConv2d(
        9, focus_length, kernel_size, operator=operator, num_paths=2, num_shuffles=2, ghost_ratio=ghost_ratio,
        padding=padding, backend='torch', dtype=torch.float64))
    x = torch.randn(3, 9, height, width, dtype=torch.float64)
    merged_output('fused', layer, x, dtype, memory_format, tolerance, monkeypatch)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('focus_length, kernel_size, height, width', [
    (51, 5, 19, 19), (51, 5, 8, 19), (7, 3, 1, 1), (4, 2, 5, 5), (6, 4, 11, 11), (3, 5, 17, 2)])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize('operator, ghost_ratio', [('sw', 0.3), ('p_sw', 0.), ('eq_slak', 0.3)])
@pytest.mark.usefixtures('poisoned_memory', 'threads')
def test_a_merged_operator_in_two_convolutions_gives_the_same_in_the_layout_of_its_input(
        operator, ghost_ratio, dtype, tolerance, focus_length, kernel_size, height, width, memory_format,
        monkeypatch):
    torch.manual_seed(0)
    layer = randomise(ShiftwiseConv2d(
        9, focus_length, kernel_size, operator=operator, ghost_ratio=ghost_ratio, backend='torch',
        dtype=torch.float64))
    x = torch.randn(3, 9, height, width, dtype=torch.float64)
    seen = merged_output('merged', layer, x, dtype, memory_format, tolerance, monkeypatch)
    assert seen.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize('capability', ['AVX512', 'AVX2'])
@pytest.mark.parametrize('focus_length, kernel_size, height, width', [
    (51, 5, 9, 9), (51, 5, 8, 19), (7, 3, 1, 2), (4, 2, 5, 5), (6, 4, 11, 3)])
@pytest.mark.parametrize('operator, ghost_ratio', [('sw', 0.3), ('p_sw', 0.)])
@pytest.mark.usefixtures('poisoned_memory')
def test_channels_last_a_merged_operator_gives_the_same(
        operator, ghost_ratio, focus_length, kernel_size, height, width, capability, monkeypatch):
    torch.manual_seed(0)
    layer = randomise(ShiftwiseConv2d(
        32, focus_length, kernel_size, operator=operator, ghost_ratio=ghost_ratio, backend='torch',
        dtype=torch.float64))
    x = torch.randn(2, 32, height, width, dtype=torch.float64)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    seen = merged_output('merged', layer, x, torch.float32, torch.channels_last, 1e-5, monkeypatch)
    assert seen.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures('needs_taichi')
def test_a_way_asked_for_starts_taichi_by_itself():
    code = (
        'import os, torch; from timm_shiftwise.layers import ShiftwiseConv2d\n'
        'layer = ShiftwiseConv2d(4, 7, 3).eval().fuse(); os.environ["TIMM_SHIFTWISE_WAY"] = "fused"\n'
        'with torch.no_grad(): print(layer(torch.zeros(1, 4, 5, 8)).shape)\n')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert 'torch.Size([1, 4, 5, 8])' in done.stdout, done.stderr


@pytest.mark.usefixtures('needs_taichi')
def test_a_merged_operator_of_few_groups_takes_one_kernel_unless_a_gradient_is_wanted(monkeypatch):
    layer = randomise(ShiftwiseConv2d(6, 51, 5, num_shuffles=2, ghost_ratio=0.3))
    layer.mask.fill_(False)
    layer.mask[:, 3] = True
    merged = layer.fuse()
    x = torch.randn(1, 6, 48, 48)
    way = choose_inference_way(x, 5, merged.density, 'full')
    assert merged.density == pytest.approx(1 / 11) and way.way == 'fused', way
    with torch.profiler.profile() as seen, torch.no_grad():
        merged(x)
    names = {event.name for event in seen.events()}
    assert 'timm_shiftwise::folded_conv2d' in names and 'aten::conv2d' not in names
    x.requires_grad_()
    merged(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize('focus_length, kernel_size', [(51, 5), (7, 3), (4, 2), (3, 5), (5, 4)])
def test_a_merged_large_kernel_gives_the_same(focus_length, kernel_size):
    torch.manual_seed(0)
    layer = randomise(LargeKernelConv2d(6, focus_length, kernel_size, dtype=torch.float64))
    x = torch.randn(2, 6, 8, 5, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(layer.fuse()(x), layer(x)) < 1e-10


def test_a_layer_of_pruned_groups_merges_to_its_skip_and_bias():
    layer = randomise(ShiftwiseConv2d(4, 9, 3, num_shuffles=2, backend='torch', dtype=torch.float64))
    layer.mask.fill_(False)
    merged = layer.fuse()
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), x + merged.bias[:, None, None])
        torch.testing.assert_close(merged(x), layer(x))
    assert merged.tall.shape == merged.wide.shape == (4, 1, 1)


def test_columns_that_no_kept_group_touches_are_left_out():
    layer = randomise(ShiftwiseConv2d(4, 15, 3, operator='eq_slak', backend='torch'))
    layer.mask.fill_(False)
    layer.mask[:, 2] = True  # the wide kernel's middle piece
    assert layer.fuse().wide.shape == (4, 3, 3)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('name', [*SHIFTWISE, *SHIFTWISE_V2])
def test_every_network_merges_completely_and_reloads(name, dtype, tmp_path):
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, dtype=dtype, **SMALL))
    x = torch.randn(2, 3, 64, 96, dtype=dtype)
    merged = reparameterize_model(model)
    with torch.no_grad():
        wanted, seen = model(x), merged(x)
        assert relative_error(seen, wanted) < TOLERANCE[dtype]
        assert torch.equal(reparameterize_model(merged)(x), seen), 'merging twice changes nothing'
        timm.models.save_for_hf(
            merged, tmp_path / 'hub', model_args=dict(SMALL, reparameterized=True), safe_serialization=True)
        reloaded = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True, dtype=dtype).eval()
        assert torch.equal(reloaded(x), seen)
    kinds = {type(module) for module in merged.modules()}
    assert not kinds & {ShiftwiseConv2d, LargeKernelConv2d}
    if not name.startswith('sw_v2'):
        assert torch.nn.BatchNorm2d not in kinds
    assert {tensor.dtype for tensor in merged.state_dict().values() if tensor.is_floating_point()} == {dtype}


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


def test_a_merged_operator_moves_with_its_model():
    merged = randomise(ShiftwiseConv2d(4, 9, 3, backend='torch')).fuse()
    assert isinstance(merged, MergedShiftwiseConv2d)
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    assert merged.double()(x).dtype == torch.float64
    assert merged.to('meta')(x.to('meta')).shape == x.shape
    assert MergedShiftwiseConv2d(4, 9, 3, device='meta', dtype=torch.bfloat16).eval()(
        x.to('meta', torch.bfloat16)).dtype == torch.bfloat16


def test_weights_of_another_geometry_are_refused():
    merged = ShiftwiseConv2d(4, 9, 3, backend='torch').fuse()
    with pytest.raises(RuntimeError, match='focus length'):
        ShiftwiseConv2d(4, 8, 3, backend='torch').fuse().load_state_dict(merged.state_dict())

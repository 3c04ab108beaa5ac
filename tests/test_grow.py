"""Shift-wise networks grown from ConvNeXts: the same function, by every door that weights come in."""
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from families import image, merged, unsettle
from hub_server import HubServer, connected
from pairwise import pairwise
from PIL import Image
from safetensors.torch import save
from torch import nn

import timm_shiftwise
from timm_shiftwise.cli import main
from timm_shiftwise.models import CheckpointError, describe_checkpoint
from timm_shiftwise.models.pretrained import PretrainedWeightsError
from timm_shiftwise.sparsity.schedule import RUNNING, WAITING

LONG = dict(focus_lengths=(51, 49, 47, 41))
"""Focus lengths at which less than a fifth of the groups come from a ConvNeXt."""


@pytest.fixture(autouse=True)
def without_taichi(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is arithmetic on weights: no kernel need be compiled for it."""
    monkeypatch.setenv('TIMM_SHIFTWISE_BACKEND', 'torch')


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with connected(tmp_path, monkeypatch) as server:
        yield server


def convnext(name: str = 'test_convnext', **kwargs) -> nn.Module:
    """A ConvNeXt with no parameter at its initial value, in evaluation mode."""
    return unsettle(timm.create_model(name, **kwargs)).eval()


@torch.no_grad()
def error(model: nn.Module, wanted: nn.Module, side: int = 64, dtype: torch.dtype = torch.float32) -> float:
    """Largest difference of two networks' logits as a share of the largest logit, on images that are not square."""
    x = image(2, wanted.in_chans, side, side + 7, dtype=dtype)
    logits = wanted(x)
    return ((model.eval()(x) - logits).abs().max() / logits.abs().max()).item()


# --- the same function ----------------------------------------------------------------------------------------------

@pairwise({
    'kernel_size': [1, 3, 7],
    'focus_lengths': [(1, 13), (14, 15), (23, 7)],
    'num_paths': [1, 2],
    'operator, num_shuffles': [('sw', 1), ('sw', 4), ('p_sw', 3), ('eq_slak', 1)],
    'padding': ['full', 'same'],
    'centre_norm': [True, False],
})
def test_an_operator_of_any_geometry_takes_up_a_depthwise_convolution(
        kernel_size, focus_lengths, num_paths, operator, num_shuffles, padding, centre_norm):
    grown = timm.create_model(
        'sw_convnext_tiny', depths=(1, 2), dims=(5, 8), num_classes=3, kernel_size=kernel_size,
        focus_lengths=focus_lengths, num_paths=num_paths, operator=operator, num_shuffles=num_shuffles, padding=padding,
        centre_norm=centre_norm).double()
    plain = copy.deepcopy(grown).eval()
    plain.sparsity = nn.Identity()
    for stage in plain.stages:
        for block in stage.blocks:
            dim = block.conv_dw.dim
            block.conv_dw = nn.Conv2d(dim, dim, kernel_size, padding='same', groups=dim, dtype=torch.float64)
    before = copy.deepcopy(unsettle(plain).state_dict())
    grown.load_state_dict(plain.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    assert error(grown, plain, side=16, dtype=torch.float64) < 1e-12
    assert error(merged(grown), plain, side=16, dtype=torch.float64) < 1e-12


@pytest.mark.parametrize('name', ['test_convnext', 'test_convnext2', 'convnext_atto'])
def test_a_grown_network_has_the_convnexts_logits_and_maps_merged_too(name):
    source = convnext(name, num_classes=7, in_chans=1)
    grown = timm_shiftwise.grow(source)
    assert error(grown, source) < 1e-5
    assert error(merged(grown), source) < 1e-5
    grown = timm_shiftwise.grow(source.double())
    assert error(grown, source, dtype=torch.float64) < 1e-12
    x = image(1, 1, 64, 64, dtype=torch.float64)
    for seen, wanted in zip(
            grown.forward_intermediates(x, intermediates_only=True),
            source.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(seen, wanted)


def test_growing_takes_over_all_that_makes_the_function():
    source = convnext(
        'test_convnext', num_classes=0, ls_init_value=None, act_layer='relu', norm_eps=1e-3, dims=(8, 12, 16, 20),
        global_pool='max').double()
    grown = timm_shiftwise.grow(source, drop_path_rate=0.1, **LONG)
    assert grown.stages[0].blocks[0].conv_dw.focus_length == 51
    assert not grown.training and timm_shiftwise.grow(source.train()).training
    assert error(grown, source.eval(), dtype=torch.float64) < 1e-12


def test_a_name_brings_its_weights_and_its_licence(hub):
    source = convnext('convnext_tiny.dinov3_lvd1689m', depths=(1, 1, 1, 1), dims=(8, 12, 16, 20))
    state = source.state_dict()
    hub.add('timm/convnext_tiny.dinov3_lvd1689m', {'model.safetensors': save(state)})
    with pytest.MonkeyPatch.context() as patch:
        create = timm.create_model
        patch.setattr(timm, 'create_model', lambda name, **kwargs: create(
            name, **(dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20)) | kwargs)))
        with pytest.warns(UserWarning, match="dinov3_lvd1689m are under the licence 'dinov3-license"):
            grown = timm_shiftwise.grow('convnext_tiny.dinov3_lvd1689m')
    assert error(grown, source) < 1e-5
    assert grown.pretrained_cfg['license'] == 'dinov3-license'
    assert (grown.pretrained_cfg['architecture'], grown.num_classes) == ('sw_convnext_tiny', 0)
    assert not {'url', 'hf_hub_id'} & grown.pretrained_cfg.keys()


# --- the doors ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('change', [
    dict(), dict(num_classes=5), dict(num_classes=0), dict(in_chans=1), dict(features_only=True)], ids=str)
def test_pretrained_weights_are_those_that_timm_publishes(hub, change):
    source = convnext()
    hub.add('timm/test_convnext.r160_in1k', {'model.safetensors': save(source.state_dict())})
    wanted = timm.create_model('test_convnext', pretrained=True, **change).eval()
    grown = timm.create_model('test_sw_convnext.r160_in1k', pretrained=True, **change).eval()
    if 'num_classes' in change:
        wanted.reset_classifier(0)
        grown.reset_classifier(0)
    x = image(2, change.get('in_chans', 3), 64, 64)
    with torch.no_grad():
        seen, logits = grown(x), wanted(x)
    for a, b in zip(seen, logits, strict=True) if 'features_only' in change else [(seen, logits)]:
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert len(set(hub.downloads())) == 1


@pytest.mark.slow
@pytest.mark.parametrize('size', ['tiny', 'small', 'base'])
def test_a_registered_size_has_the_logits_of_its_convnext(hub, size):
    source = convnext(f'convnext_{size}')
    tag = next(iter(timm.models.get_arch_pretrained_cfgs(f'convnext_{size}')))
    hub.add(f'timm/{tag}', {'model.safetensors': save(source.state_dict())})
    grown = timm.create_model(f'sw_{tag}', pretrained=True)
    assert error(grown, source, side=96) < 1e-5
    assert error(merged(grown), source, side=96) < 1e-5


@pytest.mark.parametrize('wrapper', ['bare', 'ema', 'ddp'])
def test_a_file_of_ones_own_convnext_grows_as_it_is_loaded(tmp_path, wrapper):
    source = convnext(num_classes=10)
    state = {('module.' if wrapper == 'ddp' else '') + key: value for key, value in source.state_dict().items()}
    file = tmp_path / 'weights.pth'
    torch.save({'bare': state, 'ddp': {'state_dict': state}, 'ema': {'state_dict_ema': state}}[wrapper], file)
    grown = timm.create_model('test_sw_convnext', num_classes=10, checkpoint_path=str(file))
    assert error(grown, source) < 1e-5


def test_the_maps_of_features_only_grow_as_they_are_loaded():
    source = convnext()
    features = timm.create_model('test_sw_convnext', features_only=True).eval()
    features.load_state_dict(source.state_dict())
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        maps = source.forward_intermediates(x, intermediates_only=True)
        for seen, wanted in zip(features(x), maps, strict=True):
            torch.testing.assert_close(seen, wanted)


def test_a_grown_network_is_a_network_like_any_other_from_then_on(tmp_path):
    grown = timm_shiftwise.grow(convnext(num_classes=10))
    found = describe_checkpoint(grown.state_dict())
    assert (found['layout'], found['model'], found['model_args']) == (
        'timm-shiftwise', 'test_sw_convnext', {'num_classes': 10})
    again = timm.create_model('test_sw_convnext', num_classes=10)
    again.load_state_dict(grown.state_dict())
    assert error(again, grown) == 0
    built = timm.create_model('test_sw_convnext', num_classes=10, reparameterized=True)
    built.load_state_dict(merged(grown).state_dict())
    assert error(built, grown) < 1e-5


def test_registered_weights_are_timms_under_their_licence_and_inputs():
    ours = [name for name in timm.list_pretrained() if 'sw_convnext' in name]
    assert {name.split('.')[0] for name in ours} == {
        'sw_convnext_tiny', 'sw_convnext_small', 'sw_convnext_base', 'sw_convnext_large', 'test_sw_convnext'}
    for name in ours:
        theirs, cfg = timm.get_pretrained_cfg(name.replace('sw_', '')), timm.get_pretrained_cfg(name)
        assert cfg.hf_hub_id == theirs.hf_hub_id == f'timm/{name.replace("sw_", "")}'
        assert cfg.license == 'apache-2.0' and not cfg.url
        for key in (
                'tag', 'input_size', 'test_input_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'num_classes',
                'pool_size'):
            assert getattr(cfg, key) == getattr(theirs, key)
    assert {timm.get_pretrained_cfg(name).num_classes for name in ours} >= {1000, 11821, 21841}
    assert timm.get_pretrained_cfg('sw_convnext_tiny').tag == 'in12k_ft_in1k'


# --- what is refused ------------------------------------------------------------------------------------------------

SMALL = dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20))


def without(state: dict, key: str) -> dict:
    return {name: value for name, value in state.items() if name != key}


def original(state: dict) -> dict:
    """A ConvNeXt's weights by the names of its authors' code."""
    return {'model': {
        key.replace('conv_dw', 'dwconv').replace('.blocks.', '.').replace('mlp.fc', 'pwconv')
        .replace('head.fc', 'head').replace('stem', 'downsample_layers.0'): value for key, value in state.items()}}


REFUSED = {
    'another size': (lambda: convnext(depths=(1, 1, 1, 1)).state_dict(), r'depths=\(1, 1, 1, 1\)'),
    'other widths': (lambda: convnext(dims=(24, 32, 48, 72)).state_dict(), r'dims=\(24, 32, 48, 72\)'),
    'version 2': (lambda: timm.create_model('convnextv2_atto', **SMALL).state_dict(), 'ConvNeXt V2'),
    'overlapping stem': (lambda: timm.create_model('convnext_atto_ols', **SMALL).state_dict(), '_ols'),
    'norms without bias': (lambda: timm.create_model('convnext_atto_rms', **SMALL).state_dict(), '_rms'),
    'norm before pooling': (lambda: timm.create_model('convnext_tiny_hnf', **SMALL).state_dict(), '_hnf'),
    'hidden layer': (lambda: timm.create_model('convnext_large_mlp', **SMALL).state_dict(), 'large_mlp'),
    'kernels of several sizes': (lambda: timm.create_model('test_convnext3', **SMALL).state_dict(), r'\(5, 5\)'),
    "the authors' code": (lambda: original(convnext().state_dict()), r'timm_shiftwise\.grow\(timm\.create_model'),
    'cut short': (lambda: without(convnext().state_dict(), 'stages.2.blocks.1.conv_dw.bias'),
                  r'stages\.2\.blocks\.1\.conv_dw\.bias is missing'),
    'cut shorter': (lambda: without(convnext().state_dict(), 'stages.2.blocks.1.mlp.fc1.weight'),
                    r'stages\.2\.blocks\.1\.mlp\.fc1\.weight is missing'),
    'bent': (lambda: {**convnext().state_dict(), 'stages.1.blocks.0.conv_dw.weight': torch.zeros(7)},
             r'several sizes|shape \(7,\)'),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_what_does_not_fit_is_refused_by_every_door_and_nothing_is_loaded(hub, kind):
    make, told = REFUSED[kind]
    state = make()
    model = timm.create_model('test_sw_convnext')
    before = copy.deepcopy(model.state_dict())
    for strict in (True, False):
        with pytest.raises(CheckpointError, match='(?s)' + told):
            model.load_state_dict(state, strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    hub.add('timm/test_convnext.r160_in1k', {'model.safetensors': save(state.get('model', state))})
    with pytest.raises(CheckpointError, match='(?s)' + told):
        timm.create_model('test_sw_convnext', pretrained=True)


@pytest.mark.parametrize('name, args, told', [
    ('sw_tiny', {}, r'7 x 7|takes \(12, 1, 5, 5\)'),
    ('sw_convnext_tiny', dict(ghost_ratio=0.3), 'give ghost_ratio=0'),
    ('sw_convnext_tiny', dict(single_centre=False), 'single_centre=True'),
    ('sw_convnext_tiny', dict(reparameterized=True), 'without reparameterized=True'),
    ('slak_tiny', {}, "timm.create_model\\('sw_convnext_tiny'"),
])
def test_a_network_that_cannot_take_a_convnext_says_what_could(name, args, told):
    sizes = dict(depths=(1, 1, 1, 1), dims=(12, 16, 20, 24))
    model = timm.create_model(name, focus_lengths=(15, 15, 15, 15), **sizes, **args)
    with pytest.raises(CheckpointError, match='(?s)' + told):
        model.load_state_dict(convnext(**sizes).state_dict())


@pytest.mark.parametrize('source, told', [
    (lambda: convnext(output_stride=16), r'dilated, .*\[4, 8, 16, 16\]'),
    (lambda: timm.create_model('test_sw'), 'ShiftwiseNet'),
    (lambda: timm.create_model('convnextv2_atto', **SMALL), 'ConvNeXt V2'),
])
def test_a_model_that_cannot_be_grown_is_refused_with_the_reason(source, told):
    with pytest.raises(ValueError, match=told):
        timm_shiftwise.grow(source())


def test_a_download_that_is_cut_is_no_network(hub):
    hub.add('timm/test_convnext.r160_in1k', {'model.safetensors': save(convnext().state_dict())[:-1000]})
    with pytest.raises(PretrainedWeightsError, match=r'model\.safetensors .*timm/test_convnext\.r160_in1k'):
        timm.create_model('test_sw_convnext', pretrained=True)


# --- growth ---------------------------------------------------------------------------------------------------------

def test_branches_learn_at_once_and_the_other_groups_from_the_second_step_on():
    grown = timm_shiftwise.grow(convnext(num_classes=10)).train()
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    for step in (1, 2):
        optimizer.zero_grad()
        grown(image(4, 3, 64, 64, seed=step)).square().sum().backward()
        for stage in grown.stages:
            for block in stage.blocks:
                layer = block.conv_dw
                centre = torch.zeros(layer.dim, layer.num_maps, dtype=torch.bool)
                centre[torch.arange(layer.dim), layer.wiring[0, :, -1].long()] = True
                moved = layer.kernels.grad[0].abs().amax((2, 3)) > 0
                assert moved[centre].all()
                assert moved[~centre].any() == (step == 2)
                assert (layer.norm_h.weight.grad != 0).all() and (layer.norm_v.weight.grad != 0).all()
        optimizer.step()


def test_the_groups_that_the_convnext_does_not_fill_are_drawn_as_always():
    source = convnext()
    torch.manual_seed(0)
    grown = timm_shiftwise.grow(source)
    torch.manual_seed(0)
    fresh = timm.create_model('test_sw_convnext')
    for ours, drawn in zip(grown.stages, fresh.stages, strict=True):
        ours, drawn = ours.blocks[0].conv_dw, drawn.blocks[0].conv_dw
        same = (ours.kernels == drawn.kernels).flatten(3).all(3)[0]
        assert (same.sum(1) == ours.num_maps - 1).all()
        assert not same[torch.arange(ours.dim), ours.wiring[0, :, -1].long()].any()


def test_grow_init_lets_the_new_branches_be_heard():
    source = convnext()
    silent, loud = timm_shiftwise.grow(source), timm_shiftwise.grow(source, grow_init=0.1)
    layer = loud.stages[1].blocks[0].conv_dw
    assert (layer.norm_h.weight == 0.1).all() and (layer.norm_v.weight == 0.1).all()
    assert error(silent, source) < 1e-5 < error(loud, source)


# --- sparsity -------------------------------------------------------------------------------------------------------

def pretrained(hub: HubServer, source: nn.Module, **kwargs) -> nn.Module:
    hub.add('timm/test_convnext.r160_in1k', {'model.safetensors': save(source.state_dict())})
    return timm.create_model('test_sw_convnext', pretrained=True, **kwargs)


@pytest.mark.parametrize('sparsity', [0.3, 0.8])
@pytest.mark.parametrize('scale', [1., 0.01])
def test_sparsity_by_magnitude_spares_what_the_convnext_brought(hub, sparsity, scale):
    source = convnext()
    for module in source.modules():  # kernels far below those that are drawn, and a one at their middle
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.weight.data.mul_(scale)[:, :, 3, 3] += 1
    grown = pretrained(hub, source, sparsity=sparsity, **LONG).train()
    assert int(grown.sparsity.phase) == WAITING
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.)
    grown(image(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    assert int(grown.sparsity.phase) == RUNNING
    kept = torch.cat([layer.group_mask.flatten() for layer in grown.sparsity.layers()]).double().mean()
    assert kept == pytest.approx(1 - sparsity, abs=1e-3)
    assert error(grown, source) < 1e-5


def test_sparsity_by_magnitude_keeps_the_largest_groups_under_one_threshold():
    model = unsettle(timm.create_model('test_sw', sparsity=0.6, sparsity_init='magnitude'))
    for index, layer in enumerate(model.sparsity.layers()):
        layer.group_mask.fill_(True)
        layer.kernels.data.mul_(1 + 0.02 * index)
    magnitudes = [layer.kernels.detach().abs().sum((3, 4)) for layer in model.sparsity.layers()]
    threshold = torch.cat([part.flatten() for part in magnitudes]).quantile(0.6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.)
    model(image(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    for layer, magnitude in zip(model.sparsity.layers(), magnitudes, strict=True):
        assert torch.equal(layer.group_mask, magnitude > threshold)


# --- calibration ----------------------------------------------------------------------------------------------------

def mean_change_in_training_mode(model: nn.Module, x: torch.Tensor) -> float:
    """How far a training step's logits are from those of evaluation, in the mean; the model is left alone."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        return (model.eval()(x) - model.train()(x)).abs().mean().item()


@pytest.mark.parametrize('args', [dict(), dict(centre_norm=True), dict(grow_init=0.3)], ids=str)
def test_calibration_changes_nothing_in_evaluation_and_little_in_training(args):
    source = convnext(num_classes=10).double()
    grown = timm_shiftwise.grow(source, **args).train()
    plain = copy.deepcopy(grown).eval()
    images = image(16, 3, 64, 64, dtype=torch.float64) * 0.5 + 0.2
    assert timm_shiftwise.calibrate(grown, ((part, None) for part in images.split(4)), batches=4) is grown
    assert grown.training and all(module.training for module in grown.modules())
    assert error(grown, plain, dtype=torch.float64) < 1e-10
    off, before = mean_change_in_training_mode(grown, images), mean_change_in_training_mode(plain, images)
    assert off < (1e-10 if not args else 0.3 * before)
    layer = grown.stages[0].blocks[0].conv_dw
    seen = []
    layer.norm_v.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        grown.eval()(images)
    torch.testing.assert_close(layer.norm_v.running_mean, seen[0].mean((0, 2, 3)))
    torch.testing.assert_close(layer.norm_v.running_var, seen[0].var((0, 2, 3), correction=0))


def test_a_grown_network_computes_in_training_mode_what_the_convnext_does():
    source = convnext(num_classes=10).double()
    grown = timm_shiftwise.grow(source)
    assert mean_change_in_training_mode(grown, image(4, 3, 64, 64, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize('images, batches, told', [
    ([], None, 'no images'), ([torch.full((1, 3, 64, 64), float('nan'))], None, 'not finite'),
    ([torch.zeros(1, 3, 64, 64)], 0, 'got 0')])
def test_calibration_without_images_is_refused_and_sets_nothing(images, batches, told):
    grown = timm_shiftwise.grow(convnext())
    before = copy.deepcopy(grown.state_dict())
    with pytest.raises(ValueError, match=told):
        timm_shiftwise.calibrate(grown, images, batches)
    assert all(torch.equal(value, before[key]) for key, value in grown.state_dict().items())


def test_calibration_of_a_merged_network_is_refused():
    with pytest.raises(ValueError, match='merged'):
        timm_shiftwise.calibrate(merged(timm_shiftwise.grow(convnext())), [image(1, 3, 64, 64)])


def test_growing_what_timm_publishes_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        timm_shiftwise.grow(convnext())


# --- the command ----------------------------------------------------------------------------------------------------

def converted(source: Path, folder: Path, *arguments: str) -> str:
    """The model card of what the command makes of a file."""
    assert main(['convert', str(source), '--output', str(folder), '--no-pictures', *arguments]) == 0
    return (folder / 'README.md').read_text()


def test_a_convnext_is_converted_with_a_card_that_names_it(tmp_path):
    source = convnext(num_classes=10)
    torch.save(source.state_dict(), tmp_path / 'convnext.pth')
    card = converted(tmp_path / 'convnext.pth', tmp_path / 'grown', '--to', 'test_sw_convnext', '--license', 'mit')
    for part in ('license: mit', 'Grown from a ConvNeXt', 'Zhuang Liu', 'arxiv.org/abs/2201.03545',
                 "accuracies are ConvNeXt's", 'liu2022convnet', 'li2024shift'):
        assert part in card
    assert error(timm.create_model(f'local-dir:{tmp_path / "grown"}', pretrained=True), source) < 1e-5


def test_a_folder_of_timms_brings_its_licence_and_inputs(tmp_path):
    source = convnext('convnext_tiny.dinov3_lvd1689m', depths=(1, 1, 1, 1), dims=(8, 12, 16, 20))
    timm.models.save_for_hf(source, str(tmp_path / 'theirs'), safe_serialization=True)
    card = converted(tmp_path / 'theirs', tmp_path / 'grown', '--to', 'sw_convnext_tiny', '--reparameterize')
    assert 'license: dinov3-license' in card and 'huggingface.co/timm/convnext_tiny.dinov3_lvd1689m' in card
    grown = timm.create_model(f'local-dir:{tmp_path / "grown"}', pretrained=True)
    assert grown.pretrained_cfg['crop_pct'] == 1. and error(grown, source) < 1e-5


def test_a_fine_tuned_network_still_names_the_convnext(tmp_path):
    run = tmp_path / 'run'
    run.mkdir()
    torch.save({'state_dict': timm_shiftwise.grow(convnext(num_classes=10)).state_dict()}, run / 'last.pth.tar')
    (run / 'args.yaml').write_text('model: test_sw_convnext\npretrained: true\n')
    assert 'Fine-tuned from weights that were grown from a ConvNeXt' in converted(run, tmp_path / 'out')


def test_a_convnext_without_a_network_to_grow_to_is_told_the_option(tmp_path, capsys):
    torch.save(convnext().state_dict(), tmp_path / 'convnext.pth')
    for arguments, told in (
            ([], 'that of a ConvNeXt'), ([], '--to test_sw_convnext'),
            (['--to', 'sw_tiny'], 'kernel_size=7'), (['--to', 'sw_convnext_tiny'], r'depths=(1, 2, 4, 2)')):
        assert main(['convert', str(tmp_path / 'convnext.pth'), '--output', str(tmp_path / 'out'), *arguments]) == 2
        assert told in ' '.join(capsys.readouterr().err.split())
    assert not (tmp_path / 'out').exists()


def test_a_conversion_calibrates_by_a_folder_of_images(tmp_path, capsys):
    source = convnext(num_classes=10)
    torch.save(source.state_dict(), tmp_path / 'convnext.pth')
    arguments = ['--to', 'test_sw_convnext', '--calibrate', str(tmp_path / 'images')]
    (tmp_path / 'images' / 'a').mkdir(parents=True)
    assert main(['convert', str(tmp_path / 'convnext.pth'), '--output', str(tmp_path / 'grown'), *arguments]) == 2
    assert 'cannot be calibrated by the images in' in capsys.readouterr().err
    for number in range(3):
        pixels = torch.rand(40, 50, 3, generator=torch.Generator().manual_seed(number)).mul(255).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / 'images' / 'a' / f'{number}.png')
    converted(tmp_path / 'convnext.pth', tmp_path / 'grown', *arguments)
    grown = timm.create_model(f'local-dir:{tmp_path / "grown"}', pretrained=True)
    assert grown.stages[0].blocks[0].conv_dw.norm_h.running_mean.abs().min() > 0
    assert error(grown, source) < 1e-5

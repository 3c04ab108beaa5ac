"""Loading checkpoints in our layout and the authors', refusing what does not fit, telling what a checkpoint is."""
import argparse
import copy
import io
import os
import pickle
import random
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from authors_networks import AuthorsNetwork
from families import make, unsettle
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_shiftwise.layers import ShiftwiseConv2d
from timm_shiftwise.models import CheckpointError, checkpoint_filter_fn, describe_checkpoint
from timm_shiftwise.models.layouts import released_channel_order

SLAK = AuthorsNetwork('slak')
SW = AuthorsNetwork('sw')
SW_V2 = AuthorsNetwork('sw_v2', size=3)
MODELS = [(SLAK, 'slak_tiny'), (SLAK, 'eq_slak_tiny'), (SW, 'sw_tiny'), (SW_V2, 'sw_v2_tiny')]
SHIFTWISE = [(SW, 'sw_tiny'), (SW_V2, 'sw_v2_tiny')]
IMAGE = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(3))


def named(values):
    return dict(argvalues=values, ids=[value[1] for value in values])


def save(state: object, folder: Path) -> str:
    path = folder / 'their_file.pth'
    torch.save(state, path)
    return str(path)


def create(name: str, network: AuthorsNetwork, **kwargs) -> nn.Module:
    return timm.create_model(name, **dict(network.model_args(), backend='torch', **kwargs)).eval()


@torch.no_grad()
def assert_same_logits(model: nn.Module, network: AuthorsNetwork, state: dict[str, Tensor], atol: float = 1e-8) -> None:
    """Compare in float64: a deep network of random weights magnifies what float32 rounds."""
    wanted = network.logits({key: value.double() for key, value in state.items()}, IMAGE.double())
    torch.testing.assert_close(copy.deepcopy(model).double()(IMAGE.double()), wanted, rtol=0, atol=atol)


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


# --- the authors' checkpoints ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('network, name', **named(MODELS))
@pytest.mark.parametrize('wrap', [
    lambda state: state,
    lambda state: {'model': state, 'epoch': 299, 'optimizer': {'lr': 1e-6}, 'args': argparse.Namespace(lr=4e-3)},
    lambda state: {'model_ema': state, 'model': {key: torch.zeros_like(value) for key, value in state.items()}},
    lambda state: {'state_dict': state, 'arch': 'unknown'},
    lambda state: {'model': {f'module.{key}': value for key, value in state.items()}, 'model_ema': None},
], ids=['bare', 'model', 'model_ema', 'state_dict', 'module.'])
def test_an_authors_checkpoint_loads_by_its_path(network, name, wrap, tmp_path):
    state = network.state(pruned=0.4)
    model = create(name, network, checkpoint_path=save(wrap(state), tmp_path))
    assert_same_logits(model, network, state)


@pytest.mark.parametrize('network, name', **named(MODELS))
def test_an_authors_checkpoint_loads_from_safetensors(network, name, tmp_path):
    state = network.state()
    save_file(state, tmp_path / 'weights.safetensors')
    assert_same_logits(create(name, network, checkpoint_path=str(tmp_path / 'weights.safetensors')), network, state)


@pytest.mark.parametrize('network, name', **named(SHIFTWISE))
@pytest.mark.parametrize('paths', [1, 2, 3])
def test_merged_paths_load_into_any_number_of_paths(network, name, paths, tmp_path):
    state = network.state(pruned=0.4, merged=True)
    model = create(name, replace(network, paths=paths), checkpoint_path=save({'model': state}, tmp_path))
    assert model.stages[0].blocks[0].conv_dw.kernels.shape[0] == paths
    assert_same_logits(model, network, state)


@pytest.mark.parametrize('merged', [False, True])
@pytest.mark.parametrize('network, name', **named(SHIFTWISE))
def test_groups_that_are_zero_are_pruned_and_stay_so_when_trained(network, name, merged):
    state = network.state(pruned=0.4, merged=merged)
    model = create(name, network)
    model.load_state_dict(state)
    masks = {}
    for key, value in state.items():
        if '.large_kernel.LoRA' in key:
            _, i, j, _, *path, _ = key.split('.')
            kept = (value.flatten(1) != 0).any(1)
            conv_dw = model.stages[int(i)].blocks[int(j)].conv_dw
            # a path's own; where the paths were merged, that of all
            for mask in conv_dw.group_mask if merged else conv_dw.group_mask[int(path[-1])][None]:
                assert torch.equal(mask.flatten(), kept)
            masks[conv_dw] = conv_dw.group_mask.clone()
    assert 0.3 < 1 - torch.cat([mask.flatten() for mask in masks.values()]).float().mean() < 0.5
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(IMAGE).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(conv_dw.group_mask, mask) for conv_dw, mask in masks.items())


@pytest.mark.parametrize('network, name', **named(SHIFTWISE))
def test_the_wiring_is_rebuilt_whatever_the_model_had(network, name):
    state, model = network.state(), create(name, network)
    for module in model.modules():
        if isinstance(module, ShiftwiseConv2d):
            module.wiring.zero_()
    model.load_state_dict(state)
    assert_same_logits(model, network, state)


@pytest.mark.parametrize('network, name', **named(MODELS))
def test_a_network_inside_another_module_takes_an_authors_checkpoint(network, name):
    state, model = network.state(pruned=0.4), create(name, network)

    class Wrapper(nn.Module):
        """Holds a network as DistributedDataParallel does."""

        def __init__(self, module):
            super().__init__()
            self.module = module

    Wrapper(model).load_state_dict({f'module.{key}': value for key, value in state.items()})
    assert_same_logits(model, network, state)
    compiled = torch.compile(create(name, network))
    compiled.load_state_dict({f'_orig_mod.{key}': value for key, value in state.items()})
    assert_same_logits(compiled._orig_mod, network, state)


@pytest.mark.filterwarnings('ignore:.*released_channel_order')
@pytest.mark.parametrize('network, name', **named(MODELS))
@pytest.mark.parametrize('indices', [(0, 1, 2, 3), (1, 2)])
@torch.no_grad()
def test_features_only_takes_checkpoints_of_the_whole_network(network, name, indices, tmp_path):
    state = network.state(pruned=0.4)
    path = save({'model': state}, tmp_path)
    wanted = [network.features(state, IMAGE)[i] for i in indices]
    keywords = dict(features_only=True, out_indices=indices)
    whole = create(name, network, checkpoint_path=path)
    native = str(tmp_path / 'native.pth')
    torch.save(whole.state_dict(), native)
    for model in (
            create(name, network, checkpoint_path=path, **keywords),
            create(name, network, checkpoint_path=native, **keywords),
            create(name, network, checkpoint_path=path, feature_cls='getter', **keywords),
            create(name, network, pretrained=True, pretrained_cfg_overlay=dict(file=path), **keywords),
    ):
        for seen, expected in zip(released_channel_order(copy.deepcopy(model)(IMAGE), model), wanted, strict=True):
            torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
        again = create(name, network, **keywords)
        if type(again) is type(model):
            again.load_state_dict(model.state_dict())
            for seen, expected in zip(released_channel_order(again(IMAGE), again), wanted, strict=True):
                torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


def test_features_only_refuses_a_checkpoint_of_another_network(tmp_path):
    path = save(SW.state(), tmp_path)
    with pytest.raises(CheckpointError, match=r'stages\.0\.blocks\.0'):
        create('sw_tiny', replace(SW, dims=(16, 16, 24, 32)), features_only=True, checkpoint_path=path)
    with pytest.raises(CheckpointError, match='left over'):
        create('sw_tiny', SW, features_only=True, checkpoint_path=save({**SW.state(), 'extra.weight': IMAGE}, tmp_path))
    with pytest.raises(CheckpointError) as error:
        path = save(without(SW.state(), 'stages.1.0.gamma'), tmp_path)
        create('sw_tiny', SW, features_only=True, checkpoint_path=path)
    assert 'stages.1.blocks.0.gamma is missing' in str(error.value) and 'create_model' not in str(error.value)


@pytest.mark.filterwarnings('ignore:.*released_channel_order')
@pytest.mark.parametrize('network, name', **named(MODELS))
@pytest.mark.parametrize('changes', [dict(num_classes=5), dict(num_classes=0), dict(in_chans=1)], ids=str)
def test_pretrained_weights_are_adapted_to_classes_and_channels(network, name, changes, tmp_path):
    path = save({'model': network.state()}, tmp_path)
    overlay = dict(file=path, num_classes=network.classes)
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **dict(network.model_args(), **changes))
    assert torch.equal(model.stages[1].blocks[0].mlp.fc1.weight, network.state()[
        'stages.1.0.pwconv1.1.weight' if name == 'sw_v2_tiny' else 'stages.1.0.pwconv1.weight'])
    assert model(IMAGE[:, :model.in_chans]).shape == (2, changes.get('num_classes', network.classes) or 32)


LENGTHS = (51, 49, 47, 13)
FULL_SIZE = [
    (AuthorsNetwork('slak', (3, 3, 9, 3), (124, 249, 499, 998), LENGTHS, classes=1000), 'slak_tiny', {}),
    (AuthorsNetwork('slak', (3, 3, 9, 3), (124, 249, 499, 998), LENGTHS, classes=1000), 'eq_slak_tiny', {}),
    (AuthorsNetwork('sw', (3, 3, 9, 3), (96, 192, 384, 768), LENGTHS, classes=1000), 'sw_tiny', dict(pruned=0.3)),
    (AuthorsNetwork('sw', (3, 3, 9, 3), (96, 192, 384, 768), LENGTHS, classes=1000), 'sw_tiny',
     dict(pruned=0.6, merged=True)),
    (AuthorsNetwork('sw', (3, 3, 27, 3), (128, 256, 512, 1024), LENGTHS, classes=1000), 'sw_base', dict(pruned=0.6)),
    (AuthorsNetwork('sw_v2', (3, 3, 18, 3), (80, 160, 320, 640), LENGTHS, 3, classes=1000), 'sw_v2_tiny',
     dict(pruned=0.3)),
    (AuthorsNetwork('sw_v2', (3, 3, 18, 3), (80, 160, 320, 640), LENGTHS, 3, classes=1000), 'sw_v2_tiny',
     dict(pruned=0.6, merged=True)),
    (AuthorsNetwork('sw_v2', (3, 3, 27, 3), (96, 192, 384, 768), LENGTHS, 3, classes=1000), 'sw_v2_small',
     dict(pruned=0.6)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    'network, name, weights', FULL_SIZE, ids=[f'{name} {weights}' for _, name, weights in FULL_SIZE])
def test_full_size_checkpoints_load_with_nothing_but_a_name_and_a_path(network, name, weights, tmp_path):
    state = network.state(**weights)
    model = timm.create_model(name, checkpoint_path=save({'model': state}, tmp_path)).eval()
    assert_same_logits(model, network, state)
    assert describe_checkpoint(state)['model'] == name.removeprefix('eq_')


# --- our own --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('network, name', **named(MODELS))
def test_a_checkpoint_of_ours_passes_untouched(network, name):
    model = create(name, network)
    state = model.state_dict()
    for key, value in checkpoint_filter_fn(state, model).items():
        assert value is state[key]
    assert checkpoint_filter_fn({'state_dict_ema': state}, model).keys() == state.keys()
    other = create(name, network)
    assert not torch.equal(other.head.fc.weight, model.head.fc.weight)
    result = other.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert_unchanged(other, state)


def test_a_checkpoint_of_ours_is_loaded_with_few_more_operations_than_pytorch_needs():
    class Count(TorchDispatchMode):
        calls: Counter[str]

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls[str(function)] += 1
            return function(*args, **(kwargs or {}))

    def calls_of(load) -> Counter[str]:
        with Count() as count:
            count.calls = Counter()
            load()
        return count.calls

    model = make('sw_v2', depths=(2, 2))
    state = model.state_dict()
    operators = sum(isinstance(module, ShiftwiseConv2d) for module in model.modules())
    plain = calls_of(lambda: nn.Module.load_state_dict(model, state))
    ours = calls_of(lambda: model.load_state_dict(state))
    assert ours['aten.copy_.default'] == plain['aten.copy_.default'], 'no weight is copied twice'
    # beside the checks of a table's values, and looking at each tensor once more
    assert ours.total() - plain.total() <= 20 * operators + 4 * len(state)


def test_a_slak_checkpoint_of_ours_loads_into_eq_slak():
    state = SLAK.state()
    slak = create('slak_tiny', SLAK)
    slak.load_state_dict(state)
    model = create('eq_slak_tiny', SLAK)
    model.load_state_dict(slak.state_dict())
    assert_same_logits(model, SLAK, state)
    masks = [module.group_mask for module in model.modules() if isinstance(module, ShiftwiseConv2d)]
    assert masks and all(mask.all() for mask in masks)


@pytest.mark.parametrize('network, name', **named(MODELS))
def test_a_reparameterized_network_reloads(network, name):
    state, model = network.state(pruned=0.4), create(name, network)
    model.load_state_dict(state)
    merged = timm.utils.reparameterize_model(model)
    again = create(name, network, reparameterized=True)
    again.load_state_dict(merged.state_dict())
    assert_same_logits(again, network, state, atol=1e-4)
    found = describe_checkpoint(merged.state_dict())
    assert found['model_args']['reparameterized'] is True
    assert found['family'] == name.removesuffix('_tiny')
    timm.create_model(found['model'], **found['model_args']).load_state_dict(merged.state_dict())
    with pytest.raises(CheckpointError, match='reparameterized=True'):
        create(name, network).load_state_dict(merged.state_dict())
    with pytest.raises(CheckpointError) as error:
        again.load_state_dict(state)
    assert 'create_model(' in str(error.value) and 'reparameterized' not in str(error.value).splitlines()[-1]


def test_loading_can_leave_out_keys_if_asked_to():
    model, state = create('sw_tiny', SW), create('sw_tiny', SW).state_dict()
    del state['stages.0.blocks.0.gamma']
    state['extra'] = torch.zeros(1)
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ['stages.0.blocks.0.gamma'] and result.unexpected_keys == ['extra']


def test_a_checkpoint_without_counters_of_batches_loads():
    model, state = create('sw_v2_tiny', SW_V2), create('sw_v2_tiny', SW_V2).state_dict()
    fewer = type(state)((key, value) for key, value in state.items() if not key.endswith('num_batches_tracked'))
    fewer._metadata = state._metadata
    assert len(fewer) < len(state)
    model.load_state_dict(fewer)


def test_weights_can_be_assigned_to_a_model_without_memory():
    state = SW.state(pruned=0.4)
    model = create('sw_tiny', SW, device='meta')
    model.load_state_dict(state, assign=True)
    assert {buffer.device.type for buffer in model.buffers()} == {'cpu'}
    assert_same_logits(model, SW, state)


def averaged(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The average of checkpoints as timm's avg_checkpoints.py writes it: of everything, in float32."""
    return {key: torch.stack([state[key].double() for state in states]).mean(0).float() for key in states[0]}


@pytest.mark.parametrize('family', ['sw', 'sw_v2', 'eq_slak'])
def test_an_average_of_checkpoints_keeps_what_any_of_them_keeps(family, tmp_path):
    models = [make(family) for _ in range(3)]
    for seed, model in enumerate(models):
        unsettle(model, seed)
        for layer in model.sparsity.layers():
            layer.kernels.data *= layer.group_mask[..., None, None]
    seen = make(family)
    timm.models.load_checkpoint(seen, save(averaged([model.state_dict() for model in models]), tmp_path))
    parts = [[layer for layer in model.modules() if isinstance(layer, ShiftwiseConv2d)] for model in (seen, *models)]
    for layer, *others in zip(*parts, strict=True):
        assert torch.equal(layer.group_mask, torch.stack([other.group_mask for other in others]).any(0))
        torch.testing.assert_close(layer.kernels, torch.stack([other.kernels for other in others]).mean(0))
        for name, table in others[0].named_buffers(recurse=False):
            assert name == 'group_mask' or torch.equal(getattr(layer, name), table), name


@pytest.mark.parametrize('wrap', [lambda model: model, nn.Sequential, nn.DataParallel])
@pytest.mark.parametrize('assign', [False, True])
def test_a_mask_that_is_one_for_all_paths_becomes_each_ones(wrap, assign):
    model = make('sw')
    outer = wrap(model)
    state = outer.state_dict()
    masks = {}
    for key, value in state.items():
        if key.endswith('group_mask'):
            assert value.ndim == 3 and not torch.equal(*value)
            masks[key] = state[key] = value[0].clone()
    outer.load_state_dict(state, assign=assign)
    for layer, mask in zip(model.sparsity.layers(), masks.values(), strict=True):
        assert torch.equal(layer.group_mask, torch.stack([mask] * 2))
        layer.group_mask[0] = False
        assert layer.group_mask[1].any(), 'the paths share memory'


@pytest.mark.parametrize('table', ['wiring', 'built_for'])
def test_an_average_over_different_tables_is_refused(table):
    states = [make('sw').state_dict(), make('sw').state_dict()]
    key = f'stages.0.blocks.0.conv_dw.{table}'
    states[1][key] = states[1][key].flip(-1)
    model = make('sw')
    with pytest.raises(CheckpointError, match=table):
        model.load_state_dict(averaged(states))


# --- what does not fit ----------------------------------------------------------------------------------------------

def without(state, *names):
    return {key: value for key, value in state.items() if not any(name in key for name in names)}


def refused(name: str, network: AuthorsNetwork, state: dict[str, Tensor], strict: bool = True) -> str:
    """The message with which a model refuses a checkpoint, after which it is as it was."""
    model = create(name, network)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as error:
        model.load_state_dict(state, strict=strict)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match='does not fit'):
        checkpoint_filter_fn(state, model)
    wrapper = nn.Sequential(model)
    with pytest.raises(RuntimeError):
        wrapper.load_state_dict({f'0.{key}': value for key, value in state.items()})
    assert_unchanged(model, before)
    message = str(error.value)
    assert len(message.splitlines()) <= 8
    return message


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('network, name', **named(MODELS))
def test_missing_keys_are_refused_and_the_first_are_listed(network, name, strict):
    state = without(network.state(), 'stages.2.0.pwconv1', 'stages.3.0.gamma')
    message = refused(name, network, state, strict)
    assert 'stages.2.blocks.0.mlp.fc1.weight is missing' in message
    assert 'stages.2.blocks.0.mlp.fc1.bias is missing' in message
    assert 'stages.3.blocks.0.gamma is missing' in message
    assert 'create_model' not in message


@pytest.mark.parametrize('network, name', **named(MODELS))
def test_left_over_keys_are_refused_and_the_first_are_listed(network, name):
    message = refused(name, network, {**network.state(), **{f'aux.{i}.weight': IMAGE for i in range(9)}})
    assert 'aux.0.weight is left over' in message and 'and 4 more' in message


@pytest.mark.parametrize('network, name', **named(SHIFTWISE))
def test_a_missing_path_and_a_missing_norm_are_refused(network, name):
    assert 'conv_dw.kernels' in refused(name, network, without(network.state(), 'stages.0.0.large_kernel.LoRAs.0'))
    message = refused(name, network, without(network.state(), 'stages.1.0.large_kernel.bn_lora1'))
    assert 'stages.1.blocks.0.conv_dw.norm_h.weight is missing' in message


@pytest.mark.parametrize('name', ['slak_tiny', 'eq_slak_tiny'])
def test_a_missing_large_kernel_is_refused(name):
    message = refused(name, SLAK, without(SLAK.state(), 'stages.1.1.large_kernel.LoRA1.conv'))
    assert 'stages.1.blocks.1.conv_dw.conv_v.weight is missing' in message


@pytest.mark.parametrize('network, name', **named(MODELS))
def test_a_missing_classifier_is_refused_by_a_load_but_not_by_the_filter(network, name):
    state, model = without(network.state(), 'head.'), create(name, network)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r'head\.fc\.weight is missing'):
        model.load_state_dict(state)
    assert_unchanged(model, before)
    assert model.load_state_dict(state, strict=False).missing_keys == ['head.fc.weight', 'head.fc.bias']
    assert 'head.fc.weight' not in checkpoint_filter_fn(state, model)


CHANGES = [
    dict(depths=(1, 1, 2, 1)),
    dict(dims=(12, 20, 24, 32)),
    dict(lengths=(21, 13, 11, 7)),
    dict(size=7),
    dict(classes=7),
    dict(in_chans=1),
]


@pytest.mark.parametrize('network, name', **named(MODELS))
@pytest.mark.parametrize('changes', CHANGES, ids=str)
def test_an_error_names_the_call_whose_network_fits(network, name, changes):
    """The call is followed, and the checkpoint then loads."""
    theirs = replace(network, **changes)
    state = theirs.state()
    model = create(name, network)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r'create_model\(') as error:
        model.load_state_dict(state)
    assert_unchanged(model, before)
    call = str(error.value).splitlines()[-1].partition('timm.create_model(')[2]
    arguments, _, rest = call.partition(') and ')
    arguments = arguments.removesuffix(').')
    if rest:
        # small kernels tell how many groups they make, not the focus length itself
        groups = tuple(theirs.groups(i) for i in range(len(theirs.depths)))
        assert str(groups) in rest
        arguments += f', focus_lengths={theirs.lengths}'
    fitting = eval(f'create({arguments})', {'create': timm.create_model}).eval()
    fitting.load_state_dict(state)
    assert_same_in = torch.randn(2, theirs.in_chans, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            fitting(assert_same_in), theirs.logits(state, assert_same_in), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('network, name', **named(SHIFTWISE))
@pytest.mark.parametrize('changes, argument', [
    (dict(ghost_ratio=0.5), 'ghost_ratio=0.5'),
    (dict(ghost_ratio=0.), 'ghost_ratio=0.0'),
    (dict(paths=3), 'num_paths=3'),
], ids=str)
def test_an_error_names_the_operators_arguments(network, name, changes, argument):
    assert argument in refused(name, network, replace(network, **changes).state())


@pytest.mark.parametrize('theirs, name, network, fits', [
    (SLAK, 'sw_tiny', SW, 'slak_tiny'),
    (SW, 'slak_tiny', SLAK, 'sw_tiny'),
    (SW, 'eq_slak_tiny', SLAK, 'sw_tiny'),
    (SW, 'sw_v2_tiny', SW_V2, 'sw_tiny'),
    (SW_V2, 'sw_tiny', SW, 'sw_v2_tiny'),
    (SLAK, 'sw_v2_tiny', SW_V2, 'slak_tiny'),
])
def test_an_error_names_the_network_that_fits(theirs, name, network, fits):
    assert f"create_model('{fits}'" in refused(name, network, theirs.state())


def test_a_checkpoint_of_ours_for_another_focus_length_is_refused_though_its_shapes_fit():
    state = create('sw_tiny', replace(SW, lengths=(14, 13, 11, 7))).state_dict()
    model = create('sw_tiny', SW)
    before = copy.deepcopy(model.state_dict())
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r'focus_lengths=\(14, 13, 11, 7\)'):
            model.load_state_dict(state, strict=strict)
    assert_unchanged(model, before)


@pytest.mark.parametrize('value', [3, -1, 2 ** 30])
def test_a_table_that_points_outside_is_refused(value):
    """Kernels read memory by it; a file must not choose what they read."""
    model, state = create('sw_tiny', SW), create('sw_tiny', SW).state_dict()
    state['stages.0.blocks.0.conv_dw.wiring'].view(-1)[0] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r'stages\.0\.blocks\.0\.conv_dw\.wiring'):
        model.load_state_dict(state)
    assert_unchanged(model, before)


def test_what_is_no_checkpoint_is_refused():
    model = create('sw_tiny', SW)
    with pytest.raises(CheckpointError, match='no state dict'):
        model.load_state_dict({'epoch': 3, 'lr': 0.1})
    with pytest.raises(CheckpointError, match='is missing'):
        model.load_state_dict({})
    with pytest.raises(CheckpointError, match='is left over'):
        checkpoint_filter_fn({**model.state_dict(), 'layer1.0.conv1.weight': IMAGE}, model)


def test_a_tensor_larger_than_its_memory_is_refused(tmp_path):
    """Such a file is small, and what is computed from it is not."""
    state = SW.state()
    state['stages.0.0.large_kernel.LoRAs.0.weight'] = torch.zeros(1, 1, 5, 5).expand(2 ** 40, 1, 5, 5)
    path = Path(save(state, tmp_path))
    assert path.stat().st_size < 2 ** 20
    with pytest.raises(CheckpointError, match=r'stages\.0\.0\.large_kernel\.LoRAs\.0\.weight'):
        create('sw_tiny', SW, checkpoint_path=str(path))
    with pytest.raises(CheckpointError):
        describe_checkpoint({'head.weight': torch.zeros(3, 3).to_sparse()})


@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('network, name', **named(MODELS))
def test_a_damaged_checkpoint_is_refused_whatever_is_wrong_with_it(network, name, seed):
    """Keys dropped, renamed and doubled, and shapes changed, in the authors' layout and in ours."""
    draw = random.Random(seed)
    model = create(name, network)
    state = network.state() if seed % 2 else dict(model.state_dict())
    for key in draw.sample([key for key in state if not key.endswith('num_batches_tracked')], 3):
        value = state.pop(key)
        damage = draw.choice(['drop', 'rename', 'flatten', 'empty', 'scalar', 'more axes', 'deeper'])
        if damage == 'rename':
            state[key.replace('e', 'E')] = value
        elif damage == 'deeper':
            state[key.replace('.0.', '.1234567890123.', 1)] = value
        elif damage != 'drop':
            state[key] = {
                'flatten': value.flatten() if value.ndim != 1 else value[:1],
                'empty': value[:0] if value.ndim else value[None][:0],
                'scalar': value.new_zeros(()) if value.ndim else value[None],
                'more axes': value[None, None],
            }[damage]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError):
        model.load_state_dict(state)
    assert_unchanged(model, before)
    with suppress(CheckpointError):
        assert describe_checkpoint(state)['model']


@pytest.mark.parametrize('share', [0.3, 0.9, 0.999])
def test_a_file_cut_short_is_refused(share, tmp_path):
    path = Path(save({'model': SW.state()}, tmp_path))
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises((RuntimeError, pickle.UnpicklingError, OSError, EOFError)):
        create('sw_tiny', SW, checkpoint_path=str(path))
    whole = tmp_path / 'weights.safetensors'
    save_file(SW.state(), whole)
    whole.write_bytes(whole.read_bytes()[:int(share * whole.stat().st_size)])
    with pytest.raises(Exception, match=r'(?i)safetensor|header|incomplete'):
        create('sw_tiny', SW, checkpoint_path=str(whole))


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(zipped, tmp_path):
    trace = tmp_path / 'trace'
    torch.save(
        {'model': SW.state(), 'args': Hostile(trace)}, tmp_path / 'their_file.pth',
        _use_new_zipfile_serialization=zipped)
    with pytest.raises((RuntimeError, pickle.UnpicklingError), match=r'(?i)weights.only'):
        create('sw_tiny', SW, checkpoint_path=str(tmp_path / 'their_file.pth'))
    assert not trace.exists()


# --- telling what a checkpoint is -----------------------------------------------------------------------------------

@pytest.mark.parametrize('name', [
    'sw_tiny', 'sw_v2_tiny', 'p_sw_tiny', 'p2_sw_tiny', 'slak_tiny', 'eq_slak_tiny', 'test_sw'])
def test_a_registered_network_is_recognised(name):
    found = describe_checkpoint(timm.create_model(name).state_dict())
    assert found['model'] == name
    assert found['model_args'] == {}
    assert found['layout'] == 'timm-shiftwise'
    assert found['assumed'] == found['unknown'] == ()


@pytest.mark.parametrize('name', [
    name for name in timm.list_models(module='shiftwise') + timm.list_models(module='shiftwise_v2')
    if name != 'p2_sw_tiny'  # what is in its tables tells it from p_sw_tiny
])
def test_a_registered_network_is_recognised_by_shapes_alone(name):
    found = describe_checkpoint(timm.create_model(name, device='meta').state_dict())
    assert found['model'] == name and found['model_args'] == {} and found['unknown'] == ()


@pytest.mark.parametrize('name, changes', [
    ('sw_tiny', dict(ghost_ratio=0.4, num_paths=1, num_shuffles=2, num_classes=3, in_chans=1)),
    ('sw_v2_tiny', dict(ghost_ratio=0.31, focus_lengths=(12, 9, 8, 5), kernel_size=4)),
    ('p_sw_tiny', dict(padding='same', ls_init_value=None)),
    ('p2_sw_tiny', dict(kernel_size=3, num_classes=0)),
    ('eq_slak_tiny', dict(num_paths=2, padding='same')),
    ('slak_tiny', dict(focus_lengths=(20, 9, 8, 5), kernel_size=4)),
], ids=str)
@pytest.mark.parametrize('size', [dict(depths=(1, 2, 1, 1), dims=(12, 16, 24, 32)), dict(depths=(1, 1), dims=(40, 50))])
def test_the_description_of_a_network_builds_it_again(name, changes, size):
    stages = len(size['depths'])
    lengths = changes.get('focus_lengths', (21, 13, 12, 7))[:stages]
    model = timm.create_model(name, **dict(changes, **size, focus_lengths=lengths))
    found = describe_checkpoint(model.state_dict())
    assert found['unknown'] == ()
    timm.create_model(found['model'], **found['model_args']).load_state_dict(model.state_dict())
    for argument, value in found['model_args'].items():
        # several ratios leave the same number of channels
        assert argument == 'ghost_ratio' or dict(changes, **size, focus_lengths=lengths).get(argument, value) == value


@pytest.mark.parametrize('merged', [False, True])
@pytest.mark.parametrize('kind, size, name', [
    ('slak', 5, 'slak_tiny'), ('sw', 5, 'sw_tiny'), ('sw_v2', 3, 'sw_v2_tiny')])
def test_an_authors_checkpoint_is_recognised(kind, size, name, merged):
    dims = {'slak': (124, 249, 499, 998), 'sw': (96, 192, 384, 768), 'sw_v2': (80, 160, 320, 640)}[kind]
    depths = (3, 3, 18, 3) if kind == 'sw_v2' else (3, 3, 9, 3)
    network = AuthorsNetwork(kind, depths, dims, (51, 49, 47, 13), size, classes=1000)
    found = describe_checkpoint({'model': network.state(merged=merged)})
    assert found['layout'] == 'authors'
    assert found['family'] == kind and found['model'] == name
    assert found['model_args'] == ({'num_paths': 1} if merged and kind != 'slak' else {})
    assert found['assumed'] == (() if kind == 'slak' else ('focus_lengths', 'num_shuffles'))
    assert found['unknown'] == ()
    assert found['groups'] == ((17, 17, 16, 5) if size == 3 else (11, 10, 10, 3))


def test_what_is_unknown_is_said():
    found = describe_checkpoint(SW.state())
    assert found['unknown'] == ('focus_lengths',) and found['groups'] == (3, 3, 3, 2)
    assert found['model_args'] == dict(depths=(1, 2, 1, 1), dims=(12, 16, 24, 32), num_classes=10)


def test_a_checkpoint_of_something_else_is_not_recognised():
    with pytest.raises(CheckpointError, match=r'none of these networks.*weight'):
        describe_checkpoint(timm.create_model('test_resnet').state_dict())
    with pytest.raises(CheckpointError, match='none of these networks'):
        describe_checkpoint({})
    with pytest.raises(CheckpointError, match=r'mlp\.fc1\.weight is missing'):
        describe_checkpoint(without(SW.state(), 'stages.1.0.pwconv1'))
    buffer = io.BytesIO()
    torch.save(SW.state(), buffer)
    buffer.seek(0)
    assert describe_checkpoint(torch.load(buffer, weights_only=True))['family'] == 'sw'

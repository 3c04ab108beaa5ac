"""What version 0.1 saved (``tests/legacy``) loads wherever it loaded and gives the same outputs, or is refused."""
import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from authors_networks import AuthorsNetwork
from hub_server import connected
from pairwise import pairwise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from timm_shiftwise import released_channel_order
from timm_shiftwise.hub.convert import convert
from timm_shiftwise.layers import MergedConv2d, ShiftwiseConv2d
from timm_shiftwise.models import CheckpointError, checkpoint_filter_fn, describe_checkpoint
from timm_shiftwise.models.layouts import OWN, layout_of

FOLDER = Path(__file__).parent / 'legacy'
FILES = sorted(path.stem for path in FOLDER.glob('*.safetensors') if 'digits' not in path.stem)
OF_ONE_ORDER = ('p_sw', 'eq_slak', 'slak')
"""Networks without ghosts."""

ignores_the_warning = pytest.mark.filterwarnings('ignore:.*released_channel_order')

EXACT, ROUNDED = dict(rtol=0, atol=1e-10), dict(rtol=1e-5, atol=1e-5)


class Legacy:
    """A file of version 0.1: its network, its weights, and what version 0.1 made of an image."""

    def __init__(self, stem: str) -> None:
        with safe_open(FOLDER / f'{stem}.safetensors', 'pt') as file:
            self.name = file.metadata()['name']
            self.args = json.loads(file.metadata()['args'])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.state = {key.removeprefix('state/'): value for key, value in tensors.items() if key.startswith('state/')}
        self.image, self.logits, self.pooled = tensors['image'], tensors['logits'], tensors['pooled']
        self.stages = [tensors[f'stage{i}'] for i in range(2)]

    def create(self, **kwargs) -> nn.Module:
        return timm.create_model(self.name, **{**self.args, 'backend': 'torch', **kwargs}).eval()

    @torch.no_grad()
    def assert_same(self, model: nn.Module, **tolerance) -> None:
        logits = model(self.image.to(next(model.parameters()).dtype))
        torch.testing.assert_close(logits.double(), self.logits, **(tolerance or ROUNDED))

    @torch.no_grad()
    def assert_same_stages(self, model: nn.Module, stages: list[Tensor], **tolerance) -> None:
        for seen, wanted in zip(released_channel_order(stages, model), self.stages, strict=True):
            torch.testing.assert_close(seen.double(), wanted, **(tolerance or ROUNDED))


def loaded(stem: str = 'sw', **kwargs) -> nn.Module:
    legacy = Legacy(stem)
    model = legacy.create(**kwargs)
    model.load_state_dict(legacy.state)
    return model


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


# --- outputs --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stem', FILES)
@torch.no_grad()
def test_every_output_is_that_of_version_0_1(stem):
    legacy = Legacy(stem)
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, ROUNDED)):
        model = legacy.create(dtype=dtype)
        result = model.load_state_dict(legacy.state)
        assert not result.missing_keys and not result.unexpected_keys
        legacy.assert_same(model, **tolerance)
        last, stages = model.forward_intermediates(legacy.image.to(dtype))
        legacy.assert_same_stages(model, stages, **tolerance)
        pooled = released_channel_order(model.forward_head(last, pre_logits=True), model)
        torch.testing.assert_close(pooled.double(), legacy.pooled, **tolerance)


def inside(legacy: Legacy, folder: Path, wrap: Callable[[nn.Module], nn.Module], prefix: str) -> nn.Module:
    model = legacy.create()
    wrap(model).load_state_dict({f'{prefix}{key}': value for key, value in legacy.state.items()})
    return model


def by_path(legacy: Legacy, folder: Path, **extra) -> nn.Module:
    torch.save({'state_dict': legacy.state, **extra}, folder / 'weights.pth')
    return legacy.create(checkpoint_path=str(folder / 'weights.pth'))


def pretrained(legacy: Legacy, folder: Path) -> nn.Module:
    save_file(legacy.state, folder / 'weights.safetensors')
    overlay = dict(file=str(folder / 'weights.safetensors'), num_classes=5)
    return legacy.create(pretrained=True, pretrained_cfg_overlay=overlay)


def hub_files(legacy: Legacy) -> dict[str, bytes]:
    config = dict(architecture=legacy.name, num_classes=5, model_args=legacy.args, pretrained_cfg=dict(num_classes=5))
    return {'config.json': json.dumps(config).encode()}


def local_folder(legacy: Legacy, folder: Path) -> nn.Module:
    save_file(legacy.state, folder / 'model.safetensors')
    (folder / 'config.json').write_bytes(hub_files(legacy)['config.json'])
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def not_strictly(legacy: Legacy, folder: Path) -> nn.Module:
    model = legacy.create()
    state = {key: value for key, value in legacy.state.items() if not key.startswith('head.fc.')}
    assert model.load_state_dict(state, strict=False).missing_keys == ['head.fc.weight', 'head.fc.bias']
    wrapper = nn.Sequential(model)
    result = wrapper.load_state_dict({f'0.{key}': value for key, value in state.items()}, strict=False)
    assert result.missing_keys == ['0.head.fc.weight', '0.head.fc.bias'] and not result.unexpected_keys
    model.head.fc.load_state_dict({
        'weight': checkpoint_filter_fn(legacy.state, model)['head.fc.weight'], 'bias': legacy.state['head.fc.bias']})
    return model


def through_memory_that_is_not_there(legacy: Legacy, folder: Path) -> nn.Module:
    model = legacy.create(device='meta')
    model.load_state_dict(legacy.state, assign=True)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {'cpu'}
    return model


WAYS = {
    'path': by_path,
    'averaged weights': lambda legacy, folder: by_path(legacy, folder, state_dict_ema=legacy.state),
    'pretrained': pretrained,
    'folder': local_folder,
    'Sequential': lambda legacy, folder: inside(legacy, folder, nn.Sequential, '0.'),
    'DataParallel': lambda legacy, folder: inside(legacy, folder, nn.DataParallel, 'module.'),
    'compile': lambda legacy, folder: inside(legacy, folder, torch.compile, '_orig_mod.'),
    'not strict': not_strictly,
    'meta': through_memory_that_is_not_there,
}


@ignores_the_warning
@pytest.mark.parametrize('stem, way', [
    *(('sw', way) for way in WAYS),
    *zip(['sw_v2', 'sw_v2_merged', 'sw_merged', 'sw_same_merged', 'slak_merged', 'eq_slak', 'sw_v2_same_merged'],
         ['folder', 'Sequential', 'not strict', 'path', 'DataParallel', 'pretrained', 'meta'], strict=True),
])
def test_every_way_to_load_translates(stem, way, tmp_path):
    legacy = Legacy(stem)
    legacy.assert_same(WAYS[way](legacy, tmp_path))


def test_weights_on_the_hub_are_translated(tmp_path, monkeypatch):
    legacy = Legacy('sw')
    save_file(legacy.state, tmp_path / 'model.safetensors')
    with connected(tmp_path, monkeypatch) as hub:
        hub.add('me/old', {**hub_files(legacy), 'model.safetensors': (tmp_path / 'model.safetensors').read_bytes()})
        legacy.assert_same(timm.create_model('hf-hub:me/old', pretrained=True).eval())


def test_the_weights_that_version_0_1_came_with_are_the_packaged_ones():
    ours, theirs = timm.create_model('test_sw.digits', pretrained=True), timm.create_model('test_sw', num_classes=10)
    theirs.load_state_dict(load_file(FOLDER / 'test_sw.digits.safetensors'))
    for key, value in theirs.state_dict().items():
        if not key.startswith('sparsity.'):  # pretrained weights keep their masks
            assert torch.equal(ours.state_dict()[key], value), key


# --- features -------------------------------------------------------------------------------------------------------

def as_list_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that timm's wrapper for features gave the parts of version 0.1's networks."""
    return {
        re.sub(r'^(stem|stages)\.', r'\1_', key): value for key, value in state.items()
        if key.startswith(('stem.', 'stages.'))}


def as_getter_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f'model.{key}': value for key, value in state.items() if not key.startswith('head.fc.')}


@pairwise({
    'stem': ['sw', 'sw_v2', 'sw_v2_merged', 'slak'],
    'kind, names': [(None, dict), (None, as_list_names), ('getter', dict), ('getter', as_getter_names)],
    'is_inside': [False, True],
})
@torch.no_grad()
def test_features_only_takes_files_of_networks_and_of_wrappers(stem, kind, names, is_inside):
    legacy, state = Legacy(stem), names(Legacy(stem).state)
    model = legacy.create(features_only=True, dtype=torch.float64, **({'feature_cls': kind} if kind else {}))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        if is_inside:
            nn.ModuleDict({'body': model}).load_state_dict({f'body.{key}': value for key, value in state.items()})
        else:
            model.load_state_dict(state)
    assert sum('released_channel_order' in str(warning.message) for warning in told) == (stem != 'slak')
    legacy.assert_same_stages(model, model(legacy.image.double()), **EXACT)


@ignores_the_warning
def test_fewer_features_than_stages_are_loaded():
    legacy = Legacy('sw')
    model = legacy.create(features_only=True, out_indices=(0,))
    model.load_state_dict(legacy.state)
    with torch.no_grad():
        seen = released_channel_order(model(legacy.image), model)
    torch.testing.assert_close(seen[0].double(), legacy.stages[0], **ROUNDED)


@pytest.mark.parametrize('stem', ['sw', 'sw_merged', 'slak'])
def test_features_have_the_released_order_if_asked_for(stem):
    legacy, model = Legacy(stem), loaded(stem)
    maps = tuple(model.forward_intermediates(legacy.image)[1])
    assert isinstance(released_channel_order(maps, model), tuple)
    legacy.assert_same_stages(nn.Sequential(model), list(maps))
    pooled = released_channel_order(maps[1][:, :, 0, 0], model)
    assert torch.equal(pooled, released_channel_order(maps[1], model)[:, :, 0, 0])
    for wrong in (maps[0][0], maps[0][:, :7], torch.zeros(3), 'maps'):
        with pytest.raises(ValueError, match=r'D among \[8, 12\]') as error:
            released_channel_order([maps[0], wrong], model)
        assert str(tuple(wrong.shape) if isinstance(wrong, Tensor) else 'str') in str(error.value)


# --- what warns -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stem, wrap, prefix, is_told', [
    ('sw', nn.Sequential, '0.', True),
    ('sw', nn.DataParallel, 'module.', False),
    ('sw', lambda model: nn.Sequential(nn.DataParallel(model)), '0.module.', True),
    *((stem, nn.Sequential, '0.', False) for stem in OF_ONE_ORDER),
], ids=lambda value: getattr(value, '__name__', str(value)))
def test_what_follows_a_network_in_another_module_is_warned_once(stem, wrap, prefix, is_told):
    legacy = Legacy(stem)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        inside(legacy, FOLDER, wrap, prefix)
    messages = [str(warning.message) for warning in told if issubclass(warning.category, UserWarning)]
    assert len(messages) == is_told
    assert all('timm_shiftwise.released_channel_order(features, model)' in message for message in messages)


def test_a_network_alone_warns_of_embeddings_only():
    legacy = Legacy('sw')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        legacy.create().load_state_dict(legacy.state)
        checkpoint_filter_fn(loaded().state_dict(), legacy.create(num_classes=0), features_only=True)
    with pytest.warns(UserWarning, match='released_channel_order'):
        checkpoint_filter_fn(legacy.state, legacy.create(num_classes=0))
    with pytest.warns(UserWarning, match='released_channel_order'):
        checkpoint_filter_fn(legacy.state, legacy.create(), features_only=True)


def test_a_part_that_does_not_tell_its_order_warns():
    head = {key: value for key, value in Legacy('sw').state.items() if key.startswith('head.')}
    with pytest.warns(UserWarning, match='does not tell the order of its channels'):
        Legacy('sw').create().load_state_dict(head, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Legacy('slak').create().load_state_dict(head, strict=False)
        Legacy('sw').create().load_state_dict({'head.fc.bias': head['head.fc.bias']}, strict=False)


# --- what is refused ------------------------------------------------------------------------------------------------

def drop(key: str) -> Callable[[dict], None]:
    return lambda state: state.pop(key)


def change(key: str, new: Callable[[Tensor], Tensor]) -> Callable[[dict], None]:
    return lambda state: state.update({key: new(state[key])})


DW = 'stages.0.blocks.1.conv_dw'
NOT_ONCE = 'do not name each of 7 channels to work on and 1 ghosts once'


@pytest.mark.parametrize('stem, spoil, told', [
    ('sw', change(f'{DW}.kept', lambda kept: kept - 1), NOT_ONCE),
    ('sw', change(f'{DW}.ghost', lambda ghost: ghost + 1), NOT_ONCE),
    ('sw', change(f'{DW}.kept', lambda kept: kept[:-1]), NOT_ONCE),
    ('sw', change(f'{DW}.kept', lambda kept: kept * 1j), NOT_ONCE),
    ('sw', change(f'{DW}.kept', lambda kept: kept.flip(0)), f'{DW}.kept names other channels than'),
    ('sw', drop(f'{DW}.ghost'), NOT_ONCE),
    ('sw', change(f'{DW}.horizontal', lambda table: table + 2), f'{DW}.wiring must hold integers of 0 to 2'),
    ('sw', change(f'{DW}.identity', lambda table: table[:, :-1]), f'{DW}.horizontal does not go together with'),
    ('sw', change(f'{DW}.geometry', lambda table: table - 1), f'{DW}.built_for: the checkpoint was made for'),
    ('sw', drop(f'{DW}.weight'), f'{DW}.kernels is missing'),
    ('sw', change(f'{DW}.mask', lambda mask: mask[:, :-1]), f'{DW}.group_mask has the shape'),
    ('sw_merged', change(f'{DW}.kept', lambda kept: kept - 1), NOT_ONCE),
    ('sw_merged', change(f'{DW}.weight', lambda weight: weight[:-1]), f'{DW}.kernels has the shape'),
    ('sw_merged', change(f'{DW}.vertical', lambda table: table - 1), f'{DW}.wiring must hold integers of 0 to 2'),
    ('sw_merged', change(f'{DW}.geometry', lambda table: table - 1), f'{DW}.built_for: the checkpoint was made for'),
    ('sw_merged', drop(f'{DW}.scale_i'), f'{DW}.scale_h does not go together with'),
    ('sw_v2_merged', drop('stages.0.blocks.1.norm.running_var'), r'stages.0.blocks.1.norm.running_var is missing'),
    ('slak_merged', change(f'{DW}.tall', lambda tall: tall[:, 1:]), f'{DW}.tall.weight has the shape'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_a_damaged_file_is_refused_and_changes_nothing(stem, spoil, told):
    legacy = Legacy(stem)
    spoil(legacy.state)
    model = legacy.create()
    before = copy.deepcopy(model.state_dict())
    loads = [model.load_state_dict, lambda state: checkpoint_filter_fn(state, model)]
    if 'kernels is missing' not in told:
        loads.append(lambda state: model.load_state_dict(state, strict=False))
        loads.append(lambda state: nn.Sequential(model).load_state_dict({f'0.{key}': state[key] for key in state}))
    for load in loads:
        with pytest.raises(CheckpointError, match=re.escape(told)):
            load(legacy.state)
    assert_unchanged(model, before)


def test_the_order_is_that_of_the_files_own_tables():
    """Somebody may have drawn other ghosts: the logits stay theirs."""
    written = re.compile(r'stem\.|stages\.0\.blocks\.\d\.(gamma|mlp\.fc2)|stages\.1\.downsample\.0')
    legacy, order = Legacy('sw'), torch.arange(8).roll(3)
    inverse = order.argsort()
    renumbered = dict(legacy.state)
    for key, value in legacy.state.items():
        if written.match(key):
            renumbered[key] = value[inverse]
        elif key == 'stages.1.downsample.1.weight':
            renumbered[key] = value[:, inverse]
        elif re.match(r'stages\.0\..*\.(kept|ghost)$', key):
            renumbered[key] = order[value]
    model = legacy.create()
    model.load_state_dict(renumbered)
    legacy.assert_same(model)


@pytest.mark.parametrize('stem, other, fits', [
    ('sw_merged', 'sw', 'reparameterized=True'),
    ('slak_merged', 'slak', 'reparameterized=True'),
    ('sw_same_merged', 'sw_merged', "padding='same'"),
    ('sw', 'sw_merged', "create_model('sw_tiny', depths=(2, 1), dims=(8, 12), focus_lengths=(15, 7), num_classes=5)"),
    ('sw_v2', 'sw', "create_model('sw_v2_tiny'"),
])
def test_an_error_names_the_call_whose_network_fits(stem, other, fits):
    with pytest.raises(CheckpointError) as error:
        Legacy(other).create().load_state_dict(Legacy(stem).state)
    assert fits in str(error.value).splitlines()[-1]


def test_weights_added_to_a_layer_that_is_permuted_are_refused():
    """What fine-tuning by adapters saves does not tell its order by its name."""
    legacy = Legacy('sw')
    legacy.state['stages.0.blocks.0.mlp.fc2.lora_B.default.weight'] = torch.zeros(8, 2)
    with pytest.raises(CheckpointError, match=r'lora_B\.default\.weight may be in another order of channels'):
        legacy.create().load_state_dict(legacy.state, strict=False)


def test_no_tensor_of_an_operator_has_a_name_of_version_0_1():
    """Libraries that copy tensors by name then miss some, and do not mix up channels."""
    for stem in FILES:
        legacy = Legacy(stem)
        ours = {key for key in legacy.create().state_dict() if '.conv_dw.' in key}
        both = {key.partition('.conv_dw.')[2].partition('.')[0] for key in ours & legacy.state.keys()}
        assert both <= {'norm_h', 'norm_v', 'norm_i', *(['conv_h', 'conv_v', 'conv_i'] if stem == 'slak' else [])}


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('stem, kind', [('sw', ShiftwiseConv2d), ('sw_merged', MergedConv2d)])
def test_an_operator_alone_refuses_version_0_1(stem, kind, strict):
    legacy = Legacy(stem)
    operator = legacy.create().stages[0].blocks[0].conv_dw
    assert isinstance(operator, kind)
    name = 'stages.0.blocks.0.conv_dw.'
    state = {key.removeprefix(name): value for key, value in legacy.state.items() if key.startswith(name)}
    with pytest.raises(RuntimeError, match=r'version 0\.1'):
        operator.load_state_dict(state, strict=strict)


# --- runs that go on ------------------------------------------------------------------------------------------------

def saved_run(stem: str, folder: Path, make_optimizer: Callable) -> str:
    """What train.py of version 0.1 left: weights, and an optimiser that has taken steps."""
    model = Legacy(stem).create().train()
    optimizer = make_optimizer(model.parameters())
    model(torch.randn(2, 3, 24, 32)).sum().backward()
    optimizer.step()
    state = Legacy(stem).state
    if 'sparsity.phase' in state:
        state['sparsity.phase'] = torch.tensor(1)  # masks are drawn
    torch.save({'state_dict': state, 'optimizer': optimizer.state_dict(), 'epoch': 3}, folder / 'last.pth')
    return str(folder / 'last.pth')


OPTIMIZERS = {
    'AdamW': torch.optim.AdamW,
    'SGD': lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    'Adagrad': torch.optim.Adagrad,
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()(torch.randn(2, 3, 24, 32)).sum().backward()
    optimizer.step()


@pairwise({'name': OPTIMIZERS, 'sparsity': [0., 0.4]})
def test_a_run_of_version_0_1_is_not_resumed_with_its_optimizer(name, sparsity, tmp_path):
    model, path = Legacy('sw').create(sparsity=sparsity), saved_run('sw', tmp_path, OPTIMIZERS[name])
    optimizer = OPTIMIZERS[name](model.parameters())
    assert timm.models.resume_checkpoint(model, path, optimizer, log_info=False) == 3
    before = copy.deepcopy(dict(model.named_parameters()))
    for _ in range(2):
        with pytest.raises(RuntimeError, match='--initial-checkpoint'):
            step(model, optimizer)
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())
    step(model, OPTIMIZERS[name](model.parameters()))


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_its_weights_train_on_with_a_fresh_optimizer(name, tmp_path):
    model = Legacy('sw').create()
    optimizer = OPTIMIZERS[name](model.parameters())
    timm.models.resume_checkpoint(model, saved_run('sw', tmp_path, OPTIMIZERS[name]), log_info=False)
    for _ in range(3):
        step(model, optimizer)


@pytest.mark.parametrize('stem', OF_ONE_ORDER)
def test_a_run_whose_network_has_one_order_goes_on(stem, tmp_path):
    model = Legacy(stem).create()
    optimizer = torch.optim.AdamW(model.parameters())
    timm.models.resume_checkpoint(model, saved_run(stem, tmp_path, torch.optim.AdamW), optimizer, log_info=False)
    step(model, optimizer)


def test_a_run_of_this_version_goes_on():
    model = loaded()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    again = Legacy('sw').create()
    again.load_state_dict(copy.deepcopy(model).state_dict())
    resumed = torch.optim.AdamW(again.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    step(again, resumed)


def test_copies_of_a_network_just_loaded_are_as_any(tmp_path):
    model = loaded()
    ema = timm.utils.ModelEmaV3(model)
    torch.save(model, tmp_path / 'whole.pth')
    step(model, torch.optim.AdamW(model.parameters()))
    ema.update(model)
    Legacy('sw').assert_same(torch.load(tmp_path / 'whole.pth', weights_only=False))


@ignores_the_warning
def test_a_resumed_backbone_is_refused_as_well():
    legacy = Legacy('sw')
    body = legacy.create(features_only=True)
    optimizer = torch.optim.AdamW(body.parameters())
    for _ in range(2):
        sum(feature.sum() for feature in body(torch.randn(2, 3, 24, 32))).backward()
        optimizer.step()
    body.load_state_dict(as_list_names(legacy.state))
    with pytest.raises(RuntimeError, match='--initial-checkpoint'):
        optimizer.step()


def test_an_average_of_checkpoints_loads():
    """timm's avg_checkpoints.py averages tables, too, and saves float32."""
    for stem in ('sw', 'eq_slak'):
        legacy = Legacy(stem)
        states = [legacy.state, {
            key: value + value * 0.5 if key.endswith('.weight') else value for key, value in legacy.state.items()}]
        average = {key: torch.stack([state[key].double() for state in states]).mean(0).float() for key in legacy.state}
        expected = {key: average[key] if value.is_floating_point() else value for key, value in legacy.state.items()}
        seen, wanted = legacy.create(), legacy.create()
        seen.load_state_dict(average)
        wanted.load_state_dict(expected)
        for key, value in wanted.state_dict().items():
            assert torch.equal(seen.state_dict()[key], value), key
    states[1][f'{DW}.kept'] = states[1][f'{DW}.kept'].flip(0)
    average = {key: torch.stack([state[key].double() for state in states]).mean(0).float() for key in legacy.state}
    with pytest.raises(CheckpointError, match='do not name each of 8 channels to work on and 0 ghosts once'):
        seen.load_state_dict(average)


# --- telling and converting -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('stem', FILES)
def test_a_file_is_recognised_and_its_translation_too(stem):
    legacy = Legacy(stem)
    found = describe_checkpoint(legacy.state)
    assert found['layout'] == 'timm-shiftwise' and found['model'] == legacy.name
    assert found['assumed'] == found['unknown'] == ()
    model = timm.create_model(found['model'], **found['model_args'])
    model.load_state_dict(legacy.state)
    assert describe_checkpoint(model.state_dict()) == found


@pytest.mark.parametrize('stem, reparameterize', [('sw', False), ('sw', True), ('sw_v2_merged', False), ('slak', True)])
def test_a_file_is_converted_into_a_folder_of_this_version(stem, reparameterize, tmp_path):
    legacy = Legacy(stem)
    save_file(legacy.state, tmp_path / 'old.safetensors')
    done = convert(tmp_path / 'old.safetensors', tmp_path / 'new', reparameterize=reparameterize)
    assert done.network.layout == 'timm-shiftwise' and done.merged == (reparameterize or stem.endswith('merged'))
    assert layout_of(load_file(tmp_path / 'new' / 'model.safetensors')) == OWN
    legacy.assert_same(timm.create_model(f'local-dir:{tmp_path / "new"}', pretrained=True).eval())
    again = convert(tmp_path / 'new', tmp_path / 'again')
    assert again.network.name == legacy.name


def test_the_authors_order_is_told_where_it_is_lost():
    """What holds of version 0.1 holds of the authors' checkpoints: features, warnings, optimisers."""
    network = AuthorsNetwork('sw')
    model = timm.create_model('sw_tiny', **network.model_args())
    with pytest.warns(UserWarning, match='released_channel_order'):
        nn.Sequential(model).load_state_dict({f'0.{key}': value for key, value in network.state().items()})
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict({
        **optimizer.state_dict(), 'state': {0: dict(step=torch.tensor(1.), exp_avg=torch.ones(12, 3, 4, 4))}})
    with pytest.raises(RuntimeError, match='--initial-checkpoint'):
        optimizer.step()

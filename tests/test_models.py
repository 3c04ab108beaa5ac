"""What timm, and those who use it, ask of every network of the package."""
import copy
import math

import pytest
import timm
import torch
from timm.models import create_model
from timm.models._features_fx import create_feature_extractor
from timm.utils import reparameterize_model
from timm.utils.model import freeze
from torch import nn

from timm_shiftwise.layers import ShiftwiseConv2d

SMALL = dict(depths=(1, 2, 1, 1), dims=(12, 16, 20, 24), focus_lengths=(15, 13, 11, 7), num_classes=10)
"""Arguments that make any of the networks small."""
FAMILIES = ['sw_tiny', 'p_sw_tiny', 'p2_sw_tiny', 'eq_slak_tiny', 'slak_tiny', 'sw_v2_tiny']

every_family = pytest.mark.parametrize('name', FAMILIES)


@pytest.fixture
def image() -> torch.Tensor:
    """Two images of 96 pixels, whose last map is 3 x 3 under large shifts."""
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def small(name: str, **kwargs) -> nn.Module:
    """A small network whose layer scales let its blocks be heard."""
    torch.manual_seed(0)
    return create_model(name, **dict(SMALL, ls_init_value=0.5, backend='torch') | kwargs).eval()


# --- size -----------------------------------------------------------------------------------------------------------

TINY, BASE = (96, 192, 384, 768), (128, 256, 512, 1024)


@pytest.mark.parametrize('name, dims, count', [
    # as registered
    ('slak_tiny', None, 50_703_838), ('slak_small', None, 91_131_820), ('slak_base', None, 157_950_792),
    ('eq_slak_tiny', None, 50_920_798), ('eq_slak_small', None, 91_618_240), ('eq_slak_base', None, 158_599_182),
    ('sw_tiny', None, 30_231_064), ('sw_small', None, 54_215_992), ('sw_base', None, 93_920_502),
    ('sw_v2_tiny', None, 31_790_260), ('sw_v2_small', None, 57_312_892), ('sw_v2_base', None, 100_250_380),
    # SLaK's widths without its widening, and the shift-wise networks with it
    ('slak_tiny', TINY, 30_816_232), ('slak_small', TINY, 55_568_104), ('slak_base', BASE, 95_717_352),
    ('eq_slak_tiny', TINY, 30_983_272), ('eq_slak_small', TINY, 55_942_504), ('eq_slak_base', BASE, 96_216_552),
    ('sw_tiny', (124, 249, 499, 998), 49_946_140), ('sw_small', (124, 249, 499, 998), 89_380_720),
    ('sw_base', (166, 332, 665, 1331), 155_614_548),
])
def test_parameters_number_as_in_the_authors_code(name, dims, count):
    model = create_model(name, device='meta', **({'dims': dims} if dims else {}))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


# --- construction ---------------------------------------------------------------------------------------------------

@every_family
def test_an_unknown_argument_is_an_error(name):
    with pytest.raises(TypeError, match='focus_length'):
        small(name, focus_length=7)


@every_family
@pytest.mark.parametrize('arguments, seen', [
    (dict(depths=(1, 1)), r'\(1, 1\)'),
    (dict(dims=()), r'\(\)'),
    (dict(operator='swish'), "'swish'"),
    (dict(kernel_size=0), 'kernel_size.*0'),
    (dict(focus_lengths=(15, 13, 0, 7)), 'focus_length.*0'),
], ids=str)
def test_an_argument_out_of_range_is_an_error_that_names_it(name, arguments, seen):
    with pytest.raises(ValueError, match=seen):
        small(name, **arguments)


@every_family
@pytest.mark.parametrize('reparameterized', [False, True])
@pytest.mark.parametrize('device, dtype', [
    ('meta', torch.float32), ('meta', torch.bfloat16), ('cpu', torch.float64), ('cpu', torch.bfloat16)])
def test_device_and_dtype_place_every_parameter_and_buffer(name, device, dtype, reparameterized):
    model = small(name, device=device, dtype=dtype, reparameterized=reparameterized)
    model.reset_classifier(5)
    x = torch.zeros(1, 3, 64, 64, device=device, dtype=dtype)
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        assert value.device.type == device, key
        assert value.dtype == dtype or not value.is_floating_point(), key
    features = small(name, device=device, dtype=dtype, reparameterized=reparameterized, features_only=True)
    for out in [model(x), *features(x)]:
        assert out.device.type == device and out.dtype == dtype


@every_family
def test_building_a_network_under_a_default_device_places_everything_there(name):
    with torch.device('meta'):
        model = small(name)
    assert all(value.is_meta for value in [*model.parameters(), *model.buffers()])


@every_family
def test_building_a_network_leaves_the_random_state_to_the_weights(name):
    """Two networks of one seed are equal, and index tables draw from no generator that others use."""
    first, second = small(name), small(name)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@every_family
def test_stochastic_depth_grows_over_the_blocks(name):
    model = small(name, drop_path_rate=0.4)
    rates = [getattr(block.drop_path, 'drop_prob', 0.) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0., 0.1, 0.2, 0.3, 0.4])


# --- the model contract ---------------------------------------------------------------------------------------------

@every_family
def test_the_attributes_that_timm_reads_are_there(name):
    model = small(name)
    assert (model.num_classes, model.num_features, model.head_hidden_size, model.in_chans) == (10, 24, 24, 3)
    assert [info['num_chs'] for info in model.feature_info] == [12, 16, 20, 24]
    assert [info['reduction'] for info in model.feature_info] == [4, 8, 16, 32]
    modules = dict(model.named_modules())
    assert all(info['module'] in modules for info in model.feature_info)
    cfg = model.pretrained_cfg
    assert cfg['first_conv'] in modules and cfg['classifier'] in modules
    assert modules[cfg['classifier']] is model.get_classifier()
    assert {'license', 'origin_url', 'paper_ids', 'paper_name'} <= cfg.keys()
    assert set(model.no_weight_decay()) <= {key for key, _ in model.named_parameters()}


@every_family
@torch.no_grad()
def test_the_parts_of_the_forward_pass_make_the_whole(name, image):
    model = small(name)
    features = model.forward_features(image)
    assert features.shape == (2, 24, 3, 3)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, 24)
    assert torch.equal(model.get_classifier()(pooled), model(image))


@every_family
@torch.no_grad()
def test_the_classifier_can_be_replaced_and_left_out(name, image):
    model = small(name)
    pooled = model.forward_head(model.forward_features(image), pre_logits=True)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(image).shape == (2, 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(image), pooled)
    model.reset_classifier(0, '')
    assert model(image).shape == (2, 24, 3, 3)
    model.reset_classifier(6, 'max')
    assert model(image).shape == (2, 6)
    assert small(name, num_classes=0)(image).shape == (2, 24)
    assert small(name, num_classes=0, global_pool='')(image).shape == (2, 24, 3, 3)


@every_family
@torch.no_grad()
def test_intermediates_are_the_stages_outputs(name, image):
    model = small(name)
    last, stages = model.forward_intermediates(image)
    assert [tuple(stage.shape) for stage in stages] == [(2, 12, 24, 24), (2, 16, 12, 12), (2, 20, 6, 6), (2, 24, 3, 3)]
    assert torch.equal(last, model.forward_features(image)) and torch.equal(last, stages[-1])
    chosen = model.forward_intermediates(image, indices=[0, 2], intermediates_only=True)
    assert all(torch.equal(seen, stages[i]) for seen, i in zip(chosen, (0, 2), strict=True))
    chosen = model.forward_intermediates(image, indices=2, intermediates_only=True)
    assert all(torch.equal(seen, stages[i]) for seen, i in zip(chosen, (2, 3), strict=True))
    early, chosen = model.forward_intermediates(image, indices=[1], stop_early=True)
    assert torch.equal(early, stages[1]) and torch.equal(chosen[0], stages[1])
    with pytest.raises(ValueError, match='NLC'):
        model.forward_intermediates(image, output_fmt='NLC')
    with pytest.raises(AssertionError):
        model.forward_intermediates(image, indices=[4])


@every_family
@torch.no_grad()
def test_pruning_leaves_the_stages_that_intermediates_need(name, image):
    model = small(name)
    wanted = model.forward_intermediates(image, indices=[0, 1], intermediates_only=True)
    logits = model(image)
    assert copy.deepcopy(model).prune_intermediate_layers([3], prune_head=False) == [3]
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(pruned.stages) == 2 and isinstance(pruned.get_classifier(), nn.Identity)
    outs = pruned.forward_intermediates(image, [0, 1], intermediates_only=True)
    assert all(torch.equal(seen, expected) for seen, expected in zip(outs, wanted, strict=True))
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.equal(model(image), logits)


@every_family
@pytest.mark.parametrize('kind', ['list', 'dict', 'hook', 'getter'])
@torch.no_grad()
def test_features_only_gives_the_stages_outputs(name, kind, image):
    wanted = small(name).forward_intermediates(image, intermediates_only=True)
    model = small(name, features_only=True, feature_cls=kind)
    assert model.feature_info.channels() == [12, 16, 20, 24] and model.feature_info.reduction() == [4, 8, 16, 32]
    outs = model(image)
    for seen, expected in zip(outs.values() if isinstance(outs, dict) else outs, wanted, strict=True):
        torch.testing.assert_close(seen, expected)
    second, last = small(name, features_only=True, out_indices=(1, 3))(image)
    assert second.shape == (2, 16, 12, 12) and last.shape == (2, 24, 3, 3)


@every_family
def test_parameters_are_grouped_by_depth(name):
    model = small(name)
    for coarse, layers in ((True, 6), (False, 7)):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse))
        members = [key for group in groups.values() for key in group]
        assert sorted(members) == sorted(key for key, _ in model.named_parameters())
        assert len(groups) == layers
        assert groups[0] and all(key.startswith('stem.') for key in groups[0])
    freeze(model, ['stem', 'stages.0'])
    assert not any(p.requires_grad for key, p in model.named_parameters() if key.startswith(('stem.', 'stages.0.')))


@every_family
def test_every_parameter_gets_a_finite_gradient(name, image):
    model = small(name, ls_init_value=1e-6).train()
    for module in model.modules():
        if isinstance(module, ShiftwiseConv2d):
            # a pruned group is a masked weight, not a parameter left out
            module.mask[::2, 0] = False
    model(image).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


@every_family
def test_gradient_checkpointing_changes_nothing(name, image):
    plain, checkpointed = small(name).train(), small(name).train()
    checkpointed.set_grad_checkpointing()
    outs = [model(image) for model in (plain, checkpointed)]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)
    for out in outs:
        out.square().sum().backward()
    for (key, wanted), seen in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(seen.grad, wanted.grad, rtol=1e-3, atol=1e-4, msg=key)
    checkpointed.set_grad_checkpointing(False)
    assert not any(stage.grad_checkpointing for stage in checkpointed.stages)


# --- graphs, types, layouts, sizes ----------------------------------------------------------------------------------

def listed(outs) -> list[torch.Tensor]:
    return outs if isinstance(outs, list) else [outs]


@every_family
@pytest.mark.parametrize('form', ['classifier', 'features', 'reparameterized'])
@pytest.mark.filterwarnings('ignore:.*torch.jit.*:FutureWarning', 'ignore:.*torch.jit.*:DeprecationWarning')
@torch.no_grad()
def test_torchscript_computes_the_same(name, form, image):
    model = small(name, features_only=form == 'features')
    if form == 'reparameterized':
        model = reparameterize_model(model)
    scripted = torch.jit.script(model)
    for x in (image, torch.randn(1, 3, 70, 66)):
        for seen, expected in zip(listed(scripted(x)), listed(model(x)), strict=True):
            torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


@every_family
@pytest.mark.filterwarnings('ignore:.*torch.jit.*:FutureWarning', 'ignore:.*torch.jit.*:DeprecationWarning')
@torch.no_grad()
def test_a_traced_network_computes_the_same(name, image):
    model = small(name)
    traced = torch.jit.trace(model, image)
    torch.testing.assert_close(traced(image), model(image), rtol=1e-4, atol=1e-5)


@every_family
@torch.no_grad()
def test_fx_takes_features_from_within(name, image):
    model = small(name)
    extractor = create_feature_extractor(model, ['stages.1', 'stages.1.blocks.0.conv_dw', 'head.fc'])
    outs = extractor(image)
    wanted = model.forward_intermediates(image, indices=[1], intermediates_only=True)[0]
    torch.testing.assert_close(outs['stages.1'], wanted)
    torch.testing.assert_close(outs['head.fc'], model(image))
    assert outs['stages.1.blocks.0.conv_dw'].shape == outs['stages.1'].shape


@every_family
@pytest.mark.parametrize('height, width', [(32, 32), (33, 65), (97, 51), (384, 128), (64, 224)])
@torch.no_grad()
def test_images_of_odd_sizes_pass(name, height, width, backend):
    model = small(name, backend=backend)
    image = torch.randn(1, 3, height, width)
    logits, features = model(image), model.forward_features(image)
    assert logits.shape == (1, 10) and logits.isfinite().all()
    rounded = math.ceil if name == 'sw_v2_tiny' else math.floor
    assert tuple(features.shape[2:]) == (rounded(height / 32), rounded(width / 32))
    torch.testing.assert_close(logits, small(name)(image), rtol=1e-4, atol=1e-5)


@every_family
def test_training_and_evaluation_differ_only_by_statistics(name, image):
    model = small(name, drop_rate=0.3, drop_path_rate=0.3)
    assert torch.equal(model(image), model(image))
    model.train()
    assert not torch.equal(model(image), model(image))


@every_family
@torch.no_grad()
def test_a_copy_computes_the_same(name, image, tmp_path):
    model = small(name)
    wanted = model(image)
    assert torch.equal(copy.deepcopy(model)(image), wanted)
    torch.save(model, tmp_path / 'model.pt')
    assert torch.equal(torch.load(tmp_path / 'model.pt', weights_only=False)(image), wanted)
    other = create_model(name, **SMALL, ls_init_value=0.5, backend='torch').eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(image), wanted)


@every_family
@torch.no_grad()
def test_channels_of_the_input_can_be_other_than_three(name):
    for channels in (1, 4):
        assert small(name, in_chans=channels)(torch.randn(1, channels, 64, 64)).shape == (1, 10)

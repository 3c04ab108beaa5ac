"""What timm, and those who use it, ask of every network of the package."""
import copy

import pytest
import torch
from timm.models import create_model
from timm.models._features_fx import create_feature_extractor
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.utils import reparameterize_model
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
@pytest.mark.parametrize('reparameterized', [False, True])
def test_a_network_built_without_memory_is_drawn_as_any_other(name, reparameterized):
    model = small(name, device='meta', reparameterized=reparameterized).to_empty(device='cpu')
    for value in [*model.parameters(), *model.buffers()]:
        value.data.fill_(77)  # whatever lies in the memory
    model.init_weights()
    other = small(name, reparameterized=reparameterized)
    assert reinit_non_persistent_buffers(model) == [], 'whatever is computed is saved with the weights'
    for key, value in other.state_dict().items():
        seen = model.state_dict()[key]
        if seen.ndim > 1 and value.is_floating_point():  # drawn in the order of the modules, not as they were built
            torch.testing.assert_close(seen.std(), value.std(), rtol=0.3, atol=1e-6)
            torch.testing.assert_close(seen.mean(), value.mean(), rtol=0, atol=1e-2)
        else:
            assert torch.equal(seen, value), key


@every_family
@pytest.mark.parametrize('wrapper', [lambda net: net, nn.Sequential], ids=['itself', 'Sequential'])
def test_a_network_built_without_memory_takes_all_it_needs_from_a_checkpoint(name, wrapper, image):
    saved = small(name)
    model = wrapper(small(name, device='meta').to_empty(device='cpu'))
    model.load_state_dict(wrapper(saved).state_dict())
    reinit_non_persistent_buffers(model)
    assert torch.equal(model.eval()(image), saved(image))


@every_family
@pytest.mark.parametrize('arguments, error, message', [
    (dict(kernel_size='5'), ValueError, "kernel_size must be .*'5'"),
    (dict(kernel_size=5.), ValueError, r'kernel_size must be .*5\.0'),
    (dict(kernel_size=True), ValueError, 'kernel_size must be .*True'),
    (dict(dtype='float32'), TypeError, 'dtype.*str'),
    (dict(dtype=torch.int32), RuntimeError, 'floating point'),
], ids=str)
def test_a_wrong_kernel_size_or_dtype_is_an_error_that_tells_it(name, arguments, error, message):
    with pytest.raises(error, match=message):
        small(name, **arguments)


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
def test_every_parameter_gets_a_finite_gradient(name, image):
    model = small(name, ls_init_value=1e-6).train()
    for module in model.modules():
        if isinstance(module, ShiftwiseConv2d):
            # a pruned group is a masked weight, not a parameter left out
            module.group_mask[:, ::2, 0] = False
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


# --- graphs, modes, copies ------------------------------------------------------------------------------------------

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

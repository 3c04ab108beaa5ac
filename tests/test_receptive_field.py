"""Effective receptive fields and the exact reach: worked by hand, against brute force, and for any model of timm."""
import csv
import io
import json

import numpy as np
import pytest
import timm
import torch
from families import each_family, make, merged
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import timm_shiftwise
from timm_shiftwise.cli import main
from timm_shiftwise.receptive_field import ReceptiveField, erf, exact_reach

ACTING = dict(ls_init_value=0.5)


def field_of(scores: np.ndarray) -> ReceptiveField:
    """A receptive field with given scores."""
    return ReceptiveField('made up', scores, (1, 1), None, 1, 'nothing', 'none')


class OneConv(nn.Module):
    """A convolution of all ones, whose feature map the middle pixels make alike."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, kernel_size, padding=kernel_size // 2, bias=False)
        nn.init.ones_(self.conv.weight)

    def forward(self, x):
        """Feature map [B, 2, H, W]."""
        return self.conv(x)


def test_the_field_of_one_convolution_is_its_kernel():
    field = erf(OneConv(5), torch.ones(1, 3, 9, 11), stage=None)
    wanted = np.zeros((9, 11))
    wanted[2:7, 3:8] = 3 * 2  # colours of a pixel, channels of the map
    np.testing.assert_array_equal(field.scores, wanted)
    assert [square.side for square in field.squares((1 / 25, 9 / 25, 0.5, 1.0))] == [1, 3, 5, 5]
    assert field.squares((0.5,))[0].area == 25 / 99


def test_what_is_below_zero_in_the_middle_or_in_the_gradient_does_not_count():
    model = OneConv(3)
    assert not torch.equal(erf_scores(model, torch.ones(1, 3, 5, 5)), torch.zeros(5, 5))
    with pytest.raises(ValueError, match='does not depend'):  # the middle is below zero
        erf(model, -torch.ones(1, 3, 5, 5))
    with torch.no_grad():
        model.conv.weight[:, :, 0] = -0.25  # of the kernel's first row the gradient is below zero
    scores = erf_scores(model, torch.ones(1, 3, 5, 5))
    assert scores[1].eq(0).all() and scores[2, 1:4].eq(6).all()


def erf_scores(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Scores [H, W]."""
    return torch.from_numpy(erf(model, images).scores)


def test_scores_are_the_mean_over_images():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 4, 3, padding=1))
    nn.init.ones_(model[2].bias)  # the middle is above zero
    first, second = torch.randn(2, 1, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    both = erf_scores(model, torch.cat([first, second]))
    torch.testing.assert_close(both, (erf_scores(model, first) + erf_scores(model, second)) / 2)
    torch.testing.assert_close(erf_scores(model, [first[0], second[0]]), both)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2 ** 16), st.floats(0.01, 1.0))
def test_a_square_is_the_smallest_that_holds_the_share(height, width, seed, share):
    scores = np.random.default_rng(seed).random((height, width)) + 1e-3
    square, = field_of(scores).squares((share,))
    log = np.log10(scores + 1)

    def held(margin: int) -> tuple[float, int]:
        rows = slice(max(height // 2 - margin, 0), height // 2 + margin + 1)
        columns = slice(max(width // 2 - margin, 0), width // 2 + margin + 1)
        part = log[rows, columns]
        return part.sum() / log.sum(), max(part.shape)

    fitting = [side for margin in range(10) for inside, side in [held(margin)] if inside >= share - 1e-12]
    assert square.side == fitting[0]


@pytest.mark.parametrize('share', [0, -0.1, 1.01])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=str(share)):
        field_of(np.ones((3, 3))).squares((share,))


@each_family
@pytest.mark.parametrize('is_merged', [False, True])
def test_the_exact_reach_is_where_gradients_are(family, is_merged, monkeypatch):
    monkeypatch.setenv('TIMM_SHIFTWISE_BACKEND', 'torch')  # no kernel is compiled for a single gradient
    model = make(family, **ACTING).double().eval()
    if not is_merged and family != 'slak':
        for stage in model.stages:  # few groups, so that the reach is not the whole image
            mask = stage.blocks[0].conv_dw.group_mask
            mask.zero_()
            mask[..., :2, 0] = True
    network = merged(model) if is_merged else model
    if family == 'sw_v2':
        for stage in network.stages:
            for block in stage.blocks:  # they pool over the whole map, which the reach leaves out
                block.se = nn.Identity()
                block.mlp.grn = nn.Identity()
    x = torch.randn(1, 3, 72, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for stage in (1, 2):
        features = network.forward_intermediates(x, indices=[stage - 1], intermediates_only=True)[0]
        middle = features[..., features.shape[2] // 2, features.shape[3] // 2].square().sum()
        gradient, = torch.autograd.grad(middle, x)
        reach = exact_reach(network, 72, 56, stage)
        np.testing.assert_array_equal(reach, (gradient != 0).any(1)[0].numpy())
        assert reach.any()
    if not is_merged and family != 'slak':
        assert not exact_reach(network, 72, 56, 1).all()


def test_a_network_that_pools_over_its_map_says_so():
    assert erf(make('sw_v2', **ACTING), size=32, samples=1).to_dict()['sees_all']
    assert not erf(make('sw', **ACTING), size=32, samples=1).to_dict()['sees_all']


@pytest.mark.parametrize('name', ['test_convnext', 'test_resnet', 'test_vit', 'test_efficientnet'])
def test_any_model_of_timm_has_one(name):
    field = timm_shiftwise.erf(name, size=96, samples=1)
    assert field.model == name and field.weights.startswith('random')
    assert field.scores.shape == (96, 96) and field.reach is None
    sides = [square.side for square in field.squares()]
    assert sides == sorted(sides)


def test_maps_with_channels_last_are_read_right():
    swin = timm.create_model(
        'swin_tiny_patch4_window7_224', depths=(1, 1), embed_dim=12, num_heads=(1, 2), img_size=56)
    assert erf(swin, size=56, samples=1).map_size == (7, 7)


def test_a_stage_has_a_field_of_its_own():
    model = make('sw', **ACTING)
    first, second = (erf(model, size=(48, 64), samples=2, stage=stage) for stage in (1, 2))
    assert first.map_size == (12, 16) and second.map_size == (6, 8)
    np.testing.assert_array_equal(erf(model, size=(48, 64), samples=2).scores, second.scores)


def test_the_network_and_the_random_state_are_left_alone():
    model = make('sw', **ACTING).train()
    model.head.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    erf(model, size=32, samples=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.stages.training and not model.head.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize('arguments, error, said', [
    (dict(samples=0), ValueError, 'samples must be at least 1, got 0'),
    (dict(stage=3), ValueError, 'stage must be 1 to 2'),
    (dict(stage=0), ValueError, 'got 0'),
    (dict(size=0), ValueError, 'size must be'),
    (dict(images=[]), ValueError, 'at least one image'),
    (dict(images=[torch.ones(3, 32, 32), torch.ones(3, 40, 32)]), ValueError, r'one size, got \(40, 32\)'),
    (dict(images=[torch.ones(32, 32)]), TypeError, r'\(32, 32\)'),
    (dict(images=[torch.ones(3, 32, 32, dtype=torch.uint8)]), TypeError, 'uint8'),
    (dict(images=torch.full((1, 3, 32, 32), float('nan'))), ValueError, 'not finite'),
])
def test_what_cannot_be_measured_is_an_error(arguments, error, said):
    with pytest.raises(error, match=said):
        erf(make('sw', **ACTING), **arguments)


@pytest.mark.parametrize('model, said', [
    (nn.Flatten(), 'must hand out a feature map'),
    (nn.Sequential(nn.Conv2d(3, 2, 1), nn.Threshold(float('inf'), 1.)), 'does not depend'),
])
def test_a_network_without_a_feature_map_is_an_error(model, said):
    with pytest.raises(ValueError, match=said):
        erf(model, torch.ones(1, 3, 4, 4))


def test_only_a_network_with_feature_maps_has_stages():
    with pytest.raises(ValueError, match='no forward_intermediates'):
        erf(OneConv(3), torch.ones(1, 3, 4, 4), stage=1)


@pytest.fixture
def pictures(tmp_path):
    """A folder of five images, in two classes."""
    for index in range(5):
        folder = tmp_path / 'images' / f'class{index % 2}'
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{index}.png')
    return tmp_path / 'images'


def test_the_command_compares_models_and_draws_them(tmp_path, capsys, pictures):
    pytest.importorskip('matplotlib')
    output = tmp_path / 'erf.png'
    arguments = ['test_sw', 'test_convnext', '--size', '64', '--images', str(pictures), '--samples', '3']
    assert main(['erf', *arguments, '--layer-scale', '0.5', '--output', str(output)]) == 0
    shown = capsys.readouterr()
    assert 'test_convnext' in shown.out and 'rank differently' in shown.out and '3 x images of' in shown.out
    assert 'layer scale 0.5' in shown.out
    with Image.open(output) as drawn:
        assert drawn.format == 'PNG' and drawn.width > drawn.height
    assert list(tmp_path.glob('.*')) == []
    assert main(['erf', *arguments, '--format', 'json']) == 0
    told = json.loads(capsys.readouterr().out)
    assert [field['model'] for field in told] == ['test_sw', 'test_convnext']
    assert told[0]['images'] == 3 and told[0]['input_size'] == [64, 64] and told[0]['versions']['timm']
    assert told[0]['reach'] == {'height': 64, 'width': 64} and told[1]['reach'] is None
    assert main(['erf', *arguments, '--format', 'csv']) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [int(row['side_0.99']) for row in rows] == [field['squares'][-1]['side'] for field in told]


@pytest.mark.parametrize('seen, weights', [
    ('noise', 'none'), ('images of ' + 'a folder ' * 20, 'some, of which there is more to say than a line can hold')])
def test_what_is_written_lies_beside_the_panel(seen, weights, monkeypatch):
    picture = pytest.importorskip('timm_shiftwise.receptive_field.picture')
    drawn = []
    canvas = picture.FigureCanvasAgg
    monkeypatch.setattr(picture, 'FigureCanvasAgg', lambda figure: drawn.append(figure) or canvas(figure))
    picture.draw_receptive_fields([ReceptiveField('made up', np.eye(9), (1, 1), None, 1, seen, weights)])
    (caption,), (panel,) = drawn[0].texts, drawn[0].axes
    facts, name = panel.texts
    boxes = [part.get_window_extent() for part in (caption, panel.patch, facts, name)]
    heights = [0, *(edge for box in boxes for edge in (box.y0, box.y1)), drawn[0].bbox.y1]
    assert heights == sorted(heights)


def test_the_command_takes_checkpoints_by_turns(tmp_path, capsys):
    file = tmp_path / 'mine.safetensors'
    torch.manual_seed(3)
    from safetensors.torch import save_file
    save_file(timm.create_model('test_sw', num_classes=5, **ACTING).state_dict(), file)
    base = ['erf', 'test_sw', 'test_sw', '--size', '128', '--samples', '1', '--format', 'json']
    assert main([*base, '--model-kwargs', 'num_classes=5', '--checkpoint', str(file), '-']) == 0
    trained, random = json.loads(capsys.readouterr().out)
    assert trained['weights'] == 'mine.safetensors' and random['weights'].startswith('random')
    assert trained['squares'] != random['squares']


@pytest.mark.parametrize('arguments, said', [
    (['no_such_model'], 'no_such_model'),
    (['test_sw', '--stage', '9'], 'stage must be 1 to 4'),
    (['test_sw', '--samples', '0'], 'samples must be at least 1'),
    (['test_sw', '--size', '1', '2', '3'], 'one or two numbers'),
    (['test_sw', '--images', 'no/such/folder'], 'no/such/folder'),
    (['test_sw', '--output', 'erf.jpg'], 'ends in .png'),
    (['test_sw', 'test_convnext', '--checkpoint', 'one'], 'for each of 2 models'),
    (['test_sw', '--checkpoint', 'no/such/file'], 'no/such/file'),
])
def test_bad_arguments_of_the_command_are_told_in_a_line(arguments, said, capsys):
    assert main(['erf', *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error.replace('\n', ' ') and 'Traceback' not in error


def test_an_empty_folder_is_told(tmp_path, capsys):
    assert main(['erf', 'test_sw', '--images', str(tmp_path)]) == 2
    assert 'images' in capsys.readouterr().err.lower()

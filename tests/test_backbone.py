"""The networks as backbones: maps of chosen stages, detection and segmentation on them, fine-tuning by depth."""
import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, FOUR_STAGES, TWO_STAGES, assert_all_close, each_family, image, make, merged
from packaging.version import Version
from timm.models import adapt_input_conv
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils.model import freeze
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from timm_shiftwise.layers import LargeKernelConv2d, ShiftwiseConv2d

DIMS, REDUCTIONS = FOUR_STAGES['dims'], (4, 8, 16, 32)

SIZES = [(64, 64), (32, 32), (33, 65), (97, 51), (384, 128), (64, 224)]


def four_stages(family: str, **kwargs) -> nn.Module:
    """A network of strides 4 to 32, in evaluation mode."""
    return make(family, **{**FOUR_STAGES, 'backend': 'torch', **kwargs}).eval()


def map_size(family: str, size: tuple[int, int], reduction: int) -> tuple[int, int]:
    """Height and width of a stage's map: patches that do not fit are dropped, overlapping convolutions round up."""
    rounded = math.ceil if family == 'sw_v2' else math.floor
    return rounded(size[0] / reduction), rounded(size[1] / reduction)


# --- maps of chosen stages ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('indices', [(0, 1, 2, 3), (1, 3), (2,), (-2, -1)], ids=str)
@each_family
@torch.no_grad()
def test_chosen_maps_have_the_strides_and_channels_that_are_announced(family, indices):
    model = four_stages(family, features_only=True, out_indices=indices)
    assert model.feature_info.channels() == [DIMS[i] for i in indices]
    assert model.feature_info.reduction() == [REDUCTIONS[i] for i in indices]
    for size in SIZES:
        for i, out in zip(indices, model(image(1, 3, *size)), strict=True):
            assert tuple(out.shape) == (1, DIMS[i], *map_size(family, size, REDUCTIONS[i]))


@pytest.mark.parametrize('kind', ['list', 'dict', 'hook', 'getter'])
@each_family
@torch.no_grad()
def test_every_wrapper_for_features_gives_the_stages_outputs(family, kind):
    x = image(2, 3, 96, 64)
    whole, model = four_stages(family), four_stages(family, features_only=True, out_indices=(0, 2, 3), feature_cls=kind)
    wanted = whole.forward_intermediates(x, indices=[0, 2, 3], intermediates_only=True)
    outs = model(x)
    assert_all_close(list(outs.values()) if isinstance(outs, dict) else outs, wanted)


@each_family
@torch.no_grad()
def test_intermediates_are_the_stages_outputs(family):
    x, model = image(2, 3, 96, 64), four_stages(family)
    last, stages = model.forward_intermediates(x)
    assert [tuple(stage.shape) for stage in stages] == [
        (2, dim, *map_size(family, (96, 64), reduction)) for dim, reduction in zip(DIMS, REDUCTIONS, strict=True)]
    assert torch.equal(last, model.forward_features(x)) and torch.equal(last, stages[-1])
    for indices, which in (([0, 2], (0, 2)), (2, (2, 3)), ([-1], (3,)), (None, (0, 1, 2, 3))):
        # the only final norm follows the pooling: there is none to apply to a map
        for norm in (False, True):
            chosen = model.forward_intermediates(
                x, indices=indices, norm=norm, output_fmt='NCHW', intermediates_only=True)
            assert all(torch.equal(seen, stages[i]) for seen, i in zip(chosen, which, strict=True))
    with pytest.raises(ValueError, match='NLC'):
        model.forward_intermediates(x, output_fmt='NLC')
    with pytest.raises(AssertionError):
        model.forward_intermediates(x, indices=[4])


@each_family
@torch.no_grad()
def test_stopping_early_runs_no_later_stage(family):
    x, model = image(2, 3, 64, 64), four_stages(family)
    wanted = model.forward_intermediates(x, intermediates_only=True)[1]
    model.stages[2].register_forward_hook(lambda *_: pytest.fail('a stage ran that nobody asked for'))
    early, chosen = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert torch.equal(early, wanted) and torch.equal(chosen[0], wanted)


@each_family
@torch.no_grad()
def test_pruning_leaves_the_stages_that_intermediates_need(family):
    x, model = image(2, 3, 64, 96), four_stages(family)
    wanted, logits = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True), model(x)
    kept = copy.deepcopy(model)
    assert kept.prune_intermediate_layers([3], prune_head=False) == [3]
    assert torch.equal(kept(x), logits)
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(pruned.stages) == 2 and isinstance(pruned.get_classifier(), nn.Identity)
    assert pruned.num_features == pruned.head_hidden_size == DIMS[1]
    outs = pruned.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert all(torch.equal(seen, expected) for seen, expected in zip(outs, wanted, strict=True))
    assert torch.equal(pruned.forward_features(x), wanted[-1])
    needed = {key for key, _ in model.named_parameters() if key.startswith(('stem.', 'stages.0.', 'stages.1.'))}
    assert {key for key, _ in pruned.named_parameters()} == needed
    assert torch.equal(pruned(x), wanted[-1])
    pruned.reset_classifier(3, 'avg')
    assert pruned(x).shape == (2, 3)
    assert torch.equal(model(x), logits)


@pytest.mark.parametrize('prune_norm', [False, True])
@pytest.mark.parametrize('prune_head', [False, True])
@pytest.mark.parametrize('indices, last', [([3], 3), ([0, 2], 2), (2, 3), ([1], 1)])
def test_pruning_leaves_of_the_head_what_timms_convnext_leaves(indices, last, prune_head, prune_norm):
    ours = four_stages('sw')
    theirs = timm.create_model('convnext_atto', depths=(1, 1, 1, 1), dims=DIMS, num_classes=10)
    # before 1.0.31 timm's own counts stayed as they were
    models = (ours, theirs) if Version(timm.__version__) >= Version('1.0.31') else (ours,)
    for model in models:
        model.prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        is_whole = last == 3 and not prune_head
        assert (model.num_features, model.head_hidden_size) == (DIMS[last], DIMS[last])
        assert model.num_classes == (10 if is_whole else 0)
        head = {key for key, _ in model.named_parameters() if key.startswith('head.')}
        assert head == ({'head.norm.weight', 'head.norm.bias', 'head.fc.weight', 'head.fc.bias'} if is_whole else set())
        assert model(image(2, 3, 64, 96)).shape[1] == (10 if is_whole else DIMS[last])


# --- detection and segmentation -------------------------------------------------------------------------------------

class Pyramid(nn.Module):
    """A backbone as torchvision's detectors take it: a feature pyramid over a network's maps."""

    def __init__(self, body: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.out_channels = out_channels
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): out for i, out in enumerate(self.body(x))})


def small_kernels(model: nn.Module) -> nn.Parameter:
    """Depthwise kernels of the first block."""
    operator = next(m for m in model.modules() if isinstance(m, (ShiftwiseConv2d, LargeKernelConv2d)))
    return operator.kernels if isinstance(operator, ShiftwiseConv2d) else operator.conv_h.weight


@each_family
def test_a_detector_trains_on_a_pyramid_of_our_maps(family):
    torch.manual_seed(0)
    body = make(family, **FOUR_STAGES, backend='torch', features_only=True, out_indices=(0, 1, 3))
    model = FasterRCNN(
        Pyramid(body, 16),
        num_classes=2,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.,),) * 4),
        box_roi_pool=MultiScaleRoIAlign(['0', '1', '2'], output_size=3, sampling_ratio=1),
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=20,
        box_batch_size_per_image=16,
    )
    images, targets = [image(3, 64, 64), image(3, 64, 90, seed=1)], []
    for picture, box in zip(images, ([8., 10., 40., 44.], [30., 4., 70., 60.]), strict=True):
        left, top, right, bottom = map(int, box)
        picture[:, top:bottom, left:right] += 3
        targets.append({'boxes': torch.tensor([box]), 'labels': torch.tensor([1])})
    kernels = small_kernels(body)
    before = kernels.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        assert kernels.grad.isfinite().all() and kernels.grad.abs().sum() > 0
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and sum(losses[-2:]) < 0.7 * sum(losses[:2])
    assert (kernels != before).any()
    with torch.no_grad():
        assert all(found['boxes'].isfinite().all() for found in model.eval()(images))


@each_family
def test_a_segmentation_head_overfits_a_mask(family):
    torch.manual_seed(0)
    body = make(family, **TWO_STAGES, backend='torch', features_only=True)
    head = FCNHead(sum(body.feature_info.channels()), 2)
    x, mask = image(2, 3, 41, 56), torch.zeros(2, 41, 56, dtype=torch.int64)
    mask[0, 8:32, 16:40] = 1
    mask[1, 4:24, 28:48] = 1
    x += 2 * mask[:, None]

    def logits() -> Tensor:
        maps = [F.interpolate(out, x.shape[2:], mode='bilinear') for out in body(x)]
        return head(torch.cat(maps, dim=1))

    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(logits(), mask).backward()
        optimizer.step()
    with torch.no_grad():
        assert (logits().argmax(1) == mask).float().mean() > 0.93


# --- fine-tuning ----------------------------------------------------------------------------------------------------

@each_family
def test_parameters_are_grouped_by_depth(family):
    model = four_stages(family)
    for coarse, layers in ((True, 6), (False, 7)):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse))
        members = [key for group in groups.values() for key in group]
        assert sorted(members) == sorted(key for key, _ in model.named_parameters())
        assert len(groups) == layers
        assert groups[0] and all(key.startswith('stem.') for key in groups[0])
    freeze(model, ['stem', 'stages.0'])
    assert not any(p.requires_grad for key, p in model.named_parameters() if key.startswith(('stem.', 'stages.0.')))


@each_family
def test_layer_decay_gives_earlier_layers_a_lower_learning_rate(family):
    model = four_stages(family)
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-2, weight_decay=0.05, layer_decay=0.5)
    CosineLRScheduler(optimizer, t_initial=10).step(0)
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group['params']}
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(group_of)
    groups = {key: group_of.pop(id(parameter)) for key, parameter in model.named_parameters()}
    assert not group_of

    def rates(prefix: str) -> set[float]:
        return {group['lr'] for key, group in groups.items() if key.startswith(prefix)}

    blocks = [f'stages.{i}.blocks.{j}.' for i, depth in enumerate(FOUR_STAGES['depths']) for j in range(depth)]
    layers = ['stem.', *blocks, 'head.']
    for i, layer in enumerate(reversed(layers)):
        assert [*rates(layer)] == pytest.approx([1e-2 * 0.5 ** i]), layer
    for i in (1, 2, 3):
        assert rates(f'stages.{i}.downsample.') == rates(f'stages.{i}.blocks.0.')
    for key, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and key not in model.no_weight_decay()
        assert groups[key]['weight_decay'] == (0.05 if decays else 0.), key


# --- the image and the classifier -----------------------------------------------------------------------------------

@pytest.mark.parametrize('channels', [1, 4])
@each_family
def test_the_image_can_have_any_channels(family, channels):
    x = image(2, channels, 64, 64)
    model = four_stages(family, in_chans=channels)
    assert model.in_chans == channels and model(x).shape == (2, 10)
    features = four_stages(family, in_chans=channels, features_only=True)
    features(x)[-1].square().sum().backward()
    stem = next(features.parameters())
    assert stem.shape[1] == channels and (stem.grad.abs().sum(dim=(0, 2, 3)) > 0).all()


@pytest.mark.parametrize('channels', [1, 4])
@torch.no_grad()
def test_pretrained_weights_are_adapted_to_the_images_channels(channels):
    published = timm.create_model('test_sw.digits', pretrained=True).eval()
    model = timm.create_model('test_sw.digits', pretrained=True, in_chans=channels).eval()
    assert torch.equal(model.stem[0].weight, adapt_input_conv(channels, published.stem[0].weight))
    x = image(2, channels, 64, 64)
    if channels == 1:
        torch.testing.assert_close(model(x), published(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    maps = timm.create_model('test_sw.digits', pretrained=True, in_chans=channels, features_only=True).eval()(x)
    assert_all_close(maps, model.forward_intermediates(x, intermediates_only=True))


@each_family
@torch.no_grad()
def test_the_classifier_can_be_replaced_and_left_out(family):
    x, model = image(2, 3, 96, 96), four_stages(family)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(x).shape == (2, 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, '')
    assert model(x).shape == (2, 20, 3, 3)
    model.reset_classifier(6, 'max')
    assert model(x).shape == (2, 6)
    assert four_stages(family, num_classes=0)(x).shape == (2, 20)


@pytest.mark.parametrize('pool', ['avg', 'max', 'avgmax'])
@each_family
@torch.no_grad()
def test_every_pooling_that_keeps_the_width_is_taken(family, pool):
    x, model = image(2, 3, 96, 64), four_stages(family, global_pool=pool)
    features = model.forward_features(x)
    average, largest = features.mean((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
    pooled = {'avg': average, 'max': largest, 'avgmax': (average + largest) / 2}[pool]
    normed = model.head.norm(pooled).flatten(1)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), normed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), model.get_classifier()(normed), rtol=1e-4, atol=1e-5)
    assert_all_close([merged(model)(x)], [model(x)], atol=1e-4)


@each_family
@torch.no_grad()
def test_without_pooling_every_place_of_the_map_is_classified(family):
    x = image(2, 3, 96, 64)
    assert four_stages(family, global_pool='', num_classes=0)(x).shape == (2, 20, *map_size(family, (96, 64), 32))
    model = four_stages(family, global_pool='')
    logits = model(x)
    assert logits.shape == (2, 10, *map_size(family, (96, 64), 32))
    assert_all_close([merged(model)(x)], [logits], atol=1e-4)


# --- sizes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('family, backend', [
    *((family, 'torch') for family in FAMILIES), ('sw_v2', 'taichi'), ('p2_sw', 'taichi')])
@torch.no_grad()
def test_one_network_takes_images_of_any_size_in_turn(family, backend, request):
    kernel_size = {}
    if backend == 'taichi':
        request.getfixturevalue('needs_taichi')
        kernel_size = dict(kernel_size=3)  # which Taichi compiles sooner than 5
    model, reference = four_stages(family, backend=backend, **kernel_size), four_stages(family, **kernel_size)
    for_inference = merged(model)
    first = {}
    for size in (*SIZES, *reversed(SIZES)):
        x = image(2, 3, *size)
        logits = model(x)
        assert logits.isfinite().all()
        assert torch.equal(first.setdefault(size, logits), logits)
        assert_all_close([logits, for_inference(x)], [reference(x)] * 2, atol=1e-4)
        # what an image gives does not depend on the others
        torch.testing.assert_close(model(x[1:]), logits[1:], rtol=1e-4, atol=1e-5)
        assert tuple(model.forward_features(x).shape) == (2, DIMS[-1], *map_size(family, size, 32))

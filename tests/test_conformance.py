"""Agreement with the outputs of the authors' code (``tests/conformance``), and with their networks of other shapes."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from authors_networks import AuthorsNetwork
from pairwise import pairwise
from safetensors import safe_open
from timm.utils import reparameterize_model
from torch import Tensor

from timm_shiftwise import geometry
from timm_shiftwise.layers import ShiftwiseConv2d
from timm_shiftwise.layers.wiring import stream_order
from timm_shiftwise.models.layouts import released_channel_order

FOLDER = Path(__file__).parent / 'conformance'
TOLERANCE = dict(rtol=0, atol=1e-4)

VECTORS = [
    ('slak_mini', 'slak_tiny'),
    ('slak_mini', 'eq_slak_tiny'),
    ('shiftwise_v1_mini', 'sw_tiny'),
    ('shiftwise_v2_mini', 'sw_v2_tiny'),
]


def read_vector(name: str) -> tuple[AuthorsNetwork, dict[str, Tensor], dict[str, Tensor]]:
    """A vector's network, its weights in the authors' layout, and what goes in and comes out."""
    with safe_open(FOLDER / f'{name}.safetensors', 'pt') as file:
        config = json.loads(file.metadata()['config'])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    *lengths, size = config['kernel_size']
    network = AuthorsNetwork(
        {'SLaK': 'slak', 'ShiftWise_v1': 'sw', 'ShiftWise_v2': 'sw_v2'}[config['kind']],
        depths=tuple(config['depths']),
        dims=tuple(config['dims']),
        lengths=tuple(lengths),
        size=size,
        paths=config.get('N_path', 1),
        shuffles=config.get('N_rep', 1),
        ghost_ratio=config.get('ghost_ratio', 0.),
        classes=config['num_classes'],
    )
    state = {key.removeprefix('state/'): value for key, value in tensors.items() if key.startswith('state/')}
    return network, state, {key: value for key, value in tensors.items() if not key.startswith('state/')}


@pairwise({'vector, name': VECTORS, 'dtype': [torch.float32, torch.float64], 'merged': [False, True]})
@torch.no_grad()
def test_every_stage_agrees_with_the_authors_code(vector, name, dtype, merged, backend):
    network, state, tensors = read_vector(vector)
    model = timm.create_model(name, backend=backend, dtype=dtype, **network.model_args()).eval()
    model.load_state_dict(state)
    if merged:
        model = reparameterize_model(model)
    x = tensors['x'].to(dtype)
    last, stages = model.forward_intermediates(x)
    for i, stage in enumerate(released_channel_order(stages, model)):
        torch.testing.assert_close(stage, tensors[f'stage{i}'].to(dtype), **TOLERANCE)
    pooled = released_channel_order(model.forward_head(last, pre_logits=True), model)
    torch.testing.assert_close(pooled, tensors['pooled'].to(dtype), **TOLERANCE)
    torch.testing.assert_close(model(x), tensors['logits'].to(dtype), **TOLERANCE)


@pytest.mark.parametrize('vector', ['slak_mini', 'shiftwise_v1_mini', 'shiftwise_v2_mini'])
@torch.no_grad()
def test_the_description_in_plain_pytorch_agrees_with_the_authors_code(vector):
    """What the tests of other shapes compare with is itself compared."""
    network, state, tensors = read_vector(vector)
    for i, stage in enumerate(network.features(state, tensors['x'])):
        torch.testing.assert_close(stage, tensors[f'stage{i}'], **TOLERANCE)
    torch.testing.assert_close(network.logits(state, tensors['x']), tensors['logits'], **TOLERANCE)


OTHER_KERNELS = [
    # odd and even focus lengths, multiples of the kernel's side and not, beyond the image and shorter than the kernel
    dict(lengths=(16, 12, 9, 4), size=5),
    dict(lengths=(21, 14, 8, 7), size=7),
    dict(lengths=(17, 10, 6, 3), size=3),
    dict(lengths=(61, 33, 20, 2), size=4),
    # other widths and depths
    dict(depths=(2, 1, 3, 1), dims=(13, 18, 21, 40)),
    dict(depths=(1, 1), dims=(8, 20), lengths=(9, 7)),
]
OTHER_OPERATORS = [
    dict(ghost_ratio=0.),
    dict(ghost_ratio=0.5, paths=3, shuffles=2),
    dict(ghost_ratio=0.37, paths=1, shuffles=1),
]


def assert_agrees_with_its_description(name: str, shape: dict, backend: str) -> None:
    kind = name.removesuffix('_tiny').removeprefix('eq_')
    network = replace(AuthorsNetwork(kind, size=3 if kind == 'sw_v2' else 5), **shape)
    state = {key: value.double() for key, value in network.state(pruned=0.4).items()}
    model = timm.create_model(name, backend=backend, dtype=torch.float64, **network.model_args()).eval()
    model.load_state_dict(state)
    x = torch.randn(2, 3, 72, 45, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    stages = released_channel_order(model.forward_intermediates(x)[1], model)
    for seen, wanted in zip(stages, network.features(state, x), strict=True):
        torch.testing.assert_close(seen, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x), network.logits(state, x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reparameterize_model(model)(x), network.logits(state, x), rtol=1e-8, atol=1e-8)


@pairwise({
    'name': ['slak_tiny', 'eq_slak_tiny', 'sw_tiny', 'sw_v2_tiny'],
    'shape': OTHER_KERNELS,
    'backend': ['torch', 'taichi'],
})
@torch.no_grad()
def test_networks_of_other_shapes_agree_with_their_description(name, shape, backend, request):
    if backend == 'taichi':
        request.getfixturevalue('needs_taichi')
    assert_agrees_with_its_description(name, shape, backend)


@pytest.mark.parametrize('name', ['sw_tiny', 'sw_v2_tiny'])  # SLaK has no ghosts, shuffles and paths
@pytest.mark.parametrize('shape', OTHER_OPERATORS, ids=str)
@torch.no_grad()
def test_other_operators_agree_with_their_description(name, shape):
    assert_agrees_with_its_description(name, shape, 'torch')


@pytest.mark.parametrize('rule, dim, size', [('v1', 96, 5), ('v1', 192, 5), ('v2', 80, 3), ('v2', 96, 3)])
def test_the_wiring_at_real_widths_is_that_of_the_released_checkpoints(rule, dim, size):
    with safe_open(FOLDER / 'wiring_real_widths.safetensors', 'pt') as file:
        ghost, shifts, picks = (
            file.get_tensor(f'{rule}_{dim}_{name}') for name in ('ghost', 'pad_hv', 'idx_identity'))
    layer = ShiftwiseConv2d(dim, 51, size, num_shuffles=4, ghost_ratio=0.23, ghost_split=rule)
    order = stream_order(dim, 0.23, rule).tolist()
    assert order == [channel for channel in range(dim) if channel not in ghost] + ghost.tolist()
    assert layer.num_ghost == len(ghost)

    places = range(geometry.num_groups(51, size))
    shift_of_place = torch.tensor([geometry.shift(place, 51, size, 'full') for place in places])
    shift_of_map = [
        # the map at each place has that place's shift: [R, C, G] -> [R, C, G]
        torch.empty(table.shape, dtype=torch.int64).scatter_(2, table.long(), shift_of_place.expand(table.shape))
        for table in layer.wiring[:, :, :-1].split(len(places), dim=2)
    ]
    assert torch.equal(torch.cat(shift_of_map).flatten(1).T, shifts.long())  # [C * G, 2 * R]
    first_map = torch.arange(dim - len(ghost)) * len(places)
    assert torch.equal((first_map + layer.wiring[:, :, -1]).T, picks.long())  # [C, R]

"""Which of the equal ways computes a shift-wise convolution, and the reason that is given."""
import pytest
import torch

from timm_shiftwise.ops import backend as chooser
from timm_shiftwise.ops.backend import ENVIRONMENT_VARIABLE as BACKEND_VARIABLE
from timm_shiftwise.ops.shiftwise_conv import ways
from timm_shiftwise.ops.shiftwise_conv.call import Call
from timm_shiftwise.ops.shiftwise_conv.ways import ENVIRONMENT_VARIABLE, WAYS, Limit, choose_way
from timm_shiftwise.ops.taichi import runtime
from timm_shiftwise.ops.taichi.runtime import LANES

both_directions = pytest.mark.parametrize('backward', [False, True])


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch, needs_taichi):
    for variable in (ENVIRONMENT_VARIABLE, BACKEND_VARIABLE):
        monkeypatch.delenv(variable, raising=False)


def choose(padding='full', backend=None, kept=None, size=56, kernel_size=5, backward=False, device='cpu'):
    """What is chosen for 4 channels of 10 groups, of which a share is kept; None for no mask."""
    x = torch.empty(1, 4, size, size, device=device)
    weight = torch.empty(4, 10, kernel_size, kernel_size, device=device)
    mask = None if kept is None else torch.arange(40, device=device).view(4, 10) < round(40 * kept)
    wiring = torch.zeros(1, 4, 21, dtype=torch.int32, device=device)
    choice = choose_way(Call(x, weight, wiring, mask, 51, padding, backend), backward)
    assert WAYS[choice.way.name] is choice.way
    assert choice.reason and not choice.reason.endswith('.') and '\n' not in choice.reason, 'it is a clause'
    return choice


def test_the_table_has_a_row_for_each_way():
    assert [*WAYS] == ['fused', 'toeplitz', 'merged', 'shift']
    assert all(name == way.name for name, way in WAYS.items())


@both_directions
def test_few_groups_on_a_large_map_are_fused_and_many_are_merged(backward):
    few = choose(kept=.05, backward=backward)
    assert few.way.name == 'fused' and '5% of the groups are kept' in few.reason
    for kept in (None, 1.):
        dense = choose(kept=kept, size=28, backward=backward)
        assert dense.way.name == 'merged' and '100% of the groups are kept' in dense.reason


@pytest.mark.parametrize('direction', ['forward', 'backward'])
def test_the_limit_is_that_of_the_direction_and_of_the_size_of_the_map(direction, monkeypatch):
    monkeypatch.setattr(ways, 'FUSED_UP_TO', {
        (LANES, name): (Limit(400, .5), Limit(0, .25)) if name == direction else (Limit(0, 0.),)
        for name in ('forward', 'backward')})
    backward = direction == 'backward'
    for size, limit in ((20, .5), (19, .25), (1, .25)):
        at, above = (choose(kept=kept, size=size, backward=backward) for kept in (limit, limit + .05))
        assert (at.way.name, above.way.name) == ('fused', 'merged')
        assert all(f'up to {limit:.0%}' in choice.reason for choice in (at, above))
    assert choose(kept=.1, size=20, backward=not backward).way.name == 'merged'


@both_directions
@pytest.mark.parametrize('kept', [None, 0., .5, 1.])
@pytest.mark.parametrize('padding, backend, way', [
    ('same', None, 'fused'),
    ('same', 'auto', 'fused'),
    ('same', 'taichi', 'fused'),
    ('same', 'torch', 'shift'),
    ('full', 'taichi', 'fused'),
    ('full', 'torch', 'merged'),
])
def test_a_backend_and_a_padding_pick_among_the_ways(padding, backend, way, kept, backward, monkeypatch):
    assert choose(padding, backend, kept, backward=backward).way.name == way
    if backend is not None:
        monkeypatch.setenv(BACKEND_VARIABLE, backend)
        by_variable = choose(padding, None, kept, backward=backward)
        assert by_variable.way.name == way
        assert backend == 'auto' or BACKEND_VARIABLE in by_variable.reason
        assert 'the backend argument' in choose(padding, 'torch', kept, backward=backward).reason


def test_large_small_kernels_are_not_fused():
    assert choose(kept=.05, kernel_size=9).way.name == 'merged'
    assert choose('same', kernel_size=9).way.name == 'shift'
    assert choose(backend='taichi', kernel_size=9).way.name == 'shift'
    assert '9 x 9' in choose(backend='taichi', kernel_size=9).reason


@both_directions
@pytest.mark.parametrize('padding', ['full', 'same'])
def test_tensors_elsewhere_than_on_the_cpu_take_toeplitz_products(padding, backward):
    # on the meta device a mask has no values, and none is looked at
    for backend in (None, 'auto', 'torch'):
        for kept in (None, .05):
            choice = choose(padding, backend, kept, backward=backward, device='meta')
            assert choice.way.name == 'toeplitz'
            assert backend == 'torch' or 'meta' in choice.reason
    assert choose(padding, backward=backward).way.name != 'toeplitz'


def test_taichi_runs_elsewhere_than_on_the_cpu_only_if_asked_for(monkeypatch):
    monkeypatch.setattr(runtime, 'obstacle', lambda device: None)
    for padding in ('full', 'same'):
        assert choose(padding, 'taichi', device='meta').way.name == 'shift'


def test_without_taichi_the_ways_in_pytorch_are_left(monkeypatch):
    monkeypatch.setattr(runtime, 'obstacle', lambda device: 'it rains')
    monkeypatch.setattr(chooser, '_warned', {'it rains'})
    for padding, way in (('full', 'merged'), ('same', 'shift')):
        choice = choose(padding, kept=.05)
        assert choice.way.name == way and 'Taichi' in choice.reason
        with pytest.raises(RuntimeError, match='it rains'):
            choose(padding, 'taichi')


@both_directions
@pytest.mark.parametrize('way', WAYS)
def test_a_way_that_is_asked_for_is_taken_whatever_backend_is(way, backward, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, way)
    for backend in (None, 'auto', 'taichi', 'torch'):
        for kept in (None, .05):
            choice = choose(backend=backend, kept=kept, backward=backward)
            assert choice.way.name == way and ENVIRONMENT_VARIABLE in choice.reason
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, '')
    assert choose(kept=.05, backward=backward).way.name == 'fused'


@pytest.mark.parametrize('asked, arguments, message', [
    ('magic', {}, "must be one of 'fused', 'toeplitz', 'merged', 'shift', got 'magic'"),
    ('large', {}, "must be one of 'fused', 'toeplitz', 'merged', 'shift', got 'large'"),
    ('Fused', {}, "must be one of 'fused', 'toeplitz', 'merged', 'shift', got 'Fused'"),
    ('merged', dict(padding='same'), "='merged' cannot be followed: .*padding 'full'"),
    ('fused', dict(kernel_size=9), "='fused' cannot be followed: .*7 x 7, not of 9 x 9"),
    ('fused', dict(device='meta'), "='fused' cannot be followed: .*on meta"),
])
def test_a_way_that_there_is_not_or_that_is_hindered_is_an_error(asked, arguments, message, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, asked)
    with pytest.raises(ValueError, match=f'{ENVIRONMENT_VARIABLE}.*{message}'):
        choose(**arguments)


def test_a_way_that_is_asked_for_and_needs_taichi_is_an_error_without_it(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, 'fused')
    monkeypatch.setattr(runtime, 'obstacle', lambda device: 'it rains')
    with pytest.raises(RuntimeError, match='it rains'):
        choose()

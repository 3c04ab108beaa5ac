"""Tables that say where kernels read: looked at in every call and at every load, whatever the way and the wrapper."""
import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from families import make
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_shiftwise.layers import MergedShiftConv2d, ShiftwiseConv2d
from timm_shiftwise.layers.wiring import released_wiring, wrong_wiring
from timm_shiftwise.models import ShiftwiseNet
from timm_shiftwise.ops import shift_add, shiftwise_conv2d
from timm_shiftwise.ops.checks import check_indices

OPS = torch.ops.timm_shiftwise
CHANNELS, MAPS, LENGTH, SIZE = 2, 3, 7, 3


class Arguments(NamedTuple):
    """What the calls below are made of."""
    x: Tensor
    weight: Tensor
    wiring: Tensor
    mask: Tensor | None = None
    maps: int = MAPS

    @property
    def y(self) -> Tensor:
        """Maps as the small convolutions make them of ``x``."""
        return self.x.new_zeros(2, CHANNELS * MAPS, 4 + SIZE - 1, 5 + SIZE - 1)


def arguments(**changes) -> Arguments:
    wiring = released_wiring('sw', CHANNELS, LENGTH, SIZE, 2).clone()
    return Arguments(torch.zeros(2, CHANNELS, 4, 5), torch.ones(CHANNELS, MAPS, SIZE, SIZE), wiring)._replace(**changes)


CALLS: dict[str, Callable[[Arguments], object]] = {
    'ops.shift_add': lambda a: shift_add(a.y, a.wiring, LENGTH, SIZE),
    'ops.shiftwise_conv2d': lambda a: shiftwise_conv2d(a.x, a.weight, a.wiring, LENGTH, 'full', a.mask),
    'shift_add': lambda a: OPS.shift_add(a.y, a.wiring, LENGTH, SIZE, 'full', None),
    'shift_add_backward': lambda a: OPS.shift_add_backward(
        a.x, a.x, a.x, a.wiring, a.maps, LENGTH, SIZE, 'full', None),
    'shiftwise_conv2d': lambda a: OPS.shiftwise_conv2d(a.x, a.weight, a.wiring, a.mask, LENGTH, 'full', None),
    'shiftwise_conv2d_backward': lambda a: OPS.shiftwise_conv2d_backward(
        a.x, a.x, a.x, a.x, a.weight, a.wiring, a.mask, LENGTH, 'full', None, True, True),
}
each_call = pytest.mark.parametrize('call', CALLS.values(), ids=CALLS)
CONVOLUTIONS = {name: call for name, call in CALLS.items() if 'conv2d' in name}
each_convolution = pytest.mark.parametrize('call', CONVOLUTIONS.values(), ids=CONVOLUTIONS)


# --- calls ----------------------------------------------------------------------------------------------------------

@each_call
@pytest.mark.parametrize('dtype', [torch.int32, torch.int64])
@pytest.mark.parametrize('value', [MAPS, -1, -12, 10 ** 6])
def test_a_call_refuses_an_index_that_is_not_there_and_says_where(call, value, dtype):
    given = arguments()
    wiring = given.wiring.to(dtype).movedim(0, -1).contiguous().movedim(-1, 0)  # of any memory layout
    call(given._replace(wiring=wiring))
    wiring[1, CHANNELS - 1, 4] = value
    with pytest.raises(ValueError, match=rf'wiring must hold indices of 0 to 2, got {value} at \[1, 1, 4\]'):
        call(given._replace(wiring=wiring))


@each_call
@pytest.mark.parametrize('wiring, error, message', [
    (torch.zeros(2, CHANNELS, 6, dtype=torch.int32), ValueError, r'\[R, \w+, 7\].*got \(2, 2, 6\)'),
    (torch.zeros(2, 4, 7, dtype=torch.int32), ValueError, r'C = 4|\[R, 2, 7\]'),
    (torch.zeros(0, CHANNELS, 7, dtype=torch.int32), ValueError, r'got \(0, 2, 7\)'),
    (torch.zeros(7, dtype=torch.int32), ValueError, r'got \(7,\)'),
    (torch.zeros(2, CHANNELS, 7), TypeError, 'int32 or int64, got torch.float32'),
    (torch.zeros(2, CHANNELS, 7, dtype=torch.uint8), TypeError, 'int32 or int64, got torch.uint8'),
    (torch.zeros(2, CHANNELS, 7, dtype=torch.int32, device='meta'), ValueError, 'on one device, got cpu and meta'),
], ids=['places', 'channels', 'shuffles', 'axes', 'float', 'uint8', 'device'])
def test_a_call_refuses_a_table_of_another_shape_dtype_or_device(call, wiring, error, message):
    with pytest.raises(error, match=message):
        call(arguments(wiring=wiring))


@each_convolution
@pytest.mark.parametrize('mask', [
    torch.ones(CHANNELS, MAPS), torch.ones(CHANNELS, MAPS + 1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)])
def test_a_call_refuses_a_mask_of_another_shape_or_dtype(call, mask):
    with pytest.raises(ValueError, match=r'mask must be bool and have the shape \(2, 3\), got torch\.'):
        call(arguments(mask=mask))


@each_convolution
@pytest.mark.parametrize('changes, error, message', [
    (dict(x=torch.zeros(2, CHANNELS, 4, 5, dtype=torch.int32)), TypeError, 'x must be one of .*got torch.int32'),
    (dict(weight=torch.ones(CHANNELS, MAPS, SIZE, SIZE).double()), TypeError, 'one dtype, got torch.float32 and .*64'),
    (dict(weight=torch.ones(CHANNELS, 0, SIZE, SIZE)), ValueError, r'K and N of at least 1, got \(2, 0, 3, 3\)'),
    (dict(x=torch.zeros(2, CHANNELS, 0, 5)), ValueError, 'H and W of at least 1'),
], ids=['integers', 'mixed', 'no kernels', 'no rows'])
def test_a_call_refuses_maps_and_kernels_that_no_kernel_can_take(call, changes, error, message):
    with pytest.raises(error, match=message):
        call(arguments(**changes))


@pytest.mark.parametrize('place', range(3))
@pytest.mark.parametrize('name', ['shift_add_backward', 'shiftwise_conv2d_backward'])
def test_gradients_of_unlike_dtypes_or_shapes_are_refused(name, place):
    given = arguments()
    rest = (given.wiring, MAPS, LENGTH, SIZE, 'full', None)
    if 'conv2d' in name:
        rest = (given.x, given.weight, given.wiring, None, LENGTH, 'full', None, True, True)
    for other, error in ((given.x.double(), TypeError), (given.x[:1], ValueError), (given.x[..., :4], ValueError)):
        grads = [given.x] * 3
        grads[place] = other
        with pytest.raises(error, match=r'must have one (dtype|shape), got'):
            getattr(OPS, name)(*grads, *rest)
    with pytest.raises(ValueError, match='maps must be at least 1, got 0'):
        CALLS['shift_add_backward'](given._replace(maps=0))


@pytest.mark.parametrize('inference', [False, True])
def test_what_is_written_to_a_table_between_two_calls_is_seen(inference):
    with torch.inference_mode(inference):  # whose tensors count no changes
        given = arguments()
        for call in CALLS.values():
            call(given)
        given.wiring.data.view(-1)[3] = MAPS  # which no counter tells
        for call in CALLS.values():
            with pytest.raises(ValueError, match=r'got 3 at \[0, 0, 3\]'):
                call(given)


def test_a_compiled_call_looks_at_its_table_when_it_runs():
    torch._dynamo.reset()
    compiled = torch.compile(CALLS['ops.shiftwise_conv2d'], fullgraph=True, backend='aot_eager')
    given = arguments()
    compiled(given)
    given.wiring.fill_(-1)
    with pytest.raises(ValueError, match=r'got -1 at \[0, 0, 0\]'):
        compiled(given)


def test_looking_at_a_table_takes_none_of_pytorchs_operators():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    wiring = arguments().wiring
    with Count() as count:
        check_indices(wiring, MAPS)
    assert count.calls <= 1, 'the view that NumPy reads'


# --- loads ----------------------------------------------------------------------------------------------------------

def written(table: Tensor, place: int, value: int) -> Tensor:
    table = table.clone()
    table.view(-1)[place] = value
    return table


BROKEN = {
    'beyond': ('wiring', lambda t: written(t, -1, 3), r'integers of 0 to 2, got 3 at \[\d, \d, 6\]'),
    'negative': ('wiring', lambda t: written(t, 0, -1), r'integers of 0 to 2, got -1 at \[0, 0, 0\]'),
    'huge': ('wiring', lambda t: t.long() + 2 ** 40, 'integers of 0 to 2, got 10995'),
    'twice': ('wiring', lambda t: written(t, 0, int(t.view(-1)[1])), r'once in an order, got .* from \[0, 0, 0\]'),
    'float': ('wiring', lambda t: t + 0.5, 'torch.float32'),
    'bytes': ('wiring', lambda t: t.byte(), 'torch.uint8'),
    'short': ('wiring', lambda t: t[:, :, 1:], r'the shape \(\d, \d, \d\)'),
    'mask of bytes': ('group_mask', lambda t: t.byte(), 'must be bool .*torch.uint8'),
    'mask of another shape': ('group_mask', lambda t: t[..., 1:], r'(the shape|has) \((\d, )?\d, 2\)'),
    'another focus length': ('built_for', lambda t: t + 1, 'was made for'),
}
each_damage = pytest.mark.parametrize('table, damage, message', BROKEN.values(), ids=BROKEN)

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    'itself': lambda net: net,
    'Sequential': nn.Sequential,
    'DataParallel': nn.DataParallel,
    'in a list of another': lambda net: nn.ModuleDict({'heads': nn.ModuleList([nn.Linear(2, 2), net])}),
    'its stages alone': lambda net: net.stages,
    'one operator': lambda net: net.stages[0].blocks[0].conv_dw,
}


def assert_refused(module: nn.Module, table: str, damage: Callable[[Tensor], Tensor], message: str, **how) -> None:
    """Damage a table of what a module saves: loading it is an error, and changes nothing."""
    state = {key: value + 1 if value.is_floating_point() else value for key, value in module.state_dict().items()}
    before = copy.deepcopy(module.state_dict())
    key = next(key for key in state if key.endswith(table))
    state[key] = damage(state[key])
    with pytest.raises(RuntimeError, match=message) as error:
        module.load_state_dict(state, **how)
    assert key.rpartition('conv_dw')[2] in str(error.value)
    parts = isinstance(module, nn.Sequential) and not isinstance(module[0], ShiftwiseNet)
    for name, value in module.state_dict().items():
        # what comes before a network, or before an operator that stands without one, has had its turn
        if 'heads.0' not in name and (not parts or name.startswith(key.rpartition('.')[0])):
            assert torch.equal(value, before[name]), name


@each_damage
@pytest.mark.parametrize('wrapper', WRAPPERS.values(), ids=WRAPPERS)
def test_a_damaged_table_is_refused_whatever_holds_the_network(wrapper, table, damage, message):
    net = make('sw', kernel_size=5, depths=(1, 1), focus_lengths=(15, 12))
    assert_refused(wrapper(net), table, damage, message, strict=False)


@each_damage
def test_a_damaged_table_is_refused_by_what_hands_out_features(table, damage, message):
    assert_refused(make('sw', focus_lengths=(15, 12), features_only=True), table, damage, message)


@pytest.mark.parametrize('merged', [False, True])
@pytest.mark.parametrize('assign', [False, True])
def test_an_operator_checks_its_own_tables(merged, assign):
    operator: nn.Module = ShiftwiseConv2d(4, 15, 5, padding='same')
    if merged:
        operator = operator.fuse()
        assert isinstance(operator, MergedShiftConv2d)
    for table, damage, message in BROKEN.values():
        assert_refused(operator, table, damage, message, assign=assign)


@pytest.mark.parametrize('padding', ['full', 'same'])
def test_an_operator_with_a_wrong_table_is_neither_run_nor_merged(padding):
    operator = ShiftwiseConv2d(4, 15, 5, padding=padding).eval()
    operator.wiring[0, 2, 1] = -1
    for use in (lambda: operator(torch.zeros(1, 4, 6, 6)), operator.fuse):
        with pytest.raises(ValueError, match=r'got -1 at \[0, 2, 1\]'):
            use()


def test_an_operator_without_memory_takes_only_a_right_table():
    operator, state = ShiftwiseConv2d(4, 15, 5, device='meta'), ShiftwiseConv2d(4, 15, 5).state_dict()
    with pytest.raises(RuntimeError, match=r'wiring must hold integers of 0 to 2, got 9 at'):
        operator.load_state_dict({**state, 'wiring': written(state['wiring'], 2, 9)}, assign=True)
    operator.load_state_dict(state, assign=True)
    assert operator.wiring.equal(state['wiring'])


def test_averaged_tables_load_through_a_wrapper():
    net = make('sw')
    wrapped = nn.Sequential(net)
    state = {key: value.float() for key, value in wrapped.state_dict().items()}
    key = '0.stages.0.blocks.0.conv_dw.group_mask'
    state[key] = state[key] / 3  # kept by one of three
    kept = net.stages[0].blocks[0].conv_dw.group_mask.clone()
    wrapped.load_state_dict(state)
    assert net.stages[0].blocks[0].conv_dw.group_mask.equal(kept)


@pytest.mark.parametrize('operator, length, size, shuffles', [
    ('sw', 51, 5, 4), ('p_sw', 13, 5, 2), ('eq_slak', 9, 4, 1), ('sw', 1, 1, 3), ('eq_slak', 1, 3, 1)])
def test_every_released_table_is_right_and_a_repeated_kernel_is_not(operator, length, size, shuffles):
    table = released_wiring(operator, 3, length, size, shuffles)
    maps, shape = int(table.max()) + 1, tuple(table.shape)
    assert wrong_wiring('wiring', table, shape, maps) == wrong_wiring('wiring', table.to('meta'), shape, maps) == ''
    if maps > 1:
        twice = table.clone()
        twice[-1, -1, 0] = table[-1, -1, 1]
        assert 'once in an order' in wrong_wiring('wiring', twice, shape, maps)

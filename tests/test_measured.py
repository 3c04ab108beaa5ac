"""The choice among equal ways by timing: when it is made, how often, and that a file gives it back."""
import json
from collections import Counter
from functools import partial

import pytest
import torch
from families import assert_all_close
from torch._subclasses.fake_tensor import FakeTensorMode

from timm_shiftwise.cli import main
from timm_shiftwise.layers import ShiftwiseConv2d, merged
from timm_shiftwise.layers.wiring import released_wiring
from timm_shiftwise.ops import measured, shiftwise_conv2d
from timm_shiftwise.ops.backend import ENVIRONMENT_VARIABLE as BACKEND_VARIABLE
from timm_shiftwise.ops.measured import ENVIRONMENT_VARIABLE, MOST_SIZES, ROUNDS, Choices, Layer, Size, may_measure
from timm_shiftwise.ops.shiftwise_conv import ways
from timm_shiftwise.ops.shiftwise_conv.call import Call
from timm_shiftwise.ops.shiftwise_conv.ways import WAYS, choose_way
from timm_shiftwise.profile.network import profile_model

CPU = torch.device('cpu')
LAYER = Layer('a device', 'float32', 'forward', 'full', 3, 9, 3)
SIZE = Size(2, 8, 8)


def own_time(function, device) -> float:
    """A timer for candidates that return how long they take."""
    assert device == CPU
    return function()


def out_of_memory():
    """A candidate that needs too much."""
    raise torch.OutOfMemoryError('no room')


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for variable in (ENVIRONMENT_VARIABLE, BACKEND_VARIABLE, ways.ENVIRONMENT_VARIABLE, 'RANK'):
        monkeypatch.delenv(variable, raising=False)


class Times(dict):
    """A timer that runs a candidate of the operator and tells a time by the name of its way; counts what it ran."""

    def __init__(self, **times: float) -> None:
        super().__init__(times)
        self.runs = Counter()

    def __call__(self, function, device) -> float:
        function()
        name = function.args[0].name
        self.runs[name] += 1
        return self.get(name, 9.)


@pytest.fixture
def timed(monkeypatch):
    """Have the operator's way chosen by timing on the CPU, as on a GPU, with the times that a test gives."""
    def install(**times: float) -> Times:
        timer = Times(**times)
        monkeypatch.setattr(ways, 'CHOICES', Choices(timer))
        return timer

    monkeypatch.setattr(measured, 'is_timed', lambda device: True)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    return install


def make(batch=2, height=9, width=7, padding='full', backend=None, dtype=torch.float64) -> Call:
    """A call of an operator with 3 channels, M = 9, N = 3."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((batch, 3, height, width), (3, 3, 3, 3)))
    return Call(x, weight, released_wiring('sw', 3, 9, 3, 2), None, 9, padding, backend)


# choices as such

def test_the_fastest_candidate_is_kept_and_none_is_run_again():
    choices, runs = Choices(own_time), Counter()

    def candidates():
        def take(name, time):
            runs[name] += 1
            return time
        return {name: partial(take, name, time) for name, time in (('slow', 3.), ('fast', 1.), ('middling', 2.))}

    for _ in range(3):
        answer = choices.fastest(LAYER, SIZE, CPU, candidates)
        assert answer.name == 'fast' and '3 that were timed on a device at 2 x 8 x 8' in answer.reason
    assert runs == dict.fromkeys(('slow', 'fast', 'middling'), 1 + ROUNDS)
    # another dtype or direction is another question
    for other in (LAYER._replace(dtype='float16'), LAYER._replace(direction='backward')):
        assert choices.fastest(other, SIZE, CPU, lambda: {'slow': lambda: 3.}).name == 'slow'


def test_the_median_counts_and_not_the_first_run():
    times = iter([100., 50., 1., 1., 50., 1.])
    assert ROUNDS == 5
    choices = Choices(own_time)
    assert choices.fastest(LAYER, SIZE, CPU, lambda: {'a': lambda: 2., 'b': lambda: next(times)}).name == 'b'


def test_a_candidate_without_room_is_dropped_and_without_any_nobody_chooses():
    choices = Choices(own_time)
    later = iter([1., 1.])
    answer = choices.fastest(LAYER, SIZE, CPU, lambda: {
        'huge': out_of_memory, 'grows': lambda: next(later, None) or out_of_memory(), 'fits': lambda: 7.})
    assert answer.name == 'fits'
    larger = Size(64, 8, 8)
    for _ in range(2):
        assert choices.fastest(LAYER, larger, CPU, lambda: {'huge': out_of_memory}) is None
    assert [record['way'] for record in choices.records()] == ['fits', None]
    with pytest.raises(RuntimeError, match='broken'):
        choices.fastest(LAYER, Size(1, 1, 1), CPU, lambda: {'a': lambda: (_ for _ in ()).throw(RuntimeError('broken'))})


def test_beyond_some_sizes_the_nearest_of_them_decides():
    choices = Choices(own_time)
    for index in range(MOST_SIZES):
        choices.fastest(LAYER, Size(1, 10 * 2 ** index, 10), CPU, lambda index=index: {f'at {index}': lambda: 1.})

    def none_is_timed():
        raise AssertionError

    for height, nearest in ((10, 0), (11, 0), (19, 1), (38, 2), (10 ** 6, MOST_SIZES - 1)):
        answer = choices.fastest(LAYER, Size(1, height, 10), CPU, none_is_timed)
        assert answer.name == f'at {nearest}'
        assert ('the nearest size' in answer.reason) == (height != 10)
    assert choices.fastest(LAYER._replace(channels=4), Size(1, 11, 10), CPU, lambda: {'own': lambda: 1.}).name == 'own'


def test_a_file_gives_choices_back_to_a_process_that_would_time_otherwise(tmp_path, monkeypatch):
    file = tmp_path / 'choices.json'
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(file))
    first = Choices(own_time)
    assert first.records() == []
    for layer in (LAYER, LAYER._replace(direction='backward')):
        first.fastest(layer, SIZE, CPU, lambda: {'a': lambda: 1., 'b': lambda: 2.})
    second = Choices(own_time)
    assert second.fastest(LAYER, SIZE, CPU, lambda: {'a': lambda: 2., 'b': lambda: 1.}).name == 'a'
    assert second.records() == first.records() == json.loads(file.read_text())
    assert first.records()[0] == {
        'device': 'a device', 'dtype': 'float32', 'direction': 'forward', 'padding': 'full', 'channels': 3,
        'focus_length': 9, 'kernel_size': 3, 'batch': 2, 'height': 8, 'width': 8, 'way': 'a',
        'milliseconds': {'a': 1., 'b': 2.}}
    assert [path.name for path in tmp_path.iterdir()] == ['choices.json']


def test_every_rank_but_the_first_writes_a_file_of_its_own_and_starts_from_the_firsts(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / 'choices.json'))
    Choices(own_time).fastest(LAYER, SIZE, CPU, lambda: {'a': lambda: 1.})
    monkeypatch.setenv('RANK', '3')
    choices, larger = Choices(own_time), Size(4, 8, 8)
    assert choices.fastest(LAYER, SIZE, CPU, lambda: {'b': lambda: 1.}).name == 'a'
    assert choices.fastest(LAYER, larger, CPU, lambda: {'b': lambda: 1.}).name == 'b'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['choices.json', 'choices.rank3.json']
    assert [record['way'] for record in Choices().records()] == ['a', 'b']
    monkeypatch.setenv('RANK', '0')
    assert [record['way'] for record in Choices().records()] == ['a']


@pytest.mark.parametrize('held', ['{', '3', '[{"device": "x"}]', '[[]]'])
def test_a_file_of_something_else_is_an_error_that_names_it(held, tmp_path, monkeypatch):
    (tmp_path / 'other.json').write_text(held)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / 'other.json'))
    choices = Choices(own_time)
    for _ in range(2):
        with pytest.raises(ValueError, match=f'other.json, which {ENVIRONMENT_VARIABLE} names'):
            choices.fastest(LAYER, SIZE, CPU, lambda: {'a': lambda: 1.})
    assert (tmp_path / 'other.json').read_text() == held


# the operator

@pytest.mark.parametrize('way', ['toeplitz', 'merged', 'channels_last'])
def test_the_operator_is_computed_by_the_fastest_way_once_for_each_direction(way, timed):
    call = make()
    timer = timed(**{way: 1.})
    inputs = [call.x.clone().requires_grad_(), call.weight.clone().requires_grad_()]
    for _ in range(2):
        branches = shiftwise_conv2d(*inputs, call.wiring, call.focus_length)
        gradients = torch.autograd.grad(sum(branch.cos().sum() for branch in branches), inputs)
    runs = 2 * (1 + ROUNDS)
    assert timer.runs == {'toeplitz': 4 * runs, 'merged': runs, 'channels_last': runs}
    for backward in (False, True):
        choice = choose_way(call, backward)
        assert choice.way is WAYS[way] and 'the fastest of 6' in choice.reason
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ways.ENVIRONMENT_VARIABLE, 'shift')
        wanted = shiftwise_conv2d(*inputs, call.wiring, call.focus_length)
        wanted_gradients = torch.autograd.grad(sum(branch.cos().sum() for branch in wanted), inputs)
    assert_all_close([*branches, *gradients], [*wanted, *wanted_gradients], rtol=1e-10, atol=1e-10)


def test_a_block_that_is_the_fastest_is_what_runs(timed, monkeypatch):
    call, blocks = make(), []
    forward = WAYS['toeplitz'].forward
    row = WAYS['toeplitz']._replace(forward=lambda call, block=None: (blocks.append(block), forward(call, block))[1])
    monkeypatch.setitem(WAYS, 'toeplitz', row)
    ways._timed_ways.cache_clear()
    try:
        timed()
        ways.CHOICES.timer = lambda function, device: (function(), 1. if blocks[-1:] == [4] else 2.)[1]
        assert choose_way(call).way.name == 'toeplitz'
        assert set(blocks) == {None, *row.blocks}
        blocks.clear()
        choose_way(call).way.forward(call)
        assert blocks == [4]
    finally:
        ways._timed_ways.cache_clear()


def test_only_ways_that_nothing_hinders_are_timed(timed):
    timer = timed(merged=1., channels_last=1.)
    assert choose_way(make(padding='same')).way.name == 'toeplitz'
    assert set(timer.runs) == {'toeplitz'}
    timer.runs.clear()
    choose_way(make(dtype=torch.bfloat16))
    assert set(timer.runs) == {'toeplitz', 'merged'}  # oneDNN stands in for cuDNN here


def test_with_no_memory_for_any_way_the_table_decides(timed):
    timed()
    ways.CHOICES.timer = lambda function, device: out_of_memory()
    assert 'timed' not in choose_way(make()).reason


@pytest.mark.parametrize('way', ['quantum', 'channels_last'])
def test_a_choice_from_a_file_that_cannot_be_followed_is_an_error(way, timed, tmp_path, monkeypatch):
    timed(merged=1.)
    call = make()
    choose_way(call)
    record = {**ways.CHOICES.records()[0], 'milliseconds': {way: 1.}}
    half = {**record, 'dtype': 'bfloat16'}
    (tmp_path / 'choices.json').write_text(json.dumps([record, half]))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / 'choices.json'))
    timed()
    with pytest.raises(ValueError, match=f"'{way}' of {ENVIRONMENT_VARIABLE} cannot be followed"):
        choose_way(make(dtype=torch.bfloat16))


def nothing_to_change(patch) -> None:
    """Timing is on already."""


@pytest.mark.parametrize('change, may', [
    (nothing_to_change, True),
    (lambda patch: patch.setattr(torch.backends.cudnn, 'benchmark', False), False),
    (lambda patch: patch.setattr(torch, 'are_deterministic_algorithms_enabled', lambda: True), False),
    (lambda patch: patch.setattr(torch.compiler, 'is_compiling', lambda: True), False),
])
def test_timing_is_for_benchmark_mode_and_neither_deterministic_nor_compiled(change, may, timed, monkeypatch):
    timer = timed(channels_last=1.)
    change(monkeypatch)
    call = make()
    assert may_measure(call.x) is may
    assert ('timed' in choose_way(call).reason) is may is bool(timer.runs)


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    x = torch.Tensor.__new__(type('OnAGpu', (torch.Tensor,), {'device': torch.device('cuda')}))
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda capturing=capturing: capturing)
        assert may_measure(x) is not capturing


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_cpus_and_tensors_without_values_are_not_timed(device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    assert not may_measure(torch.empty(1, device=device))


def test_fake_tensors_are_not_timed(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    with FakeTensorMode():
        assert not may_measure(torch.empty(1, device='cuda'))


def test_what_is_asked_for_is_not_timed(timed, monkeypatch):
    timer = timed()
    assert 'the backend argument' in choose_way(make(backend='torch')).reason
    monkeypatch.setenv(BACKEND_VARIABLE, 'torch')
    assert BACKEND_VARIABLE in choose_way(make()).reason
    monkeypatch.setenv(ways.ENVIRONMENT_VARIABLE, 'shift')
    assert choose_way(make()).way.name == 'shift'
    assert not timer.runs


# the merged form

@pytest.mark.parametrize('form', merged._FORMS)
def test_the_merged_form_is_the_fastest_and_all_are_equal(form, monkeypatch):
    layer = ShiftwiseConv2d(6, 9, 3, num_shuffles=2, ghost_ratio=.4, dtype=torch.float64).eval().fuse()
    x = torch.randn(2, 6, 9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    arguments = x, layer.tall.weight, layer.tall.bias, layer.wide.weight, layer.num_worked
    choices = Choices(lambda function, device: (function(), 1. if function.func is merged._FORMS[form] else 2.)[1])
    monkeypatch.setattr(merged, 'CHOICES', choices)
    with torch.no_grad():
        assert merged._fastest_form(*arguments) is merged._FORMS[form]
        torch.testing.assert_close(merged._FORMS[form](*arguments), layer(x), rtol=1e-10, atol=1e-10)
    record, = choices.records()
    assert (record['direction'], record['way']) == ('merged', form)
    choices.timer = lambda function, device: out_of_memory()
    assert merged._fastest_form(x[:1], *arguments[1:]) is merged._as_products
    monkeypatch.setattr(Choices, 'fastest', lambda *arguments: measured.Answer('quantum', ''))
    with pytest.raises(ValueError, match=f"'quantum' of {ENVIRONMENT_VARIABLE} cannot be followed: .*channels_last"):
        merged._fastest_form(*arguments)


def test_a_profile_says_that_a_way_was_timed(timed):
    timed(channels_last=1.)
    assert {stage.way.name for stage in profile_model('test_sw').stages} == {'channels_last'}


def test_the_command_reads_choices_from_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / 'choices.json'))
    choices = Choices(own_time)
    choices.fastest(LAYER, SIZE, CPU, lambda: {'toeplitz, block 4': lambda: .25, 'merged': lambda: 2.})
    choices.fastest(LAYER, Size(99, 8, 8), CPU, lambda: {'merged': out_of_memory})
    for argv in ([], ['--format', 'json']):
        monkeypatch.setattr(measured, 'CHOICES', Choices(own_time))
        assert main(['profile', 'test_sw', *argv]) == 0
        shown = capsys.readouterr().out
        if argv:
            assert json.loads(shown)['timed_ways'] == choices.records()
        else:
            first, second = (' '.join(line.split()) for line in shown.splitlines() if 'a device' in line)
            assert first == 'forward a device float32 full 2 x 3 x 8 x 8 9 3 toeplitz, block 4 0.250 2.000'
            assert second.endswith('99 x 3 x 8 x 8 9 3 no memory')
    (tmp_path / 'choices.json').write_text('nothing')
    monkeypatch.setattr(measured, 'CHOICES', Choices(own_time))
    assert main(['profile', 'test_sw']) == 2
    assert 'choices.json' in capsys.readouterr().err

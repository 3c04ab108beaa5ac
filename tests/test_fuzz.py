"""Calls drawn at random, and that the drawing would notice what it looks for."""
import ctypes
import os
import signal

import pytest
import torch
from fuzz import calls
from fuzz.__main__ import fuzz
from fuzz.memory import place


@pytest.fixture
def own_threads():
    """Give PyTorch back its threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_no_call_is_wrong_and_none_crashes(needs_taichi):
    summary = fuzz(calls=500, seed=0)
    assert summary.failures == []
    assert summary.counts.total() == 500 and min(summary.counts[name] for name in ('right', 'refused')) > 100


def test_images_of_every_width_and_kernels_of_every_size_are_drawn():
    settings = [calls.draw_setting(16, number) for number in range(20)]
    assert {width % 16 for setting in settings for width in setting.widths} == set(range(16))
    assert {setting.kernel_size for setting in settings} == set(range(1, calls.LARGEST_SIZE + 1))
    assert {setting.threads for setting in settings} == {1, 2}


def test_what_is_wrong_and_what_is_not_refused_is_told(monkeypatch, own_threads):
    operator = calls.OPERATORS['raw shift_add']

    def careless(backend, y, wiring, padding, **arguments):
        if y.ndim != 4 or y.is_complex() or wiring.shape[2] % 2 == 0:
            return ()
        padding = padding or 'full'
        return tuple(1.5 * branch for branch in operator.reference(
            y=y, wiring=wiring.long().clamp(0, 0), padding=padding, **arguments))

    monkeypatch.setattr(calls, 'OPERATORS', {'raw shift_add': operator._replace(call=careless)})
    outcomes = [calls.make_call(0, number) for number in range(60)]
    assert sum('is off by' in outcome for outcome in outcomes) > 20
    assert sum('not refused' in outcome or 'Error' in outcome for outcome in outcomes) > 2


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system cannot fork')
@pytest.mark.parametrize('guard, beside', [('behind', 8), ('before', -1)])
def test_reading_past_the_end_that_is_guarded_kills_and_on_the_tensor_does_not(guard, beside):
    values = torch.arange(8, dtype=torch.uint8)
    tensor = place(values, [1], 0, guard)
    assert torch.equal(tensor, values)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.string_at(tensor.data_ptr() + beside, 1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGSEGV


@pytest.mark.parametrize('guard', [None, 'behind', 'before'])
@pytest.mark.parametrize('strides', [[12, 4, 1], [1, 2, 6], [24, 8, 2], [0, 4, 1], [16, 5, 1]])
def test_values_lie_where_strides_and_offset_say(strides, guard):
    values = torch.arange(24.).view(2, 3, 4)
    tensor = place(values, strides, 3, guard)
    assert list(tensor.stride()) == strides and tensor.storage_offset() == 3
    assert torch.equal(tensor, values[:1].expand(2, 3, 4) if strides[0] == 0 else values)

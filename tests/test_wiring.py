"""Which channels are worked on, and which small kernel lies at every place: fixed draws that disturb nobody."""
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from timm_shiftwise.geometry import num_groups
from timm_shiftwise.layers import ShiftwiseConv2d
from timm_shiftwise.layers.wiring import num_maps, released_wiring, split_ghost, stream_order

TABLES = [('sw', 5, 51, 5, 4), ('sw', 1, 7, 3, 1), ('p_sw', 4, 13, 5, 2), ('eq_slak', 3, 9, 4, 1), ('sw', 2, 1, 1, 3)]
each_table = pytest.mark.parametrize('operator, channels, focus_length, kernel_size, shuffles', TABLES)
SPLITS = [(96, .23, 'v1'), (80, .23, 'v2'), (7, .5, 'v1'), (9, .3, 'v2'), (5, 0., 'v1')]
each_split = pytest.mark.parametrize('dim, ratio, rule', SPLITS)


@each_table
def test_a_table_holds_the_kernel_at_every_place(operator, channels, focus_length, kernel_size, shuffles):
    table = released_wiring(operator, channels, focus_length, kernel_size, shuffles)
    groups, maps = num_groups(focus_length, kernel_size), num_maps(operator, focus_length, kernel_size)
    assert table.dtype == torch.int32
    assert table.shape == (shuffles, channels, 2 * groups + 1)
    assert table.min() >= 0 and table.max() < maps
    wide, tall, centre = table.split([groups, groups, 1], dim=2)
    if operator == 'eq_slak':  # kernels of each branch's own in natural order
        assert table.equal(torch.arange(maps, dtype=torch.int32).expand_as(table))
        return
    natural = torch.arange(groups, dtype=torch.int32).expand_as(wide)
    assert wide.sort(dim=2).values.equal(natural) and tall.sort(dim=2).values.equal(natural)
    assert wide.equal(natural) == (operator == 'p_sw' or groups == 1)
    assert wide.equal(tall) == (groups == 1), 'each branch has orders of its own'
    assert centre.unique().numel() <= groups


def test_a_table_is_the_same_in_every_process_and_call():
    code = (
        'from timm_shiftwise.layers.wiring import released_wiring, stream_order\n'
        f'print([released_wiring(*args).tolist() for args in {TABLES}])\n'
        f'print([stream_order(*args).tolist() for args in {SPLITS}])\n')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    tables = [released_wiring(*args).tolist() for args in TABLES]
    assert done.stdout.splitlines() == [str(tables), str([stream_order(*args).tolist() for args in SPLITS])]
    released_wiring.cache_clear()
    assert [released_wiring(*args).tolist() for args in TABLES] == tables


def test_drawing_tables_neither_reads_nor_changes_the_global_random_state():
    drawn = []
    for seed in (1, 2):
        released_wiring.cache_clear()
        split_ghost.cache_clear()
        stream_order.cache_clear()
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
        drawn.append([*(released_wiring(*args) for args in TABLES), *(stream_order(*args) for args in SPLITS)])
        after = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert all(torch.equal(first, second) for first, second in zip(*drawn, strict=True))


def test_a_table_is_real_whatever_the_default_device_is():
    released_wiring.cache_clear()
    split_ghost.cache_clear()
    with torch.device('meta'):
        table, worked = released_wiring(*TABLES[0]), split_ghost(*SPLITS[0])[0]
    assert table.device.type == worked.device.type == 'cpu'


def test_a_layer_has_a_table_of_its_own():
    first, second = (ShiftwiseConv2d(4, 7, 3, num_shuffles=2) for _ in range(2))
    first.wiring.zero_()
    assert second.wiring.any() and second.wiring.equal(second.released_tables()['wiring'])
    assert first.released_tables()['built_for'].tolist() == [7, 3, 2]


@each_split
def test_channels_are_worked_on_or_ghosts_and_the_order_has_the_ghosts_last(dim, ratio, rule):
    worked, ghosts = split_ghost(dim, ratio, rule)
    assert worked.dtype == ghosts.dtype == torch.int64
    assert worked.equal(worked.sort().values) and ghosts.equal(ghosts.sort().values)
    assert len(ghosts) == (int(dim * ratio) if rule == 'v1' else dim - int(dim * (1 - ratio)) // 2 * 2)
    order = stream_order(dim, ratio, rule)
    assert order.equal(torch.cat([worked, ghosts]))
    assert order.sort().values.equal(torch.arange(dim))
    if ratio == 0:
        assert order.equal(torch.arange(dim))


@pytest.mark.parametrize('function, arguments, message', [
    (split_ghost, (8, 1., 'v1'), 'below 1, got 1.0'),
    (split_ghost, (8, -.1, 'v1'), 'got -0.1'),
    (split_ghost, (8, .5, 'v3'), "'v3'"),
    (split_ghost, (1, .3, 'v2'), 'none of 1 channels'),
    (released_wiring, ('sw', 4, 7, 3, 0), 'at least 1, got 0'),
    (released_wiring, ('eq_slak', 4, 7, 3, 2), "must be 1 for operator 'eq_slak', got 2"),
])
def test_what_cannot_be_drawn_is_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)

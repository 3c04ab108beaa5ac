"""What is estimated of a GPU that is not at hand: the work of calls, the table of the operators, and the command."""
import csv
import io
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, TWO_STAGES, each_family, merged

from timm_shiftwise.cli import main
from timm_shiftwise.profile.estimate import ACCELERATORS, BASELINE, LAUNCH, Work, WorkCounter, estimate_model

# a training step of one operator of sw_tiny's stages, batch 128, bfloat16, in ms, worked out by hand from what it
# multiplies, copies and launches at 1.6 / 2.7 TB/s, 140 / 320 TFLOP/s and 1.0 / 1.5 T depthwise multiply-adds/s
BY_HAND = {
    'a100': dict(merged=(30.1, 10.5, 3.1, 1.2)),
    'h100': dict(merged=(20., 7., 2.2, .9)),
}


def works(function) -> list[Work]:
    """The work of every call in a function."""
    with WorkCounter() as counter:
        function()
    return counter.works


def meta(*shape: int, **kwargs) -> torch.Tensor:
    """A tensor without values."""
    return torch.empty(*shape, device='meta', **kwargs)


@pytest.mark.parametrize('on', BY_HAND)
def test_operators_take_what_was_worked_out_by_hand_within_a_fifth(on):
    estimate = estimate_model(timm.create_model('sw_tiny', device='meta'), on)
    for way, wanted in BY_HAND[on].items():
        seen = [stage.ways_ms[way] / stage.layers for stage in estimate.stages]
        assert seen == pytest.approx(wanted, rel=.2), way
    assert [stage.layers for stage in estimate.stages] == [3, 3, 9, 3]


def test_products_are_those_that_are_worked_out_by_hand():
    call, = works(lambda: meta(3, 4) @ meta(4, 5))
    assert call == Work(3 * 4 * 5, 0, 4 * (12 + 20 + 15), 0, half=False)
    x, weight = meta(2, 6, 9, 7, dtype=torch.float16), meta(8, 6, 3, 1, dtype=torch.float16)
    call, = works(lambda: F.conv2d(x, weight))
    assert (call.products, call.depthwise, call.half) == (2 * 8 * 7 * 7 * 6 * 3, 0, True)


@pytest.mark.parametrize('side, length', [((5, 7), (3, 1)), ((4, 3), (5, 9)), ((1, 1), (3, 3))])
def test_depthwise_multiply_adds_are_those_that_meet_the_map(side, length):
    kernel = torch.ones(3, 1, *length)
    x = torch.ones(2, 3, *side)
    wanted = int(F.conv2d(x, kernel, padding=[n // 2 for n in length], groups=3).sum())

    def step() -> None:
        image, weight = (tensor.to('meta').requires_grad_() for tensor in (x, kernel))
        F.conv2d(image, weight, padding=[n // 2 for n in length], groups=3).sum().backward()

    assert sum(call.depthwise for call in works(step)) == 3 * wanted  # and the gradients of the map and of the kernel
    assert not any(call.products for call in works(step))


def test_views_cost_nothing_and_copies_by_whether_they_change_the_order():
    x = meta(4, 6)
    assert works(lambda: x.T[1:].unsqueeze(0).expand(5, -1, -1)) == []
    in_order, = works(x.clone)
    turned, = works(lambda: x.T.contiguous())
    assert (in_order.streamed, in_order.permuted) == (turned.permuted, turned.streamed) == (192, 0)
    for call in (in_order, turned):
        assert ACCELERATORS['a100'].seconds(call) > LAUNCH
    # rows of an unfolded map overlap, and are read from memory once
    windows, = works(lambda: meta(10).unfold(0, 8, 1).contiguous())
    assert windows.streamed == 4 * (10 + 24)


@each_family
def test_every_family_is_estimated_in_training_and_merged(family):
    model = timm.create_model(FAMILIES[family], **TWO_STAGES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    estimate = estimate_model(model, 'a100', batch_size=4, dtype='float32', img_size=(48, 32))
    assert len(estimate.stages) == (0 if family == 'slak' else 2)
    assert all(stage.way in stage.ways_ms and stage.ways_ms[stage.way] > 0 for stage in estimate.stages)
    assert estimate.ours.step_ms > 4 * estimate.ours.image_ms > 0
    after = model.state_dict()
    assert model.training and all(torch.equal(value, after[name]) for name, value in before.items())
    inference = estimate_model(merged(model), 'a100', batch_size=4, dtype='float32', img_size=(48, 32))
    assert (inference.stages, inference.ours.step_ms) == ((), None)
    assert inference.ours.image_ms == pytest.approx(estimate.ours.image_ms, rel=.05)


def test_the_network_beside_it_is_plausible_and_faster_hardware_is_faster():
    model = timm.create_model('test_sw', device='meta')
    steps = [estimate_model(model, on, img_size=224).baseline.step_ms for on in ('a100', 'h100', 'h200')]
    assert steps == sorted(steps, reverse=True)
    assert 70 < steps[0] < 130 and 40 < steps[1] < 70  # about 100 and 55 are told of


@pytest.mark.parametrize('arguments, message', [
    (dict(on='k80'), "on must be one of a100, h100, .* got 'k80'"),
    (dict(dtype='int8'), "dtype must be one of bfloat16, float16, float32, got 'int8'"),
    (dict(batch_size=0), 'batch_size must be at least 1, got 0'),
    (dict(img_size=(0, 3)), 'img_size'),
])
def test_what_cannot_be_estimated_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate_model(timm.create_model('test_sw', device='meta'), **{'on': 'a100', **arguments})


def test_the_command_says_estimated_in_every_format(capsys):
    command = ['profile', 'test_sw', '--on', 'h100', '--batch-size', '2', '--dtype', 'float16']
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert 'Estimated, not measured: NVIDIA H100 SXM, batch 2, all in float16' in shown
    assert ACCELERATORS['h100'].assumptions() in shown and BASELINE in shown
    assert main([*command, '--format', 'json']) == 0
    estimated = json.loads(capsys.readouterr().out)['estimated']
    assert (estimated['batch_size'], estimated['dtype'], len(estimated['stages'])) == (2, 'float16', 4)
    assert main([*command, '--format', 'csv']) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert float(rows[1]['estimated_merged_ms']) == estimated['stages'][0]['ways_ms']['merged']
    assert float(rows[-1]['estimated_step_ms']) == estimated['ours']['step_ms']
    assert float(rows[-1][f'estimated_{BASELINE}_step_ms']) == estimated['baseline']['step_ms']
    assert rows[0]['estimated_step_ms'] == ''
    assert main(['profile', 'test_sw', '--dtype', 'float16']) == 2
    assert '--on' in capsys.readouterr().err

"""What a network costs: the paper's arithmetic, real networks, other counters, and the command."""
import csv
import io
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_shiftwise.cli import main
from timm_shiftwise.geometry import num_groups, small_padding
from timm_shiftwise.models.variants import SHIFTWISE, SHIFTWISE_V2
from timm_shiftwise.profile import Comparison, Cost, kernel_ratio, profile_model
from timm_shiftwise.profile.cost import large_kernels, small_kernels
from timm_shiftwise.profile.timing import take_turns, time_operators
from timm_shiftwise.sparsity.masks import random_mask, uniform_counts

PAPER_LENGTHS = (51, 49, 45, 13, 5)
PAPER_RATIOS = [1.85, 1.96, 2.0, 1.73, 2.0]
SMALL = dict(depths=(1, 2, 1), dims=(12, 16, 24), focus_lengths=(15, 13, 6), num_classes=7)
FAMILIES = {
    'slak': ('slak_tiny', SMALL),
    'eq_slak': ('eq_slak_tiny', SMALL),
    'p_sw': ('p_sw_tiny', SMALL),
    'p2_sw': ('p2_sw_tiny', SMALL),
    'sw': ('sw_tiny', SMALL),
    'sw_v2': ('sw_v2_tiny', SMALL),
}
each_family = pytest.mark.parametrize('family', FAMILIES)
each_family_of_groups = pytest.mark.parametrize('family', [name for name in FAMILIES if name != 'slak'])
each_network = pytest.mark.parametrize('name', [*SHIFTWISE, *SHIFTWISE_V2])


def build(family: str, **kwargs) -> nn.Module:
    """A small network of a family."""
    name, args = FAMILIES[family]
    return timm.create_model(name, **{**args, **kwargs})


def prune(model: nn.Module, density: float) -> int:
    """Prune groups at random, in each layer another share around the density; return how many are kept."""
    kept = 0
    blocks = [block for stage in model.stages for block in stage.blocks]
    for index, block in enumerate(blocks):
        mask = block.conv_dw.group_mask
        count = max(1, int(mask[0].numel() * density) - index)
        mask.copy_(random_mask(tuple(mask.shape[1:]), count, 0, 0, index))
        kept += count
    return kept


def counted(model: nn.Module, height: int, width: int) -> int:
    """Multiply-adds of convolutions and matrix products as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.eval()(torch.empty(1, 3, height, width, device='meta'))
    return counter.get_total_flops() // 2


def run_json(capsys, *argv: str) -> dict:
    """What a command prints as JSON, and nothing else."""
    assert main([*argv, '--format', 'json']) == 0
    return json.loads(capsys.readouterr().out)


# the arithmetic

def test_the_ratio_list_is_the_papers():
    assert [round(kernel_ratio(length, 5), 2) for length in PAPER_LENGTHS] == PAPER_RATIOS


def test_the_command_gives_the_papers_ratio_list(capsys):
    lengths = f'focus_lengths={",".join(map(str, PAPER_LENGTHS))}'
    profile = run_json(
        capsys, 'profile', 'p_sw_tiny', '--model-kwargs', lengths, 'depths=1,1,1,1,1', 'dims=8,8,8,8,8')
    assert [round(stage['depthwise']['parameter_ratio'], 2) for stage in profile['stages']] == PAPER_RATIOS
    assert [round(stage['kernel_ratio'], 2) for stage in profile['stages']] == PAPER_RATIOS


@pytest.mark.parametrize('arguments', [(0, 5, None), (51, 0, None), (51, 5, 0)])
def test_a_kernel_ratio_of_nothing_is_an_error(arguments):
    with pytest.raises(ValueError, match='at least 1'):
        kernel_ratio(*arguments)


def test_costs_worked_by_hand():
    # one channel, M = 7, N = 3, so G = 3; map of 5 x 4; maps of small convolutions 7 x 6
    assert large_kernels(1, 7, 3, 5, 4) == Cost(42 + 9, 42, (42 + 9) * 20)
    assert large_kernels(1, 7, 3, 5, 4, merged=True) == Cost(42, 42, 42 * 20)
    assert small_kernels(1, 3, 3, 7, 3, 5, 4) == Cost(27, 27, 27 * 42, (2 * 3 + 1) * 20)
    # two paths and four shuffles, one of three groups kept; then p = N // 2, whose maps are 5 x 4
    assert small_kernels(1, 3, 1, 7, 3, 5, 4, paths=2, shuffles=4) == Cost(54, 9, 9 * 42, (4 * 2 + 4) * 20)
    assert small_kernels(1, 3, 1, 7, 3, 5, 4, padding='same') == Cost(27, 9, 9 * 20, (2 + 1) * 20)


def test_ratios_are_of_slak_to_ours_and_infinite_for_nothing():
    comparison = Comparison(Cost(10, 5, 4), Cost(30, 20, 2))
    assert (comparison.parameter_ratio, comparison.multiply_add_ratio) == (4., .5)
    assert Comparison(Cost(), Cost(1, 1, 1)).parameter_ratio == float('inf')


# real networks

@each_network
def test_total_parameters_are_the_models_own(name):
    model = timm.create_model(name, device='meta')
    assert profile_model(model).whole.ours.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize('name, parameters, slak', [
    ('sw_tiny', 30_231_064, 30_816_232),
    ('sw_small', 54_215_992, 55_568_104),
    ('sw_base', 93_920_502, 95_717_352),
    ('eq_slak_tiny', 50_920_798, 50_703_838),
    ('slak_base', 157_950_792, 157_950_792),
    ('sw_v2_tiny', 31_790_260, None),
])
def test_parameters_are_those_of_the_authors_networks(name, parameters, slak):
    whole = profile_model(name).whole
    assert whole.ours.parameters == parameters
    assert slak is None or whole.slak.parameters == slak


@each_family
def test_slak_at_the_same_width_is_the_network_with_large_kernels(family):
    profile = profile_model(build(family))
    reference = build(family)
    for stage in reference.stages:
        for block in stage.blocks:
            dim = block.mlp.fc1.weight.shape[1]
            length, size = block.conv_dw.focus_length, block.conv_dw.kernel_size
            kernels = [nn.Conv2d(dim, dim, side, groups=dim, bias=False) for side in (
                (size, length), (length, size), (size, size))]
            block.conv_dw = nn.ModuleList([*kernels, *(nn.BatchNorm2d(dim) for _ in kernels)])
    assert profile.whole.slak.parameters == sum(parameter.numel() for parameter in reference.parameters())


@each_network
def test_multiply_adds_beside_the_operators_are_those_that_pytorch_counts(name):
    model = timm.create_model(name, device='meta')
    profile = profile_model(model, img_size=(224, 160))
    for stage in model.stages:
        for block in stage.blocks:
            block.conv_dw = nn.Identity()
    beside = profile.whole.ours.multiply_adds - profile.depthwise.ours.multiply_adds
    assert beside == counted(model, 224, 160)
    assert beside == profile.whole.slak.multiply_adds - profile.depthwise.slak.multiply_adds


@pytest.mark.parametrize('name', ['slak_tiny', 'slak_base'])
def test_multiply_adds_of_slak_are_those_that_pytorch_counts(name):
    model = timm.create_model(name, device='meta')
    assert profile_model(model).whole.ours.multiply_adds == counted(model, 224, 224)


@each_family_of_groups
def test_multiply_adds_of_small_kernels_are_those_that_pytorch_counts(family):
    model = build(family, device='meta')
    profile = profile_model(model, img_size=(64, 96))
    for stage, measured in zip(model.stages, profile.stages, strict=True):
        operator = stage.blocks[0].conv_dw
        weight = operator.kernels.sum(0).flatten(0, 1).unsqueeze(1)
        x = torch.empty(1, len(weight) // operator.num_maps, measured.height, measured.width, device='meta')
        with FlopCounterMode(display=False) as counter:
            F.conv2d(x, weight, padding=small_padding(operator.kernel_size, operator.padding), groups=x.shape[1])
        assert measured.depthwise.ours.multiply_adds == measured.blocks * counter.get_total_flops() // 2


@each_family
def test_maps_have_the_size_that_the_network_makes(family):
    model = build(family)
    sizes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[2:])))
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 3, 71, 50))
    profile = profile_model(model, img_size=(71, 50))
    assert [(stage.height, stage.width) for stage in profile.stages] == sizes


# sparsity

@each_family_of_groups
def test_measured_groups_are_those_of_the_masks(family):
    model = build(family)
    kept = prune(model, .6)
    profile, dense = profile_model(model), profile_model(build(family))
    area = profile.kernel_size ** 2
    assert (profile.kept, profile.sparsity) == (kept, 'measured')
    assert profile.depthwise.ours.kept_parameters == kept * area
    assert dense.whole.ours.kept_parameters - profile.whole.ours.kept_parameters == (dense.kept - kept) * area
    assert profile.whole.ours.parameters == dense.whole.ours.parameters
    per_group = dense.stages[0].depthwise.ours.multiply_adds / dense.stages[0].kept
    assert profile.stages[0].depthwise.ours.multiply_adds == per_group * profile.stages[0].kept


@each_family_of_groups
def test_a_given_sparsity_prunes_every_layer_alike(family):
    model = build(family)
    shares = [.9, .5, .2]
    profile = profile_model(model, sparsity=shares)
    wanted = [
        sum(uniform_counts([block.conv_dw.kept_groups().numel()], share)[0] for block in stage.blocks)
        for stage, share in zip(model.stages, shares, strict=True)
    ]
    assert [stage.kept for stage in profile.stages] == wanted
    assert profile.sparsity == 'given'
    assert profile_model(model, sparsity=.5).stages[1] == profile.stages[1]


def test_every_layer_keeps_a_group():
    assert all(stage.kept == stage.blocks for stage in profile_model(build('sw'), sparsity=.9999).stages)


def test_at_the_density_of_slaks_parameters_the_ratio_is_one():
    dense = profile_model('p_sw_tiny')
    assert dense.depthwise.parameter_ratio == pytest.approx(1.87, abs=.01)
    sparse = profile_model('p_sw_tiny', sparsity=.5)
    assert sparse.depthwise.parameter_ratio == pytest.approx(2 * dense.depthwise.parameter_ratio, rel=1e-3)


# merged networks

@each_family
def test_a_merged_network_costs_what_it_holds_and_runs(family):
    model = build(family)
    kept = 0 if family == 'slak' else prune(model, .5)
    merged = reparameterize_model(model)
    profile = profile_model(merged, img_size=64)
    operators = [block.conv_dw for stage in merged.stages for block in stage.blocks]
    held = sum(value.numel() for operator in operators for value in operator.buffers() if value.is_floating_point())
    assert profile.whole.ours.parameters == held + sum(parameter.numel() for parameter in merged.parameters())
    assert profile.kept == kept
    assert profile.merged
    runs_large = family != 'p2_sw'
    if runs_large:
        maps = [(stage.height * stage.width, stage.blocks) for stage in profile.stages]
        pixels = [pixels for pixels, blocks in maps for _ in range(blocks)]
        assert profile.depthwise.ours.multiply_adds == sum(
            (operator.tall.weight.numel() + operator.wide.weight.numel()) * area
            for operator, area in zip(operators, pixels, strict=True))
    assert (profile.depthwise.ours.additions == 0) == runs_large


def test_slak_beside_a_merged_network_is_merged():
    merged = reparameterize_model(build('slak'))
    ours = profile_model(reparameterize_model(build('p_sw')), img_size=64)
    # the last stage's M is even: merged large kernels have one column more
    slak = profile_model(merged, img_size=64)
    assert ours.stages[0].whole.slak == slak.stages[0].whole.ours
    assert ours.stages[1].depthwise.slak == slak.stages[1].depthwise.ours


# ways

def test_the_way_is_the_choosers_with_its_reason(monkeypatch):
    monkeypatch.setenv('TIMM_SHIFTWISE_WAY', 'shift')
    way = profile_model(build('p_sw')).stages[0].way
    assert way.name == 'shift'
    assert 'TIMM_SHIFTWISE_WAY' in way.reason
    monkeypatch.setenv('TIMM_SHIFTWISE_BACKEND', 'torch')
    assert 'PyTorch' in profile_model(build('p_sw')).stages[0].way.reason
    assert profile_model(build('slak')).stages[0].way.name == 'large'
    assert profile_model(reparameterize_model(build('p_sw'))).stages[0].way.name == 'merged'


@each_family_of_groups
@pytest.mark.usefixtures('needs_taichi')
def test_the_way_is_chosen_by_the_groups_that_are_kept(family, monkeypatch):
    for variable in ('TIMM_SHIFTWISE_WAY', 'TIMM_SHIFTWISE_BACKEND'):
        monkeypatch.delenv(variable, raising=False)
    model = build(family)
    for block in (block for stage in model.stages for block in stage.blocks):
        block.conv_dw.group_mask[:, :, 1:] = False  # one group of each channel
    dense, sparse = profile_model(build(family)), profile_model(model)
    given = profile_model(build(family), sparsity=1 - sparse.stages[0].density)
    for profile, share in ((dense, 1.), (sparse, 1 / model.stages[0].blocks[0].conv_dw.num_maps)):
        assert f'{share:.0%} of the groups are kept' in profile.stages[0].way.reason
    assert given.stages[0].way == sparse.stages[0].way
    assert '100% of the groups' not in sparse.stages[0].way.reason


# what is no cost

@pytest.mark.parametrize('arguments, message', [
    (dict(sparsity=1.), 'at least 0 and below 1, got 1.0'),
    (dict(sparsity=-.1), 'got -0.1'),
    (dict(sparsity=float('nan')), 'got nan'),
    (dict(sparsity=[.1, .2]), '3, one for each stage, got 2'),
    (dict(img_size=0), 'got 0'),
    (dict(img_size=(64, 64, 3)), 'one or two integers'),
    (dict(img_size=(64, 2.5)), 'one or two integers'),
    (dict(img_size=8), 'leaves 1 x 1|leaves 0 x 0 in stage 3'),
])
def test_what_is_out_of_range_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        profile_model(build('sw'), **arguments)


def test_large_kernels_have_no_groups_to_prune():
    with pytest.raises(ValueError, match='SLaK'):
        profile_model(build('slak'), sparsity=.4)
    assert profile_model(build('slak'), sparsity=0).sparsity == 'none'


def test_another_network_is_an_error():
    with pytest.raises(TypeError, match='Linear'):
        profile_model(nn.Linear(1, 1))


# timing

def test_operatorstake_turns():
    calls = []

    class Recorder(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append(self.name)
            return x

    times = take_turns([Recorder('a'), Recorder('b')], torch.zeros(1), repeats=3)
    assert calls[-6:] == ['a', 'b'] * 3
    assert [len(taken) for taken in times] == [3, 3]


@each_family
@pytest.mark.parametrize('merged', [False, True])
def test_every_operator_can_be_timed_and_stays_as_it_is(family, merged):
    model = reparameterize_model(build(family)) if merged else build(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    times = list(time_operators(model, [(9, 8), (5, 4), (3, 2)], densities=(1., .1), repeats=2))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [stage.stage for stage in times] == [1, 2, 3]
    for stage in times:
        as_fast_whatever_is_kept = family == 'slak' or (merged and family != 'p2_sw')
        assert [timed.density for timed in stage.operators] == ([1.] if as_fast_whatever_is_kept else [1., .1])
        for timed in stage.operators:
            assert timed.milliseconds > 0
            assert timed.ratio == stage.large_kernel_milliseconds / timed.milliseconds


@pytest.mark.parametrize('arguments', [
    dict(densities=()), dict(densities=(0.,)), dict(densities=(1.5,)), dict(batch_size=0), dict(repeats=0),
])
def test_timing_refuses_what_it_cannot_do(arguments):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=name):
        time_operators(build('sw'), [(9, 8), (5, 4), (3, 2)], **arguments)
    with pytest.raises(ValueError, match='sizes'):
        time_operators(build('sw'), [(9, 8)])


# the command

def test_the_table_shows_stages_and_totals(capsys):
    assert main(['profile', 'sw_tiny', '--sparsity', '0.9', '0.32', '0.28', '0.1']) == 0
    shown = capsys.readouterr().out
    assert '30,231,064 parameters' in shown
    assert '30,816,232 parameters' in shown
    assert '…' not in shown
    first_stage = next(line for line in shown.splitlines() if '74 of 96' in line)
    assert ' '.join(first_stage.split()) == (
        '1 74 of 96 51 11 56 x 56 10.0 % 1.85 6.08 k 147 k 24.18 21.9 M 483 M 22.09 8.88 M')


def test_json_is_what_the_function_returns(capsys):
    printed = run_json(capsys, 'profile', 'test_sw', '--sparsity', '.4', '--img-size', '96', '64')
    wanted = profile_model('test_sw', sparsity=.4, img_size=(96, 64)).to_dict()
    assert printed == json.loads(json.dumps(wanted))
    assert printed['input_size'] == [96, 64]


def test_csv_has_a_row_for_each_part_that_adds_up(capsys):
    assert main(['profile', 'test_sw', '--format', 'csv']) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row['part'] for row in rows] == ['stem', *(f'stage {i}' for i in (1, 2, 3, 4)), 'head', 'total']
    for column in rows[0]:
        if column.startswith('whole_') and not column.endswith('ratio'):
            assert sum(int(row[column]) for row in rows[:-1]) == int(rows[-1][column])
        elif column.startswith('depthwise_') and not column.endswith('ratio'):
            assert sum(int(row[column]) for row in rows[1:5]) == int(rows[-1][column])
    assert rows[1]['groups'] == str(num_groups(15, 5))


@pytest.mark.parametrize('densities, kwargs', [
    (('1', '0.5'), []),
    (('1',), ['--model-kwargs', 'reparameterized=True']),  # as fast whatever is kept
])
def test_times_are_printed_in_every_format(capsys, densities, kwargs):
    command = ['profile', 'test_sw', '--time', '--densities', '1', '0.5', '--repeats', '2', *kwargs]
    printed = run_json(capsys, *command)
    assert [len(stage['operators']) for stage in printed['times']['stages']] == [len(densities)] * 4
    assert printed['times']['repeats'] == 2
    assert main([*command, '--format', 'csv']) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    for density in densities:
        assert float(rows[1][f'time_ratio_at_{density}']) > 0
        assert rows[0][f'time_ratio_at_{density}'] == ''
    assert main(command) == 0
    assert 'SLaK, ms' in capsys.readouterr().out


@pytest.fixture
def sparse(tmp_path) -> tuple[nn.Module, int]:
    """A network with random masks, and how many groups it keeps."""
    model = timm.create_model('test_sw', num_classes=3)
    return model, prune(model, .6)


def test_a_checkpoint_of_a_run_is_measured(capsys, tmp_path, sparse):
    model, kept = sparse
    torch.save({'state_dict': model.state_dict(), 'arch': 'test_sw', 'epoch': 1}, tmp_path / 'last.pth.tar')
    for checkpoint in (tmp_path, tmp_path / 'last.pth.tar'):
        printed = run_json(capsys, 'profile', 'test_sw', '--checkpoint', str(checkpoint))
        assert (printed['kept'], printed['sparsity']) == (kept, 'measured')


@pytest.mark.parametrize('merge', [False, True])
def test_a_hub_folder_is_measured(capsys, tmp_path, sparse, merge):
    model, kept = sparse
    args = dict(num_classes=3, **(dict(reparameterized=True) if merge else {}))
    save_for_hf(
        reparameterize_model(model) if merge else model, str(tmp_path), model_args=args, safe_serialization=True)
    printed = run_json(capsys, 'profile', f'local-dir:{tmp_path}')
    assert (printed['kept'], printed['sparsity'], printed['merged']) == (kept, 'measured', merge)
    given = run_json(capsys, 'profile', f'local-dir:{tmp_path}', '--sparsity', '.5')
    assert given['sparsity'] == 'given'
    assert run_json(capsys, 'profile', 'test_sw', '--checkpoint', str(tmp_path))['kept'] == kept


def test_weights_that_come_with_a_network_are_measured(capsys):
    printed = run_json(capsys, 'profile', 'test_sw', '--pretrained')
    model = timm.create_model('test_sw', pretrained=True)
    kept = sum(int(block.conv_dw.kept_groups().sum()) for stage in model.stages for block in stage.blocks)
    assert printed['kept'] == kept


@pytest.mark.parametrize('argv, message', [
    (['resnet50'], "'resnet50' is no network of this package"),
    (['sw_tny'], "no model 'sw_tny'"),
    (['sw_tiny', '--sparsity', '1.2'], 'got 1.2'),
    (['sw_tiny', '--sparsity', '.1', '.2'], 'got 2'),
    (['slak_tiny', '--sparsity', '.4'], 'SLaK'),
    (['sw_tiny', '--checkpoint', 'nowhere.pth'], 'nowhere.pth'),
    (['test_sw', '--model-kwargs', 'unheard_of=1'], 'unheard_of'),
    (['test_sw', '--model-kwargs', 'kernel_size=0'], 'kernel_size'),
    (['test_sw', '--img-size', '16'], 'img_size'),
    (['test_sw', '--device', 'abacus'], 'abacus'),
    (['test_sw', '--densities', '.5'], '--time'),
    (['test_sw', '--time', '--repeats', '0'], 'repeats'),
    (['local-dir:/nowhere/at/all'], '/nowhere/at/all'),
])
def test_what_the_command_cannot_do_is_said_without_a_traceback(capsys, argv, message):
    assert main(['profile', *argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == ''
    assert message in shown.err
    assert 'Traceback' not in shown.err


def test_another_networks_checkpoint_is_refused(capsys, tmp_path, sparse):
    torch.save(sparse[0].state_dict(), tmp_path / 'test.pth')
    assert main(['profile', 'sw_tiny', '--checkpoint', str(tmp_path / 'test.pth')]) == 2
    assert 'test_sw' in capsys.readouterr().err


@pytest.mark.parametrize('argv', [
    ['sw_tiny', '--sparsity', '.4', '--pretrained'],
    ['sw_tiny', '--model-kwargs', 'depths'],
    ['sw_tiny', '--format', 'xml'],
    [],
])
def test_what_is_no_command_line_is_refused(argv):
    with pytest.raises(SystemExit) as exit_:
        main(['profile', *argv])
    assert exit_.value.code == 2


def test_profiling_needs_no_weights_in_memory():
    # sw_v2_large has 200 million parameters; on the meta device they take no room
    model = timm.create_model('sw_v2_large', device='meta')
    assert profile_model(model).whole == profile_model('sw_v2_large').whole
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_module_of_costs_is_pure():
    source = (Path(__file__).parents[1] / 'timm_shiftwise' / 'profile' / 'cost.py').read_text()
    assert 'torch' not in source

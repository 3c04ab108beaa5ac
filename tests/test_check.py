"""The report of `timm-shiftwise check`: all of it on the CPU, and what it says when something is wrong."""
import re

import pytest
import torch

from timm_shiftwise.cli import main
from timm_shiftwise.ops.backend import ENVIRONMENT_VARIABLE as BACKEND_VARIABLE
from timm_shiftwise.ops.shiftwise_conv.ways import WAYS
from timm_shiftwise.profile import check
from timm_shiftwise.profile.check import GEOMETRIES, Setting, check_device

ARGUMENTS = ['check', '--device', 'cpu', '--model', 'test_sw', '--batch-size', '2', '--quick']


@pytest.fixture
def little(monkeypatch):
    """One small geometry and two dtypes, of the ways in PyTorch."""
    monkeypatch.setattr(check, 'GEOMETRIES', GEOMETRIES[:1])
    monkeypatch.setattr(check, 'TOLERANCES', {torch.float64: 1e-10, torch.bfloat16: 6e-2})
    monkeypatch.setattr(check, 'WAYS', {name: way for name, way in WAYS.items() if name != 'fused'})
    monkeypatch.setenv(BACKEND_VARIABLE, 'torch')


@pytest.fixture
def only_ways(monkeypatch, little):
    """Nothing but the comparison of ways."""
    for section in ('_machine', '_networks', '_speed', '_chosen'):
        monkeypatch.setattr(check, section, lambda setting: iter(()))


def lines_of(text: str) -> dict[str, str]:
    """The report's lines by what they are of, each as verdict and what was seen."""
    return {what: f'{verdict.strip()} {said}'.strip() for verdict, what, said in re.findall(
        r'^(ok   |WRONG|     )  ([^:\n]+): (.*)$', text, re.MULTILINE)}


@pytest.mark.slow
def test_the_report_of_a_cpu_has_every_part_and_is_the_file(little, capsys, tmp_path):
    file = tmp_path / 'report.txt'
    state = torch.get_rng_state()
    assert main([*ARGUMENTS, '--output', str(file)]) == 0
    shown = capsys.readouterr().out
    assert file.read_text().strip() == shown.strip() and [*tmp_path.iterdir()] == [file]
    assert torch.equal(torch.get_rng_state(), state) and not torch.backends.cudnn.benchmark
    assert re.findall(r'^[A-Z]+$', shown, re.MULTILINE) == ['MACHINE', 'WAYS', 'NETWORKS', 'SPEED', 'CHOICES']
    lines = lines_of(shown)
    assert f'torch {torch.__version__.partition("+")[0]}' in lines['packages']
    for way in check.WAYS:  # some are for other devices
        runs = way in ('toeplitz', 'merged', 'channels_last', 'shift')
        assert lines[f'{way}, float64'].startswith('ok error' if runs else 'does not run here')
    assert 'oneDNN' in lines['channels_last, bfloat16']
    judged = [what for what in lines if what.startswith(('training step, ', 'network, '))]
    assert len(judged) == 6 and all(lines[what].startswith('ok ') for what in judged)
    for what in ('training step without optimiser, batch 2, float32', 'merged forward, batch 2, float32'):
        assert re.search(r'test_sw [\d.]+ ms; convnext_tiny [\d.]+ ms; [\d.]+ times as long', lines[what])
    for stage in (1, 2, 3, 4):
        for direction in ('forward', 'backward'):
            assert lines[f'stage {stage}, {direction}'].split()[0].strip(':') in WAYS
    passed = sum(line.startswith('ok ') for line in lines.values())
    assert shown.strip().endswith(f'{passed} checks passed, 0 failed.')


@pytest.mark.parametrize('broken, told', [
    ('raises', 'RuntimeError: a kernel of two lines'),
    ('is wrong', r'error [\d.]+e[+-]\d+ of at most'),
    ('is not a number', 'error inf of at most'),
])
def test_a_way_that_fails_is_one_line_and_hides_no_other(broken, told, only_ways, capsys, monkeypatch):
    forward = WAYS['merged'].forward

    def fail(call):
        if broken == 'raises':
            raise RuntimeError('a kernel\nof two lines')
        h, v, i = forward(call)
        return h, v + (50. if broken == 'is wrong' else float('nan')), i

    monkeypatch.setitem(check.WAYS, 'merged', WAYS['merged']._replace(forward=fail))
    assert main(ARGUMENTS) == 1
    lines = lines_of(capsys.readouterr().out)
    for dtype in ('float64', 'bfloat16'):
        assert re.match(f'WRONG {told}', lines[f'merged, {dtype}'])
        for way in ('toeplitz', 'shift'):
            assert lines[f'{way}, {dtype}'].startswith('ok ')


def test_every_geometry_is_compared_in_the_definition_itself(monkeypatch):
    monkeypatch.setattr(check, 'TOLERANCES', {torch.float32: 1e-4})
    monkeypatch.setenv(BACKEND_VARIABLE, 'torch')
    monkeypatch.setattr(check, 'WAYS', {'shift': WAYS['shift']})
    finding, = check._ways(Setting(torch.device('cpu'), 'test_sw', 1, quick=False))
    assert finding.good and f'in {len(GEOMETRIES)} geometries' in finding.said


def test_findings_come_one_by_one(little):
    findings = check_device(Setting(torch.device('cpu'), 'test_sw', 1, quick=True))
    assert next(findings).section == 'machine'


def test_a_report_that_cannot_be_written_is_an_error(only_ways, capsys, tmp_path):
    assert main([*ARGUMENTS, '--output', str(tmp_path / 'nowhere' / 'report.txt')]) == 2
    assert 'was not written' in capsys.readouterr().err


@pytest.mark.parametrize('argv, message', [
    (['--device', 'abacus'], "'abacus'"),
    (['--device', 'cpu', '--model', 'resnet50'], 'resnet50'),
    (['--device', 'cpu', '--batch-size', '0'], 'got 0'),
])
def test_what_cannot_be_checked_is_said_without_a_traceback(argv, message, capsys):
    assert main(['check', *argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == '' and message in shown.err and 'Traceback' not in shown.err


@pytest.mark.skipif(torch.cuda.is_available(), reason='the machine has a GPU for CUDA')
def test_a_machine_without_the_device_says_so(capsys):
    assert main(['check']) == 2
    shown = capsys.readouterr()
    assert shown.out == '' and "--device 'cuda'" in shown.err

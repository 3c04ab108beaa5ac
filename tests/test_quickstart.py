"""The quickstart, the weights that it made, and the figure of the README."""
import csv
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from usage_code import code_blocks

import timm_shiftwise
from timm_shiftwise.cli import CommandError, main, quickstart
from timm_shiftwise.hub.source import read_weights
from timm_shiftwise.layers import ShiftwiseConv2d

pytest.importorskip('sklearn', reason='the quickstart needs scikit-learn, which is not installed')
pytest.importorskip('matplotlib', reason='the quickstart needs matplotlib, which is not installed')

from timm_shiftwise.quickstart import digits, picture, training

ROOT = Path(__file__).parent.parent
CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """The digits as an image folder."""
    path = tmp_path_factory.mktemp('images') / 'digits'
    digits.write_digits(path)
    return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    """What the command writes in one epoch, whatever that epoch reaches; what it says lies beside it."""
    output = tmp_path_factory.mktemp('quickstart') / 'output'
    said = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, 'ENOUGH', 0.)
        patch.setenv('COLUMNS', '500')
        # no bar nor box that this terminal cannot show may keep the network from being saved
        terminal = io.TextIOWrapper(said, encoding='cp1252', write_through=True)
        patch.setattr(sys, 'stdout', terminal)
        patch.setenv('FORCE_COLOR', '1')
        assert main(['quickstart', '--output', str(output), '--epochs', '1']) == 0
    (output.parent / 'said.txt').write_text(re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', said.getvalue().decode('cp1252')))
    return output


def files_below(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob('*')) if file.is_file()}


def is_drawn(file: Path) -> bool:
    """Whether a picture holds more than a few colours and marks on much of its area."""
    pixels = np.asarray(Image.open(file).convert('RGB')).reshape(-1, 3)
    drawn = (pixels != 255).any(axis=1).mean()
    return len(np.unique(pixels, axis=0)) > 50 and drawn > 0.1


def test_digits_are_written_without_loss_and_every_class_is_held_out_from_alike(tmp_path):
    from sklearn.datasets import load_digits

    learned, held_out = digits.write_digits(tmp_path / 'digits')
    assert learned + held_out == 1797
    written = []
    for name in digits.CLASSES:
        train, val = (sorted((tmp_path / 'digits' / split / name).iterdir()) for split in ('train', 'val'))
        assert len(val) == (len(train) + len(val)) // digits.HELD_OUT_EVERY
        assert not {file.name for file in train} & {file.name for file in val}
        written += [np.asarray(Image.open(file)) for file in sorted(train + val, key=lambda file: file.name)]
    source = load_digits()
    expected = np.concatenate([source.images[source.target == label] for label in range(10)])
    assert np.array_equal(np.round(np.stack(written) * (16 / 255)), expected)


def test_digits_are_the_same_every_time(folder, tmp_path):
    digits.write_digits(tmp_path / 'again')
    assert files_below(tmp_path / 'again') == files_below(folder)


def test_training_images_vary_and_held_out_ones_do_not(folder):
    model = training.create_network(steps=10)
    held_out = training.held_out_loader(folder, model, CPU)
    first, again = next(iter(held_out))[0], next(iter(held_out))[0]
    assert first.shape == (training.BATCH_SIZE, 3, 64, 64)
    assert torch.equal(first, again)
    dataset = training.train_loader(folder, model, CPU).dataset
    seen = [dataset[0][0] for _ in range(20)]  # two of them may well be equal
    assert not all(torch.equal(image, seen[0]) for image in seen)


def test_training_is_sparse_and_reports_every_step(folder):
    timm.utils.random_seed(0)
    epochs = 1
    steps = training.count_steps(1442, epochs)
    model = training.create_network(steps)
    images = training.train_loader(folder, model, CPU)
    assert len(images) * epochs == steps
    progress = list(training.train(model, images, training.held_out_loader(folder, model, CPU), epochs, CPU))
    assert [now.step for now in progress] == [*range(1, steps + 1), steps]
    assert progress[-1].loss < progress[0].loss
    assert progress[-1].accuracy > 15
    operators = [module for module in model.modules() if isinstance(module, ShiftwiseConv2d)]
    masks = torch.cat([operator.group_mask.flatten() for operator in operators])
    assert masks.float().mean().item() == pytest.approx(0.6, abs=0.01)


def test_everything_is_written_and_nothing_else(trained):
    assert {entry.name for entry in trained.iterdir()} == {'digits', 'test_sw.digits', 'predictions.png'}
    assert {entry.name for entry in (trained / 'test_sw.digits').iterdir()} == {
        'model.safetensors', 'config.json', 'README.md'}
    assert is_drawn(trained / 'predictions.png')


def test_the_hub_folder_loads_and_says_what_it_is(trained):
    config = json.loads((trained / 'test_sw.digits' / 'config.json').read_text())
    assert config['architecture'] == 'test_sw'
    assert config['label_names'] == list('0123456789')
    card = (trained / 'test_sw.digits' / 'README.md').read_text()
    assert card.startswith('---\n')
    assert f"'local-dir:{trained / 'test_sw.digits'}'" in card
    assert '355 held-out digits' in card

    model = timm.create_model(f'local-dir:{trained / "test_sw.digits"}', pretrained=True)
    weights = timm.models.load_state_dict(str(trained / 'test_sw.digits' / 'model.safetensors'))
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


def test_the_code_of_the_card_reads_a_digit(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = (trained / 'test_sw.digits' / 'README.md').read_text()
    blocks = code_blocks(card)
    assert len(blocks) == 3 and 'http' not in ''.join(blocks)
    for block in blocks:
        names: dict = {}
        exec(block, names)
        assert names['img'].size == (8, 8)


def test_a_rerun_replaces_what_an_earlier_run_wrote(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, 'ENOUGH', 0.)
    for name in ('digits/val/11', 'test_sw.digits', '.unfinished-killed'):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / 'old').touch()
    (tmp_path / 'predictions.png').touch()
    assert main(['quickstart', '--output', str(tmp_path), '--epochs', '1', '--seed', '1']) == 0
    assert files_below(tmp_path).keys() == files_below(trained).keys()
    weights = 'test_sw.digits/model.safetensors'
    assert (tmp_path / weights).read_bytes() != (trained / weights).read_bytes()


def test_the_same_seed_gives_the_same_network(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, 'ENOUGH', 0.)
    assert main(['quickstart', '--output', str(tmp_path), '--epochs', '1']) == 0
    weights = 'test_sw.digits/model.safetensors'
    assert (tmp_path / weights).read_bytes() == (trained / weights).read_bytes()


def test_too_low_an_accuracy_fails_and_keeps_the_earlier_network(tmp_path, capsys):
    (tmp_path / 'test_sw.digits').mkdir()
    (tmp_path / 'test_sw.digits' / 'earlier').touch()
    assert main(['quickstart', '--output', str(tmp_path), '--epochs', '1']) == 1
    said = ' '.join(capsys.readouterr().out.split())
    assert 'is below the 97 %' in said
    assert 'this run had 1' in said
    assert {entry.name for entry in tmp_path.iterdir()} == {'digits', 'test_sw.digits'}
    assert (tmp_path / 'test_sw.digits' / 'earlier').exists()


def test_stopping_it_leaves_nothing_unfinished(tmp_path, monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, 'train', stop)
    assert main(['quickstart', '--output', str(tmp_path / 'new')]) == 130
    assert 'Stopped' in capsys.readouterr().out
    assert [entry.name for entry in (tmp_path / 'new').iterdir()] == ['digits']


def test_a_network_that_loads_with_other_scores_is_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, 'ENOUGH', 0.)
    create = timm.create_model

    def create_anew(name: str, **kwargs):
        return create('test_sw', num_classes=10) if name.startswith('local-dir:') else create(name, **kwargs)

    monkeypatch.setattr(timm, 'create_model', create_anew)
    assert main(['quickstart', '--output', str(tmp_path), '--epochs', '1']) == 2
    assert 'does not give the same scores' in ' '.join(capsys.readouterr().err.split())
    assert not (tmp_path / 'test_sw.digits').exists()


@pytest.mark.parametrize(('arguments', 'words'), [
    (['--epochs', '0'], '--epochs must be at least 1, got 0'),
    (['--seed', '-1'], '--seed must be between 0 and 4294967295, got -1'),
    (['--device', 'nowhere'], '--device nowhere cannot be used here'),
])
def test_useless_arguments_are_refused_before_anything_is_written(arguments, words, tmp_path, capsys):
    assert main(['quickstart', '--output', str(tmp_path / 'new'), *arguments]) == 2
    assert words in ' '.join(capsys.readouterr().err.split())
    assert not (tmp_path / 'new').exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / 'digits').mkdir()
    (tmp_path / 'thesis.tex').write_text('years of work')
    assert main(['quickstart', '--output', str(tmp_path)]) == 2
    assert 'holds something else already: thesis.tex' in ' '.join(capsys.readouterr().err.split())
    assert {entry.name for entry in tmp_path.iterdir()} == {'digits', 'thesis.tex'}
    assert main(['quickstart', '--output', str(tmp_path / 'thesis.tex')]) == 2
    assert 'cannot be made: File exists' in ' '.join(capsys.readouterr().err.split())


@pytest.mark.parametrize(('module', 'package'), [('sklearn', 'scikit-learn'), ('matplotlib', 'matplotlib')])
def test_a_missing_package_is_named_with_the_line_that_installs_it(module, package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(['quickstart', '--output', str(tmp_path / 'new')]) == 2
    said = capsys.readouterr().err
    assert f'pip install {package}\n' in said
    assert '.[quickstart]' in said
    assert not (tmp_path / 'new').exists()


def test_the_picture_shows_mistakes_in_red_and_leaves_the_users_matplotlib_alone(folder, tmp_path):
    files = sorted((folder / 'val').rglob('*.png'))
    labels = torch.tensor([int(file.parent.name) for file in files])
    right = training.Scores(10 * torch.nn.functional.one_hot(labels, 10).float(), labels)
    wrong = training.Scores(10 * torch.nn.functional.one_hot((labels + 1) % 10, 10).float(), labels)
    shares = []
    for scores in (right, wrong):
        picture.draw_predictions(files, scores, tmp_path / 'picture.png')
        pixels = np.asarray(Image.open(tmp_path / 'picture.png').convert('RGB')).astype(int)
        shares.append(((pixels[..., 0] > 180) & (pixels[..., 1:] < 90).all(axis=-1)).mean())
    assert shares[0] == 0
    assert shares[1] > 0.005

    script = '''
import sys, torch
from pathlib import Path
from timm_shiftwise.quickstart.picture import draw_predictions
from timm_shiftwise.quickstart.training import Scores
files = sorted(Path(sys.argv[1], 'val').rglob('*.png'))
labels = torch.tensor([int(file.parent.name) for file in files])
draw_predictions(files, Scores(torch.rand(len(files), 10), labels), Path(sys.argv[2]))
assert 'matplotlib.pyplot' not in sys.modules
'''
    subprocess.run([sys.executable, '-c', script, str(folder), str(tmp_path / 'other.png')], check=True)
    assert is_drawn(tmp_path / 'other.png')


def test_packaged_weights_are_small_and_read_held_out_digits(folder):
    file = Path(timm_shiftwise.__file__).parent / 'weights' / 'test_sw.digits.safetensors'
    assert file.stat().st_size < 1_000_000
    model = timm.create_model('test_sw.digits', pretrained=True)
    scores = training.score(model, training.held_out_loader(folder, model, CPU), CPU)
    assert scores.accuracy >= 97


@pytest.mark.slow
def test_the_command_as_a_newcomer_runs_it(tmp_path, monkeypatch):
    run = subprocess.run(
        [sys.executable, '-m', 'timm_shiftwise', 'quickstart'],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'COLUMNS': '200'})
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ''
    said = ' '.join(run.stdout.split())
    assert 'no network is saved' not in said
    assert "timm.create_model('local-dir:quickstart/test_sw.digits', pretrained=True) gives the same scores" in said
    for line in quickstart.train_lines('sw_tiny', 'PHOTOS', 100):
        assert line in said
    assert is_drawn(tmp_path / 'quickstart' / 'predictions.png')

    model = timm.create_model(f'local-dir:{tmp_path / "quickstart" / "test_sw.digits"}', pretrained=True)
    images = training.held_out_loader(tmp_path / 'quickstart' / 'digits', model, CPU)
    accuracy = training.score(model, images, CPU).accuracy
    assert accuracy >= 97
    assert f'{accuracy:.2f} %' in said

    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code_blocks((tmp_path / 'quickstart' / 'test_sw.digits' / 'README.md').read_text())[0], names)
    assert names['top_class_indices'][0, 0] == 0  # the digit of the card is a zero


@pytest.mark.slow
def test_the_last_lines_train_on_the_digits_with_exchanges(trained, tmp_path):
    scripts = Path(os.environ.get('TIMM_SCRIPTS') or 'TIMM_SCRIPTS is not set')
    if not (scripts / 'train.py').is_file():
        pytest.skip("train.py is not in timm's wheel: set TIMM_SCRIPTS to the directory that holds it")
    said = (trained.parent / 'said.txt').read_text()
    # a terminal without box characters has bars at the sides
    lines = [line.strip(' |') for line in said.partition('on the digits:')[2].splitlines() if line.strip(' |')]
    assert lines[0].startswith('timm-shiftwise recipe test_sw') and lines[1].startswith('python timm-scripts/train.py')
    (tmp_path / 'timm-scripts').symlink_to(scripts.resolve())
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    run = subprocess.run(
        ['bash', '-euc', '\n'.join(lines[:2])], cwd=tmp_path, capture_output=True, text=True, timeout=500,
        env={**os.environ, 'PATH': commands, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
    assert run.returncode == 0, run.stdout + run.stderr
    output, = (tmp_path / 'output' / 'train').iterdir()
    with (output / 'summary.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]['eval_top1']) >= 97
    first = min(output.glob('checkpoint-*'), key=lambda file: int(re.sub(r'\D', '', file.name)))  # ten are kept
    saved = (read_weights(file) for file in (first, output / 'last.pth.tar'))
    early, late = (
        torch.cat([value.flatten() for name, value in state.items() if name.endswith('group_mask')]) for state in saved)
    assert [mask.float().mean().item() for mask in (early, late)] == pytest.approx([0.6, 0.6], abs=0.02)
    assert (early != late).float().mean() > 0.02


@pytest.mark.slow
def test_the_figure_is_what_its_script_draws(tmp_path):
    figure = ROOT / 'docs' / 'how_it_works.png'
    runpy.run_path(str(ROOT / 'docs' / 'make_figure.py'))['draw'](tmp_path / 'figure.png')
    files = tmp_path / 'figure.png', figure
    drawn, kept = (np.asarray(Image.open(file).convert('RGB')).astype(float) for file in files)
    assert drawn.shape == kept.shape
    assert np.abs(drawn - kept).mean() < 3  # fonts and antialiasing differ between versions of matplotlib
    assert is_drawn(figure)


def test_packages_that_are_there_are_not_asked_for():
    quickstart.require_packages({'json': 'nothing'})
    with pytest.raises(CommandError, match='first-package and second-package cannot be imported'):
        quickstart.require_packages({'no_such_module': 'first-package', 'nor_this_one': 'second-package'})

"""timm's own scripts, unmodified, with our models on a folder of images.

train.py runs by itself, the others through the launcher. They are not in timm's wheel: the tests take them from the
directory that TIMM_SCRIPTS names.
"""
import csv
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCardData, metadata_load
from PIL import Image

import timm_shiftwise
from timm_shiftwise.cli import main
from timm_shiftwise.hub.results import results_of_validation
from timm_shiftwise.recipes import RECIPES

MODEL = 'test_sw'
CLASSES = ('blue', 'green', 'red')
TRAIN_IMAGES, VALIDATION_IMAGES = 16, 8  # of each class
BATCH_SIZE = 8
UPDATES = TRAIN_IMAGES * len(CLASSES) // BATCH_SIZE  # in an epoch

SCRIPTS = Path(os.environ.get('TIMM_SCRIPTS') or 'TIMM_SCRIPTS is not set')
LAUNCHER = [sys.executable, '-m', 'timm_shiftwise', 'run']
COMMAND = shutil.which('timm-shiftwise', path=sysconfig.get_path('scripts'))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SCRIPTS / 'train.py').is_file(),
        reason="TIMM'S SCRIPTS NOT TESTED: train.py, validate.py, inference.py, benchmark.py, bulk_runner.py, "
               "onnx_export.py, onnx_validate.py, avg_checkpoints.py and clean_checkpoint.py are not in timm's wheel. "
               f"Clone pytorch-image-models at v{timm.__version__} and set TIMM_SCRIPTS to that "
               f"directory (now: {os.environ.get('TIMM_SCRIPTS', 'not set')})"),
]


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """An image folder of three classes that colour tells apart, 64 x 64 px, with noise.

    The first validation image of each class has the colour of another: nothing is right about all of them.
    """
    root = tmp_path_factory.mktemp('images')
    generator = np.random.default_rng(0)
    for split, images in (('train', TRAIN_IMAGES), ('validation', VALIDATION_IMAGES)):
        for channel, name in zip((2, 1, 0), CLASSES, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(images):
                pixels = generator.integers(0, 128, (64, 64, 3), dtype=np.uint8)
                pixels[..., (channel + 1) % 3 if split == 'validation' and index == 0 else channel] += 128
                Image.fromarray(pixels).save(folder / f'{index}.png')
    return root


def environment() -> dict[str, str]:
    """The package importable from anywhere, no GPU, one thread in each process."""
    path = [str(Path(timm_shiftwise.__file__).parents[1]), *filter(None, [os.environ.get('PYTHONPATH')])]
    return os.environ | {'PYTHONPATH': os.pathsep.join(path), 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}


def execute(command: list[str], cwd: Path) -> str:
    """Run a command and return its standard output followed by its standard error."""
    result = subprocess.run(
        command, env=environment(), cwd=cwd, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, f'{command}\n{result.stdout}\n{result.stderr}'
    return result.stdout + result.stderr


def train_command(data: Path, output: Path, *options: str, epochs: int = 2) -> list[str]:
    """train.py as the interpreter runs it, without the launcher; its results go to output/run."""
    return [
        sys.executable, str(SCRIPTS / 'train.py'), '--device-modules', 'timm_shiftwise', '--model', MODEL,
        '--data-dir', str(data), '--num-classes', str(len(CLASSES)), '--img-size', '64', '--device', 'cpu',
        '--batch-size', str(BATCH_SIZE), '--workers', '1', '--opt', 'adamw', '--lr', '4e-3', '--warmup-epochs', '0',
        '--epochs', str(epochs), '--log-interval', '1', '--output', str(output), '--experiment', 'run', *options,
    ]


def summary(output: Path) -> list[dict[str, float]]:
    """Rows that train.py wrote, one an epoch."""
    with open(output / 'run' / 'summary.csv') as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def checkpoint(output: Path, name: str = 'last.pth.tar') -> dict:
    return torch.load(output / 'run' / name, map_location='cpu', weights_only=False)


def launch(script: str, data: Path, checkpoint: Path, *options: str) -> list[str]:
    """A script of timm on the validation images with the trained network, through the launcher."""
    return [
        *LAUNCHER, script, '--data-dir', str(data), '--model', MODEL, '--num-classes', str(len(CLASSES)),
        '--img-size', '64', '--crop-pct', '1.0', '--device', 'cpu', '--workers', '1', '--batch-size', str(BATCH_SIZE),
        '--checkpoint', str(checkpoint), *options,
    ]


def result(output: str):
    """What the scripts print for other programs to read."""
    return json.JSONDecoder().raw_decode(output.split('--result')[-1].lstrip())[0]


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory) -> Path:
    """Output of four epochs of train.py with a moving average of the weights; masks change in each."""
    output = tmp_path_factory.mktemp('trained')
    execute(train_command(
        data, output, '--crop-pct', '1.0', '--model-ema', '--model-ema-decay', '0.8',
        '--model-kwargs', 'prune_interval=3', f'sparsity_steps={4 * UPDATES}', epochs=4), cwd=output)
    return output


def test_train_learns_and_keeps_a_moving_average(trained):
    rows = summary(trained)
    assert [row['epoch'] for row in rows] == [0, 1, 2, 3]
    assert rows[-1]['train_loss'] < rows[0]['train_loss'] < 1.2 * math.log(len(CLASSES))
    assert max(row['eval_top1'] for row in rows) > 200 / len(CLASSES)
    state = checkpoint(trained)
    assert state['state_dict'].keys() == state['state_dict_ema'].keys()
    weight, averaged = (state[name]['stages.0.blocks.0.conv_dw.kernels'] for name in ('state_dict', 'state_dict_ema'))
    assert (weight - averaged).abs().max() > 0
    for name, table in timm.create_model(MODEL).named_buffers():
        if name.endswith(('.wiring', '.built_for')):  # the wiring stays
            assert torch.equal(state['state_dict'][name], table), name
            assert torch.equal(state['state_dict_ema'][name], table), name


def test_watch_shows_what_the_run_exchanged(trained, tmp_path, capsys):
    page = tmp_path / 'page.html'
    assert main(['watch', str(trained), '--output', str(page)]) == 0
    assert 'test_sw in' in capsys.readouterr().out
    text = page.read_text()
    assert 'Masks are known of epochs 0-3.' in text and 'moving average of the weights' in text
    assert text.count('<svg') == 5


@pytest.mark.parametrize('options', [
    ['--grad-accum-steps', '2'],
    ['--amp', '--amp-dtype', 'bfloat16'],
    ['--channels-last'],
    ['--torchcompile'],
    ['--grad-checkpointing', '--drop-path', '0.1', '--clip-grad', '1.0'],
    ['--kd-model-name', 'test_sw.digits', '--distill-loss-weight', '0.5', '--train-img-sizes', '48', '64'],
], ids=lambda options: options[0])
def test_train_takes_the_option(options, data, tmp_path):
    output = execute(train_command(data, tmp_path, *options, epochs=1), cwd=tmp_path)
    updates = UPDATES // 2 if '--grad-accum-steps' in options else UPDATES
    assert f'Train: 0 [{updates - 1:>4d}/{updates} (100%)]' in output
    (row,) = summary(tmp_path)
    assert math.isfinite(row['train_loss']) and math.isfinite(row['eval_loss'])
    assert checkpoint(tmp_path)['state_dict'].keys() == timm.create_model(MODEL).state_dict().keys()


def test_train_follows_the_schedule_wsd(data, tmp_path):
    # a copy runs with the timm that is installed: the scripts' folder may hold an earlier one, without this schedule
    script = shutil.copy(SCRIPTS / 'train.py', tmp_path)
    command = train_command(data, tmp_path, '--sched', 'wsd', '--decay-epochs', '0.5', '--sched-on-updates')
    output = execute([sys.executable, script, *command[2:]], cwd=tmp_path)
    rates = [float(rate) for rate in re.findall(r'LR: ([\d.e+-]+)', output)]
    # held for an epoch and then let down to nothing; what an update prints is the rate it was made with
    assert rates[:UPDATES] == [4e-3] * UPDATES and rates[UPDATES:] == sorted(rates[UPDATES:], reverse=True)
    assert rates[-1] < 1e-3


def kill(command: list[str], cwd: Path, is_moment: Callable[[str], bool]) -> list[str]:
    """Run a command, kill it after a line of its standard error, and return the lines so far."""
    log = []
    with subprocess.Popen(
            command, env=environment(), cwd=cwd, text=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE) as process:
        for line in process.stderr:
            log.append(line)
            if is_moment(line):
                process.kill()
        assert process.wait() == -9, ''.join(log)
    return log


def test_train_killed_in_the_middle_of_an_epoch_resumes(data, tmp_path):
    options = ['--model-ema', '--model-ema-decay', '0.8']
    log = kill(
        train_command(data, tmp_path, *options), tmp_path, lambda line: line.startswith(f'Train: 1 [   0/{UPDATES}'))
    assert not any(line.startswith(f'Train: 1 [{UPDATES - 1:>4d}/') for line in log), 'the epoch was over'
    before = checkpoint(tmp_path)
    assert before['epoch'] == 0

    last = str(tmp_path / 'run' / 'last.pth.tar')
    output = execute(train_command(data, tmp_path / 'resumed', *options, '--resume', last), cwd=tmp_path)
    assert f"Loaded checkpoint '{last}' (epoch 0)" in output
    assert 'Train: 0 [' not in output and f'Train: 1 [{UPDATES - 1:>4d}/{UPDATES} (100%)]' in output
    (row,) = summary(tmp_path / 'resumed')
    assert row['epoch'] == 1
    after = checkpoint(tmp_path / 'resumed')
    assert after['epoch'] == 1
    steps = {int(state['step']) for state in after['optimizer']['state'].values()}
    assert steps == {2 * UPDATES}  # the optimiser's memory came back too
    assert after['state_dict']['sparsity.step'] == 2 * UPDATES
    assert (after['state_dict']['head.fc.weight'] - before['state_dict']['head.fc.weight']).abs().max() > 0


@pytest.mark.timeout(1800)  # some minutes where nothing else runs
def test_train_killed_at_twenty_random_moments_loses_no_epoch_that_was_saved(data, tmp_path):
    """Some in the start, some in training, validation or saving; each run goes on where the saved ones ended."""
    rng = random.Random(0)
    last, saved = tmp_path / 'run' / 'last.pth.tar', -1
    for _ in range(20):
        resume = ['--resume', str(last)] if saved >= 0 else []
        lines, moment = itertools.count(1), rng.randint(1, 45)

        def is_moment(line: str, lines=lines, moment=moment) -> bool:
            if next(lines) != moment:
                return False
            time.sleep(rng.uniform(0, 0.2))
            return True

        log = kill(train_command(data, tmp_path, *resume, epochs=1000), tmp_path, is_moment)
        if resume and any(line.startswith('Train:') for line in log):
            assert f"Loaded checkpoint '{last}' (epoch {saved})" in ''.join(log)
        for file in (tmp_path / 'run').glob('*.pth.tar') if last.exists() else ():
            if not file.name.startswith('tmp'):  # train.py writes there what it then renames
                state = checkpoint(tmp_path, file.name)
                steps = {int(held['step']) for held in state['optimizer']['state'].values()}
                assert steps == {int(state['state_dict']['sparsity.step'])} == {(state['epoch'] + 1) * UPDATES}
        if last.exists():
            before, saved = saved, checkpoint(tmp_path)['epoch']
            assert saved >= before
    assert saved > 0
    execute(train_command(data, tmp_path, '--resume', str(last), epochs=saved + 2), cwd=tmp_path)
    assert checkpoint(tmp_path)['epoch'] == saved + 1


def test_train_continues_from_the_very_state_it_saved(data, trained, tmp_path):
    """Resumed with hardly any learning rate, weights, wiring and masks are those of the checkpoint an epoch later."""
    last = str(trained / 'run' / 'last.pth.tar')
    state = checkpoint(trained)['state_dict']
    execute(train_command(
        data, tmp_path, '--resume', last, '--no-resume-opt', '--lr', '1e-30', '--weight-decay', '0', epochs=5),
        cwd=tmp_path)
    resumed = checkpoint(tmp_path)['state_dict']
    for name, value in state.items():
        if not name.startswith('sparsity.') and 'running' not in name and 'num_batches' not in name:
            assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize('options', [[], ['--reparam'], ['--torchcompile']], ids=lambda options: ' '.join(options))
def test_validate_finds_the_accuracy_that_train_wrote(options, data, trained, tmp_path):
    file = tmp_path / 'results.csv'
    output = execute(launch(
        'validate.py', data, trained / 'run' / 'last.pth.tar', '--use-ema', '--results-file', str(file), *options),
        cwd=trained)
    assert result(output)['top1'] == pytest.approx(summary(trained)[-1]['eval_top1'], abs=0.01)
    model = timm.create_model(MODEL, num_classes=len(CLASSES))
    counts = [sum(p.numel() for p in each.parameters()) for each in (model, timm.utils.reparameterize_model(model))]
    told, = results_of_validation(file, 'colours', MODEL, counts, len(CLASSES))
    assert told.metric_value == pytest.approx(result(output)['top1'] / 100)
    assert told.metric_args == dict(img_size=64, crop_pct=1.0, interpolation='bilinear')


@pytest.mark.parametrize('options', [
    [], ['--model-kwargs', 'sparsity=0.6', 'prune_interval=3']], ids=['dense', 'sparse'])
def test_train_fine_tunes_what_grows_from_a_convnext_and_validate_finds_its_accuracy_merged(options, data, tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model('test_convnext', ls_init_value=0.1).state_dict(), tmp_path / 'convnext.pth')
    grown = ['--model', 'test_sw_convnext']
    execute(train_command(
        data, tmp_path, *grown, '--crop-pct', '1.0', '--pretrained',
        '--pretrained-path', str(tmp_path / 'convnext.pth'), *options), cwd=tmp_path)
    rows, state = summary(tmp_path), checkpoint(tmp_path)['state_dict']
    assert rows[-1]['train_loss'] < rows[0]['train_loss'] < 1.2 * math.log(len(CLASSES))
    assert (state['stages.0.blocks.0.conv_dw.norm_h.weight'] != 0).all()
    kept = torch.cat([mask.flatten() for name, mask in state.items() if name.endswith('group_mask')])
    assert kept.double().mean().item() == pytest.approx(0.4 if options else 1, abs=0.01)
    output = execute(launch('validate.py', data, tmp_path / 'run' / 'last.pth.tar', *grown, '--reparam'), cwd=tmp_path)
    assert result(output)['top1'] == pytest.approx(rows[-1]['eval_top1'], abs=0.01)


def test_a_training_run_becomes_a_hub_folder_of_its_averaged_weights(data, trained, tmp_path):
    assert main(['convert', str(trained / 'run'), '--output', str(tmp_path / 'out'), '--no-pictures']) == 0
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    best = str(trained / 'run' / 'model_best.pth.tar')
    model = timm.create_model(MODEL, num_classes=len(CLASSES), checkpoint_path=best).eval()
    assert tuple(loaded.pretrained_cfg['input_size']) == (3, 64, 64) and loaded.pretrained_cfg['crop_pct'] == 1.0
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    told, = ModelCardData(**metadata_load(tmp_path / 'out' / 'README.md')).eval_results
    assert told.metric_value == pytest.approx(max(row['eval_top1'] for row in summary(trained)) / 100, abs=1e-6)
    assert (told.dataset_name, told.dataset_split) == (data.name, 'validation')


def test_inference_labels_as_the_network_does(data, trained):
    pytest.importorskip('pandas', reason="timm's inference.py needs pandas: pip install pandas")
    saved = trained / 'run' / 'last.pth.tar'
    options = ['--split', 'validation', '--include-index', '--fullname', '--topk', '1', '--label-type', 'index']
    predictions = result(execute(launch('inference.py', data / 'validation', saved, *options), cwd=trained))
    assert len(predictions) == VALIDATION_IMAGES * len(CLASSES)

    model = timm.create_model(MODEL, num_classes=len(CLASSES), checkpoint_path=str(saved)).eval()
    config = timm.data.resolve_data_config({'input_size': (3, 64, 64), 'crop_pct': 1.0}, model=model)
    transform = timm.data.create_transform(**config)
    for name, prediction in predictions.items():
        with torch.inference_mode():
            probabilities = model(transform(Image.open(data / 'validation' / name))[None]).softmax(-1)[0]
        assert prediction['index'] == probabilities.argmax().item()
        assert prediction['prob'] == pytest.approx(probabilities.max().item(), abs=1e-4)


@pytest.fixture(scope='module')
def validated(data, trained) -> dict[str, float]:
    """What validate.py says of the averaged weights."""
    command = launch('validate.py', data, trained / 'run' / 'last.pth.tar', '--use-ema', '--interpolation', 'bilinear')
    return result(execute(command, cwd=trained))


def exported(file: Path, model: str, checkpoint: Path, *options: str) -> onnxruntime.InferenceSession:
    """An ONNX file that onnx_export.py has written and compared with the network, opened."""
    execute([
        *LAUNCHER, 'onnx_export.py', str(file), '--model', model, '--num-classes', str(len(CLASSES)),
        '--img-size', '64', '--checkpoint', str(checkpoint), '--check-forward', *options], cwd=file.parent)
    return onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])


@pytest.mark.parametrize('options', [
    ['--reparam'],
    ['--reparam', '--dynamic-size'],
    ['--reparam', '--dynamo', '--dynamic-size'],
    ['--dynamo', '--dynamic-size'],
], ids=lambda options: ' '.join(options))
def test_what_onnx_export_writes_has_the_accuracy_of_the_network(options, data, trained, validated, tmp_path):
    ours = exported(tmp_path / 'ours.onnx', MODEL, trained / 'run' / 'last.pth.tar', *options)
    torch.save(timm.create_model('test_convnext2', num_classes=len(CLASSES)).state_dict(), tmp_path / 'timms.pth')
    timms = exported(tmp_path / 'timms.onnx', 'test_convnext2', tmp_path / 'timms.pth', *options)
    for seen, wanted in ((ours.get_inputs(), timms.get_inputs()), (ours.get_outputs(), timms.get_outputs())):
        assert [(x.name, x.type, x.shape) for x in seen] == [(x.name, x.type, x.shape) for x in wanted]

    # the exporter takes the averaged weights where a checkpoint has them
    output = execute([
        *LAUNCHER, 'onnx_validate.py', str(data / 'validation'), '--onnx-input', str(tmp_path / 'ours.onnx'),
        '--img-size', '64', '--crop-pct', '1.0', '--interpolation', 'bilinear', '--workers', '1',
        '--batch-size', str(BATCH_SIZE)], cwd=tmp_path)
    assert float(re.search(r'\* Prec@1 ([\d.]+)', output)[1]) == pytest.approx(validated['top1'], abs=0.01)
    assert 50 < validated['top1'] < 100


@pytest.mark.parametrize('options', [[], ['--no-use-ema', '--safetensors']], ids=lambda options: ' '.join(options))
def test_avg_checkpoints_averages_networks_of_different_masks(options, data, trained, tmp_path):
    file = tmp_path / ('averaged.safetensors' if '--safetensors' in options else 'averaged.pth')
    execute([
        *LAUNCHER, 'avg_checkpoints.py', '--input', str(trained / 'run'), '--filter', 'checkpoint-*.pth.tar',
        '-n', '3', '--output', str(file), *options], cwd=tmp_path)
    model = timm.create_model(MODEL, num_classes=len(CLASSES), checkpoint_path=str(file))
    key = 'state_dict' if '--no-use-ema' in options else 'state_dict_ema'
    saved = [checkpoint(trained, path.name) for path in sorted((trained / 'run').glob('checkpoint-*.pth.tar'))]
    best = sorted(saved, key=lambda state: state['metric'])[-3:]  # a tie goes to the later name, as there
    masks = [state[key]['stages.2.blocks.0.conv_dw.group_mask'] for state in best]
    assert any(not torch.equal(masks[0], mask) for mask in masks)
    assert torch.equal(model.stages[2].blocks[0].conv_dw.group_mask, torch.stack(masks).any(0))
    top1 = result(execute(launch('validate.py', data, file), cwd=tmp_path))['top1']
    assert top1 > max(row['eval_top1'] for row in summary(trained)) - 15


@pytest.mark.parametrize('options', [
    [], ['--no-use-ema', '--no-hash', '--safetensors']], ids=lambda options: ' '.join(options))
def test_clean_checkpoint_leaves_the_weights_as_they_are(options, trained, tmp_path):
    ending = 'safetensors' if '--safetensors' in options else 'pth'
    execute([
        *LAUNCHER, 'clean_checkpoint.py', '--checkpoint', str(trained / 'run' / 'last.pth.tar'),
        '--output', str(tmp_path / f'clean.{ending}'), *options], cwd=tmp_path)
    (file,) = tmp_path.glob(f'clean*.{ending}')
    model = timm.create_model(MODEL, num_classes=len(CLASSES), checkpoint_path=str(file))
    saved = checkpoint(trained)['state_dict' if '--no-use-ema' in options else 'state_dict_ema']
    assert model.state_dict().keys() == saved.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]) and value.dtype == saved[name].dtype, name


BENCHMARK = [
    '--device', 'cpu', '--batch-size', '2', '--img-size', '64', '--num-warm-iter', '1', '--num-bench-iter', '5']


def test_benchmark_times_inference_and_training(tmp_path):
    row = result(execute([*LAUNCHER, 'benchmark.py', '--model', MODEL, *BENCHMARK, '--bench', 'both'], cwd=tmp_path))
    assert row['model'] == MODEL
    assert row['infer_samples_per_sec'] > 0 and row['train_samples_per_sec'] > 0


@pytest.mark.skipif(
    COMMAND is None, reason='the command timm-shiftwise is not installed for this Python: pip install -e .')
def test_bulk_runner_runs_a_script_for_each_of_our_models(tmp_path):
    execute([
        *LAUNCHER, 'bulk_runner.py', '--model-list', f'{MODEL}*', '--results-file', 'bench.csv',
        'benchmark.py', *BENCHMARK, '--bench', 'infer'], cwd=tmp_path)
    with open(tmp_path / 'bench.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['model'] for row in rows] == timm.list_models(f'{MODEL}*')
    assert all(float(row['infer_samples_per_sec']) > 0 for row in rows)


def write_recipe(model: str, file: Path, *options: str) -> dict:
    assert main(['recipe', model, '--output', str(file), *options]) == 0
    return yaml.safe_load(file.read_text())


def test_train_knows_every_argument_of_the_recipes(data, tmp_path, monkeypatch):
    script = runpy.run_path(str(SCRIPTS / 'train.py'), run_name='train')
    known = {action.dest: action for action in script['parser']._actions}
    weights = timm.create_model(MODEL).pretrained_cfg['file']
    for model, options in (
            *((model, []) for model in RECIPES), (MODEL, ['--data-dir', str(data), '--from', weights])):
        file = tmp_path / f'{model}{len(options)}.yaml'
        recipe = write_recipe(model, file, *options)
        assert recipe.keys() <= known.keys()
        monkeypatch.setattr(sys, 'argv', ['train.py', '--config', str(file)])
        args, _ = script['_parse_args']()
        for name, value in recipe.items():
            assert getattr(args, name) == value
            kind = known[name].type
            assert kind not in (int, float) or all(
                isinstance(part, kind) for part in (value if isinstance(value, list) else [value])), name


def test_train_runs_a_recipe_for_as_many_updates_as_it_says(data, tmp_path):
    """A recipe of a published network, run by one of the same family that is small."""
    recipe = write_recipe(
        'sw_tiny', tmp_path / 'recipe.yaml', '--data-dir', str(data), '--epochs', '3', '--batch-size', '6')
    updates = recipe['model_kwargs']['sparsity_steps'] // 3
    output = execute([
        sys.executable, str(SCRIPTS / 'train.py'), '--config', str(tmp_path / 'recipe.yaml'), '--model', MODEL,
        '--img-size', '64', '--device', 'cpu', '--workers', '1', '--output', str(tmp_path), '--experiment', 'run',
    ], cwd=tmp_path)
    assert f'Train: 2 [{updates - 1:>4d}/{updates} (100%)]' in output
    assert [math.isfinite(row['train_loss']) for row in summary(tmp_path)] == [True] * 3
    trained = checkpoint(tmp_path)
    assert trained['args'].model_kwargs == recipe['model_kwargs'] == dict(sparsity_steps=24, prune_interval=10)
    assert trained['state_dict']['sparsity.step'] == 24

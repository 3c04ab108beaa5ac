"""Training recipes: the published settings, what is fitted to a run, and the command that writes them."""
import math
import random
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from timm.models import save_for_hf
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch.utils.data import DataLoader, DistributedSampler

from timm_shiftwise.cli import main
from timm_shiftwise.models.variants import SHIFTWISE, SHIFTWISE_V2
from timm_shiftwise.recipes import (
    IMAGENET,
    RECIPES,
    Images,
    RecipeError,
    count_images,
    finetuning,
    fit_schedule,
    own_schedule,
    plan_run,
)
from timm_shiftwise.recipes.published import PUBLISHED_UPDATES
from timm_shiftwise.recipes.run import LEAST_INTERVAL, LEAST_UPDATES
from timm_shiftwise.sparsity.schedule import FIXED

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
WEIGHTS = Path(timm.create_model('test_sw').pretrained_cfg['file'])
OF_SLAK = [name for name in RECIPES if 'slak' in name]
PUBLISHED = [name for name, recipe in RECIPES.items() if recipe.published]


def write(folder: Path, *options: str, model: str = 'test_sw') -> dict:
    """What a recipe says that the command writes."""
    file = folder / 'recipe.yaml'
    assert main(['recipe', model, '--output', str(file), '--overwrite', *options]) == 0
    return yaml.safe_load(file.read_text())


def image_folder(root: Path, images: int = 20, classes: str = 'ab', splits: tuple[str, ...] = ('train', 'val')) -> Path:
    """A folder of so many training images, and a held-out one of each class."""
    for split in splits:
        for index in range(images if split == splits[0] else len(classes)):
            folder = root / split / classes[index % len(classes)]
            folder.mkdir(parents=True, exist_ok=True)
            IMAGE.save(folder / f'{index}.png')
    return root


@pytest.mark.parametrize('aa', {recipe.settings['aa'] for recipe in RECIPES.values() if 'aa' in recipe.settings})
def test_the_augmentation_lives_through_20000_images(aa):
    recipe = RECIPES['sw_tiny'].settings
    transform = create_transform(
        (3, 8, 8), is_training=True, auto_augment=aa, interpolation=recipe['train_interpolation'],
        re_prob=recipe['reprob'], re_mode=recipe['remode'], mean=(0.5,) * 3, std=(0.5,) * 3)
    # timm draws from both global generators
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        assert all(transform(IMAGE).shape == (3, 8, 8) for _ in range(20_000))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def test_every_network_has_a_recipe():
    assert set(RECIPES) == {*SHIFTWISE, *SHIFTWISE_V2}


@pytest.mark.parametrize('model', PUBLISHED)
def test_without_options_it_is_the_published_run(model, tmp_path):
    recipe = write(tmp_path, model=model)
    warmup = 5 if 'v2' in model else 20
    size = model.rpartition('_')[2]
    drop_path = {
        'sw_v2_tiny': 0.2, 'tiny': 0.1, 'small': 0.4, 'base': 0.5, 'large': 0.5}[model if 'v2_tiny' in model else size]
    expected = dict(
        model=model, device_modules=['timm_shiftwise'], num_classes=1000,
        batch_size=64, grad_accum_steps=8, sync_bn=True,
        opt='adamw', lr=4e-3, weight_decay=0.05,
        sched='cosine', sched_on_updates=True, warmup_prefix=True, warmup_epochs=warmup,
        epochs=(120 if model == 'p2_sw_tiny' else 300) - warmup, warmup_lr=0, min_lr=1e-6,
        aa='rand-m9-mstd0.5-inc1', mixup=0.8, cutmix=1.0, smoothing=0.1, reprob=0.25, remode='pixel',
        interpolation='bicubic', train_interpolation='bicubic', drop_path=drop_path,
        amp=True, amp_dtype='bfloat16', model_ema=False,
    )
    if model in OF_SLAK:
        expected |= dict(model_ema=True, model_ema_decay=0.9999)
    elif model == 'p2_sw_tiny':
        expected |= dict(model_kwargs=dict(sparsity=0.4, sparsity_steps=120 * 313, prune_interval=800))
    elif model != 'p_sw_tiny':
        interval = timm.create_model(model, device='meta').sparsity.prune_interval
        expected |= dict(model_kwargs=dict(sparsity_steps=93_900, prune_interval=interval))
    assert recipe == expected


@pytest.mark.parametrize('model', PUBLISHED)
def test_what_is_not_published_is_said_to_be_ours(model, tmp_path):
    write(tmp_path, model=model)
    text = (tmp_path / 'recipe.yaml').read_text()
    ours = re.findall(r'^# Ours: (?:.*\n)(?:# .*\n)*(\w+):', text, re.MULTILINE)
    expected = {'amp'}
    if model not in ('sw_tiny', 'sw_v2_tiny', 'slak_tiny', 'eq_slak_tiny', 'p_sw_tiny', 'p2_sw_tiny'):
        expected.add('drop_path')
    if model in OF_SLAK:
        expected.add('model_ema_decay')
        assert ' dense' in text and 'The network stays dense.' in text
    if model == 'p2_sw_tiny':
        expected |= {'warmup_epochs', 'model_kwargs'}
    assert set(ours) == expected


def test_the_networks_own_schedule_is_as_long_as_the_published_run():
    run = plan_run(RECIPES['sw_tiny'], IMAGENET, gpus=8)
    assert (run.updates_per_epoch, run.updates) == (313, PUBLISHED_UPDATES)
    assert own_schedule('sw_tiny').sparsity_steps == PUBLISHED_UPDATES


@pytest.mark.parametrize(('options', 'model'), [
    ([], 'sw_tiny'), ([], 'sw_v2_base'), (['--epochs', '10'], 'sw_small'), (['--epochs', '1'], 'sw_tiny')])
def test_the_learning_rate_rises_to_its_peak_and_falls_along_a_whole_cosine(options, model, tmp_path):
    recipe = write(tmp_path, *options, model=model)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe['lr'])
    updates = 313
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(Namespace(**recipe)), updates_per_epoch=updates)
    assert epochs == recipe['epochs'] + recipe['warmup_epochs'] == (int(options[1]) if options else 300)

    def rate(update: float) -> float:
        scheduler.step_update(round(update))
        return optimizer.param_groups[0]['lr']

    top, end = updates * recipe['warmup_epochs'], updates * epochs
    assert rate(top) == recipe['lr']
    if top:
        assert rate(0) == 0 and rate(top / 2) == pytest.approx(recipe['lr'] / 2, rel=0.01)
    assert rate((top + end) / 2) == pytest.approx(recipe['lr'] / 2, rel=0.01)
    assert rate(end - 1) == pytest.approx(1e-6, rel=0.2)


@given(st.integers(2, 3_000_000), st.integers(1, 64), st.integers(1, 600), st.none() | st.integers(1, 300))
@example(1_281_167, 8, 300, 64)
@example(1442, 1, 10, None)
@example(2, 1, 1, None)
@settings(max_examples=200, deadline=None)
def test_a_plan_has_the_updates_that_train_makes(images, gpus, epochs, half):
    recipe = RECIPES['sw_tiny']
    batch_size = half and 2 * half
    try:
        run = plan_run(recipe, Images(images, 2), gpus, epochs, batch_size)
    except RecipeError as error:
        # what train.py could make no update of, or mixup would refuse
        most = math.ceil(images / gpus)
        assert f'at most {most}' in str(error) and (batch_size or 2) > most
        return
    sampler = DistributedSampler(range(images), num_replicas=gpus, rank=0)
    batches = len(DataLoader(range(images), batch_size=run.batch_size, sampler=sampler, drop_last=True))
    assert run.updates_per_epoch == -(-batches // run.grad_accum_steps) >= 1
    assert run.updates == epochs * run.updates_per_epoch
    assert batch_size in (None, run.batch_size) and run.batch_size % 2 == 0
    assert 0 <= run.warmup_epochs <= min(20, epochs - 1)
    assert epochs == 1 or run.warmup_epochs >= 1
    assert run.lr == pytest.approx(4e-3 * math.sqrt(run.total_batch / 4096), rel=0.01)
    # accumulation stops short of the published total batch only to leave an epoch its updates
    assert run.grad_accum_steps == max(1, min(round(4096 / run.together), batches // LEAST_UPDATES))


@given(st.integers(1, 1_000_000), st.sampled_from(['sw_tiny', 'sw_v2_tiny']))
@example(PUBLISHED_UPDATES, 'sw_tiny')
@example(450, 'sw_tiny')
@example(2, 'sw_tiny')
@settings(deadline=None)
def test_a_run_of_any_length_exchanges_groups_as_often_as_the_published_one(updates, model):
    schedule = SCHEDULES[model]
    fitted = fit_schedule(schedule, updates)
    interval = fitted['prune_interval']
    assert fitted['sparsity_steps'] == updates
    if updates == PUBLISHED_UPDATES:
        assert interval == schedule.prune_interval
    exchanges, published = (updates - 1) // interval, (PUBLISHED_UPDATES - 1) // schedule.prune_interval
    assert exchanges >= 1 or updates == 1
    if interval > LEAST_INTERVAL:
        assert exchanges == pytest.approx(published, rel=0.06, abs=1)
    elif updates >= 2 * LEAST_INTERVAL:
        assert interval == LEAST_INTERVAL


SCHEDULES = {model: own_schedule(model) for model in ('sw_tiny', 'sw_v2_tiny')}


def test_a_short_run_averages_over_the_same_share_of_it(tmp_path):
    recipe = write(tmp_path, '--epochs', '3', model='slak_tiny')
    assert 1 - recipe['model_ema_decay'] == pytest.approx(1e-4 * 300 / 3)


def test_the_folder_is_counted_and_the_run_fitted_to_it(tmp_path):
    data = image_folder(tmp_path / 'data', images=2000, classes='abcde', splits=('train', 'validation'))
    assert count_images(data) == Images(2000, 5)
    recipe = write(tmp_path, '--data-dir', str(data), '--epochs', '30', '--batch-size', '8', model='sw_tiny')
    assert recipe['data_dir'] == str(data) and recipe['num_classes'] == 5
    assert (recipe['batch_size'], recipe['grad_accum_steps']) == (8, 5)  # 250 batches, 50 updates
    assert recipe['lr'] == pytest.approx(4e-3 * math.sqrt(40 / 4096), rel=0.01)
    assert (recipe['epochs'], recipe['warmup_epochs']) == (28, 2)
    assert recipe['model_kwargs'] == dict(sparsity_steps=1500, prune_interval=32)
    text = ' '.join((tmp_path / 'recipe.yaml').read_text().replace('\n# ', ' ').split())
    for said in (
            '2,000 training images of 5 classes, counted.',
            'An update sees 40 images: 1 GPU x 8 x 5 accumulation steps.',
            'Ours: lr 0.004 belongs to 4,096 images an update',
            '1,500 updates, 50 an epoch, and 46 exchanges of the weakest.'):
        assert said in text
    several = write(tmp_path, '--data-dir', str(data), '--gpus', '2', '--batch-size', '8', model='sw_tiny')
    assert several['grad_accum_steps'] == 2
    assert 'torchrun --nproc_per_node=2' in (tmp_path / 'recipe.yaml').read_text()


@pytest.mark.parametrize(('options', 'words'), [
    (['--epochs', '0'], '--epochs must be at least 1, got 0'),
    (['--batch-size', '-8'], '--batch-size must be at least 1, got -8'),
    (['--gpus', '0'], '--gpus must be at least 1, got 0'),
    (['--batch-size', '7'], '--batch-size must be even, images of a batch are mixed in pairs; got 7'),
    (['--batch-size', '22'], '--batch-size 22 leaves no whole batch of the 20 training images: at most 20 on 1 GPU'),
    (['--data-dir', 'nowhere'], 'nowhere is no folder'),
    (['--data-dir', 'empty'], 'Found 0 images in subfolders of empty'),
    (['--data-dir', 'data/train'], 'data/train has no folder of train images; it needs train/CLASS and val/CLASS'),
    (['--data-dir', 'without-val'], 'without-val has no folder of validation images'),
    (['--data-dir', 'imageless'], 'Found 0 images in subfolders of imageless/train'),
    (['--data-dir', 'one-class'], 'one-class/train has one class; at least 2 folders'),
    (['--data-dir', 'unseen'], "unseen/val has the class 'c', of which there are no training images"),
    (['--data-dir', 'untested'], "untested/train has the class 'c', of which there are no validation images"),
    (['--from', 'nothing.pth'], '--from nothing.pth: The checkpoint nothing.pth cannot be read'),
    (['--from', str(WEIGHTS)], 'test_sw'),
    (['--output', 'no/such/folder.yaml'], '--output no/such/folder.yaml cannot be written'),
    (['--output', 'empty'], '--output empty cannot be written'),
])
def test_bad_input_is_one_line_and_writes_nothing(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image_folder(Path('data'))
    Path('empty').mkdir()
    image_folder(Path('without-val'), splits=('train',))
    image_folder(Path('imageless'))
    for file in Path('imageless/train').rglob('*.png'):
        file.unlink()
    image_folder(Path('one-class'), classes='a')
    image_folder(Path('unseen'), classes='ab')
    image_folder(Path('unseen'), classes='abc', splits=('val',))
    image_folder(Path('untested'), classes='abc')
    for file in Path('untested/val/c').iterdir():
        file.unlink()
    before = sorted(Path().rglob('*'))
    given_data = [] if '--data-dir' in options else ['--data-dir', 'data']
    assert main(['recipe', 'sw_tiny', *given_data, *options]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count('\n') == 1 and said.out == ''
    assert sorted(Path().rglob('*')) == before


def test_it_prints_a_path_that_a_shell_can_use_and_replaces_no_other_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('COLUMNS', '20')
    for _ in range(2):  # a file that says the same is no obstacle
        assert main(['recipe', 'sw_tiny']) == 0
        assert capsys.readouterr().out == 'sw_tiny.yaml\n'
    file = Path('sw_tiny.yaml')
    edited = file.read_text() + 'seed: 1\n'
    file.write_text(edited)
    assert main(['recipe', 'sw_tiny']) == 2
    assert 'sw_tiny.yaml is there already' in capsys.readouterr().err and file.read_text() == edited
    assert main(['recipe', 'sw_tiny', '--overwrite']) == 0
    assert 'seed' not in yaml.safe_load(file.read_text())
    assert [path.name for path in Path().iterdir()] == ['sw_tiny.yaml']


def test_without_a_model_the_models_are_listed_and_an_unknown_one_is_answered_with_them(capsys):
    assert main(['recipe']) == 0
    assert capsys.readouterr().out.split() == list(RECIPES)
    assert main(['recipe', 'resnet50']) == 2
    message = capsys.readouterr().err
    assert "'resnet50'" in message and all(name in message for name in RECIPES)


def test_a_run_from_weights_is_short_mild_and_keeps_their_masks(tmp_path):
    network = timm.create_model('test_sw', in_chans=1, num_classes=4, num_shuffles=2)
    for stage in network.stages:
        stage.blocks[0].conv_dw.group_mask[:, ::2] = False
    run = tmp_path / 'run'
    run.mkdir()
    torch.save({'state_dict': network.state_dict()}, run / 'last.pth.tar')
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(model_kwargs=dict(num_shuffles=2, sparsity_steps=5))))
    recipe = write(tmp_path, '--from', str(run))
    assert recipe['pretrained_path'] == str(run / 'last.pth.tar')
    assert recipe['model_kwargs'] == dict(num_shuffles=2) and recipe['in_chans'] == 1
    assert recipe['epochs'] + recipe['warmup_epochs'] == 30
    # as train.py does
    tuned = timm.create_model(
        'test_sw', pretrained=recipe['pretrained'], num_classes=10, in_chans=recipe['in_chans'],
        pretrained_cfg_overlay=dict(file=recipe['pretrained_path'], num_classes=-1), **recipe['model_kwargs'])
    for ours, theirs in zip(tuned.stages, network.stages, strict=True):
        assert torch.equal(ours.blocks[0].conv_dw.group_mask, theirs.blocks[0].conv_dw.group_mask)
    assert tuned.sparsity.phase == FIXED
    images = Images(100_000, 10)
    scratch, mild = RECIPES['sw_tiny'], finetuning(RECIPES['sw_tiny'])
    rates = [plan_run(recipe, images, gpus=1, batch_size=512).lr for recipe in (scratch, mild)]
    assert rates[1] < rates[0] / 2 and mild.settings['mixup'] == mild.settings['cutmix'] == 0


def test_a_run_from_a_hub_folder_names_no_argument_twice(tmp_path):
    network = timm.create_model('test_sw', num_shuffles=2, global_pool='max')
    args = dict(in_chans=3, num_shuffles=2, global_pool='max')
    save_for_hf(network, str(tmp_path / 'folder'), model_args=args, safe_serialization=True)
    recipe = write(tmp_path, '--from', str(tmp_path / 'folder'))
    assert (recipe['gp'], recipe['in_chans'], recipe['model_kwargs']) == ('max', 3, dict(num_shuffles=2))


def test_weights_that_are_merged_for_inference_are_refused(tmp_path, capsys):
    merged = timm.utils.reparameterize_model(timm.create_model('test_sw').eval())
    torch.save(merged.state_dict(), tmp_path / 'merged.pth')
    assert main(['recipe', 'test_sw', '--from', str(tmp_path / 'merged.pth')]) == 2
    assert 'merged for inference and cannot be trained' in capsys.readouterr().err

"""The examples, each run small: on the packaged network and scikit-learn's digits, without a download.

    pip install -e '.[test,examples]' && TIMM_SCRIPTS=... pytest examples
"""
import json
import os
import re
from pathlib import Path

import classify_with_transformers
import detect_with_torchvision
import explain_with_grad_cam
import finetune_with_timm
import grow_cost
import grow_digits
import lightning
import numpy as np
import pytest
import segment_with_smp
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
import train_with_fastai
import train_with_lightning
from fastai.vision.all import Adam, load_learner
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from PIL import Image
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification

from timm_shiftwise.cli import main
from timm_shiftwise.layers import ShiftwiseConv2d
from timm_shiftwise.quickstart.digits import write_digits
from timm_shiftwise.sparsity.schedule import FIXED, RUNNING, WAITING

WEIGHTS = 'test_sw.digits'
SCRIPTS = Path(os.environ.get('TIMM_SCRIPTS') or 'TIMM_SCRIPTS is not set')


@pytest.fixture(autouse=True)
def without_taichi(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is how libraries call the networks: no kernel need be compiled for it."""
    monkeypatch.setenv('TIMM_SHIFTWISE_BACKEND', 'torch')
    torch.manual_seed(0)


@pytest.fixture(scope='module')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the digits, 16 images of each to train and 4 held out."""
    folder = tmp_path_factory.mktemp('images') / 'digits'
    write_digits(folder)
    for split, count in (('train', 16), ('val', 4)):
        for name in (folder / split).iterdir():
            for file in sorted(name.iterdir())[count if name.name in '147' else 0:]:
                file.unlink()
            if name.name not in '147':
                name.rmdir()
    return folder


@pytest.fixture(scope='module', params=[[], ['--reparameterize']], ids=['as_trained', 'merged'])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `timm-shiftwise convert` makes of the packaged weights."""
    output = tmp_path_factory.mktemp('folder') / 'converted'
    weights = timm.get_pretrained_cfg(WEIGHTS).file
    assert main(['convert', weights, '--output', str(output), *request.param]) == 0
    return output


def masks(model: nn.Module) -> list[Tensor]:
    return [layer.group_mask.clone() for layer in model.modules() if isinstance(layer, ShiftwiseConv2d)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def halves(losses: list[float]) -> tuple[float, float]:
    """Means of the earlier and of the later losses."""
    middle = len(losses) // 2
    return sum(losses[:middle]) / middle, sum(losses[middle:]) / (len(losses) - middle)


# --- timm's train.py ------------------------------------------------------------------------------------------------

@pytest.mark.skipif(
    not (SCRIPTS / 'train.py').is_file(),
    reason="FINE-TUNING BY TIMM'S train.py NOT TESTED: it is not in timm's wheel. Set TIMM_SCRIPTS to a clone of "
           f'pytorch-image-models at v{timm.__version__} (now: {os.environ.get("TIMM_SCRIPTS", "not set")})')
@pytest.mark.parametrize('folder', [[]], indirect=True, ids=['as_trained'])
def test_a_converted_folder_is_fine_tuned_on_ones_own_images(folder, digits, tmp_path):
    before = timm.create_model(f'local-dir:{folder}', pretrained=True)
    tuned = finetune_with_timm.finetune(
        f'local-dir:{folder}', digits, tmp_path / 'tuned', 2, '--device', 'cpu', '--workers', '0', '--lr', '2e-3')
    assert json.loads((tuned / 'config.json').read_text())['label_names'] == ['1', '4', '7']
    after = timm.create_model(f'local-dir:{tuned}', pretrained=True)
    assert after.num_classes == 3 and same(masks(before), masks(after))
    rows = (tmp_path / 'tuned' / 'run' / 'summary.csv').read_text().splitlines()
    accuracy = rows[0].split(',').index('eval_top1')
    assert len(rows) == 3 and max(float(row.split(',')[accuracy]) for row in rows[1:]) > 60
    found, = classify_with_transformers.classify(str(tuned), [Image.new('RGB', (64, 64))])
    assert {guess['label'] for guess in found} == {'1', '4', '7'}


# --- growing --------------------------------------------------------------------------------------------------------

def test_a_grown_network_computes_what_the_convnext_computed_and_learns(monkeypatch, capsys):
    images, labels, held_out, answers = grow_digits.load()
    monkeypatch.setattr(grow_digits, 'load', lambda: (images[:192], labels[:192], held_out[:64], answers[:64]))
    monkeypatch.setattr(grow_digits, 'EPOCHS', 2)
    monkeypatch.setattr(grow_digits, 'SEEDS', (0, 1))
    forms = {'ConvNeXt': None, 'grown': {}, 'grown, calibrated': {}, 'sparse': dict(sparsity=0.6, sparsity_steps=12)}
    monkeypatch.setattr(grow_digits, 'FORMS', forms)
    grow_digits.main()
    *_, heading, _, first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert [row.split(' | ')[0] for row in (first, second, third, fourth)] == [f'| {form}' for form in forms]
    column = heading.split(' | ').index('logits off by')
    assert all(float(row.split(' | ')[column].split()[0]) < 1e-4 for row in (first, second, third))
    losses = [heading.split(' | ').index(f'loss of the {which}') for which in ('first 20 steps', 'last epoch')]
    for row in (first, second, third, fourth):
        early, late = (float(row.split(' | ')[index].split()[0]) for index in losses)
        assert late < early


def test_what_growing_costs_is_told_of_every_network(monkeypatch, capsys):
    monkeypatch.setattr(grow_cost, 'NAMES', ('test_convnext', 'test_sw_convnext', 'test_sw'))
    monkeypatch.setattr(grow_cost, 'SIZE', 64)
    monkeypatch.setattr(grow_cost, 'TURNS', 3)
    grow_cost.main()
    told, first, second = capsys.readouterr().out.splitlines()
    assert 'float32, 64 pixels' in told
    for line, name in ((first, 'test_sw_convnext'), (second, 'test_sw')):
        ratio = re.fullmatch(rf'batch 1: {name} takes (\d+\.\d\d) times as long as test_convnext \(\d+ ms\)', line)
        assert ratio and float(ratio[1]) > 0


# --- segmentation ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('weights', [None, True])
def test_a_unet_learns_and_keeps_the_masks_it_came_with(weights, tmp_path):
    model = smp.Unet(f'tu-{WEIGHTS}', encoder_weights=weights, classes=1)
    before = masks(model)
    assert all(mask.all() for mask in before) == (weights is None)  # without weights it trains dense
    early, late = halves(segment_with_smp.train(model, [segment_with_smp.batch()] * 8))
    assert late < 0.7 * early
    assert same(before, masks(model))
    model.eval().save_pretrained(tmp_path / 'unet')
    x, _ = segment_with_smp.batch(2)
    with torch.no_grad():
        assert torch.equal(smp.from_pretrained(tmp_path / 'unet').eval()(x), model(x))
        wanted = model(x)
        torch.testing.assert_close(reparameterize_model(model)(x), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    'network', ['Unet', 'UnetPlusPlus', 'MAnet', 'Linknet', 'FPN', 'PSPNet', 'UPerNet', 'Segformer', 'DPT'])
@torch.no_grad()
def test_networks_of_smp_take_ours_as_an_encoder(network):
    options = {'decoder_readout': 'ignore'} if network == 'DPT' else {}
    model = getattr(smp, network)('tu-test_sw', encoder_weights=None, in_channels=1, classes=3, **options).eval()
    assert model(torch.randn(1, 1, 64, 96)).shape == (1, 3, 64, 96)


@pytest.mark.parametrize('network', ['DeepLabV3', 'DeepLabV3Plus', 'PAN'])
def test_networks_of_smp_that_want_dilated_stages_are_told_that_there_are_none(network):
    with pytest.raises(TypeError, match='output_stride'):
        getattr(smp, network)('tu-test_sw', encoder_weights=None)


def test_an_encoder_takes_its_weights_from_a_folder(folder):
    encoder = smp.encoders.get_encoder(f'tu-local-dir:{folder}', weights=True).eval()
    wanted = timm.create_model(f'local-dir:{folder}', pretrained=True, features_only=True).eval()
    x = torch.randn(1, 3, 64, 96)
    assert same(encoder(x)[2:], wanted(x))


# --- detection ------------------------------------------------------------------------------------------------------

def test_a_detector_learns_and_merges():
    model = detect_with_torchvision.detector(WEIGHTS, size=128)
    before, batch = masks(model), detect_with_torchvision.batch(2)
    losses = detect_with_torchvision.train(model, [batch] * 10)
    assert losses[-1] < 0.6 * losses[0]
    assert same(before, masks(model))
    kernels = model.backbone.body.stages_0.blocks[0].conv_dw.kernels
    assert kernels.grad.isfinite().all() and kernels.grad.any()
    with torch.no_grad():
        x = torch.randn(1, 3, 128, 96)
        maps = model.eval().backbone(x)
        for name, wanted in reparameterize_model(model).backbone(x).items():
            torch.testing.assert_close(maps[name], wanted, rtol=1e-3, atol=1e-4)


# --- transformers ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_transformers_computes_what_timm_computes(folder, tmp_path):
    network = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    for _ in range(2):
        wrapped = AutoModelForImageClassification.from_pretrained(folder)
        torch.testing.assert_close(wrapped(x).logits, network(x), rtol=0, atol=1e-5)
        wrapped.save_pretrained(tmp_path / 'again')
        folder = tmp_path / 'again'


@torch.no_grad()
def test_a_pipeline_reads_digits_and_a_backbone_has_timms_maps(folder, digits):
    files = sorted((digits / 'val').glob('*/*.png'))
    images = [Image.open(file).convert('RGB') for file in files]
    found = classify_with_transformers.classify(str(folder), images)
    right = [guesses[0]['label'] == f'LABEL_{file.parent.name}' for file, guesses in zip(files, found, strict=True)]
    assert sum(right) >= 11
    maps = classify_with_transformers.feature_maps(str(folder), images)
    network = timm.create_model(f'local-dir:{folder}', pretrained=True, features_only=True, out_indices=(1, 2, 3))
    data = timm.data.resolve_model_data_config(network)
    pixels = torch.stack([timm.data.create_transform(**data)(image) for image in images])
    for seen, wanted in zip(maps, network.eval()(pixels), strict=True):
        torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-5)


# --- grad-cam -------------------------------------------------------------------------------------------------------

def test_heat_lies_on_the_strokes_and_merging_does_not_move_it(digits):
    contrast = []
    for file in sorted((digits / 'val').glob('*/*.png')):
        image = Image.open(file)
        guess, heat, picture = explain_with_grad_cam.explain(WEIGHTS, image, stage=0)
        assert str(guess) == file.parent.name and picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        merged_guess, merged_heat, _ = explain_with_grad_cam.explain(WEIGHTS, image, stage=0, merged=True)
        assert guess == merged_guess
        np.testing.assert_allclose(merged_heat, heat, atol=1e-4)
        strokes = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)) / 255
        contrast.append(np.average(heat, weights=strokes) - np.average(heat, weights=1 - strokes))
    assert np.mean(np.array(contrast) > 0) > 0.7
    _, heat, _ = explain_with_grad_cam.explain(WEIGHTS, image)
    assert heat.shape == (64, 64) and heat.max() == pytest.approx(1, abs=1e-3)


# --- Lightning ------------------------------------------------------------------------------------------------------

SPARSE = dict(num_classes=10, sparsity=0.5, prune_interval=2, sparsity_steps=6)


def fit(loader: DataLoader, *callbacks: lightning.Callback, resume: Path | None = None) -> nn.Module:
    """A network trained for six steps, three epochs of two, under Lightning's Trainer."""
    torch.manual_seed(0)
    module = train_with_lightning.Classifier('test_sw', **SPARSE)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        callbacks=list(callbacks))
    trainer.fit(module, loader, loader, ckpt_path=resume)
    return module.model


@pytest.fixture(scope='module')
def loader(digits: Path) -> DataLoader:
    """Two batches, the same in every epoch."""
    loaded = train_with_lightning.loader(digits, 'val', 'test_sw', batch_size=6, workers=0)
    assert [tuple(images.shape) for images, _ in loaded] == [(6, 3, 64, 64)] * 2
    return loaded


def test_masks_are_drawn_and_exchanged_under_lightning_as_in_a_loop_of_ones_own(loader, tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model('test_sw', **SPARSE)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    drawn = []
    for _ in range(3):
        for images, labels in loader:
            loss = F.cross_entropy(plain.train()(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            drawn.append(masks(plain))
    assert plain.sparsity.phase == RUNNING and not same(drawn[0], drawn[-1])
    checkpoints = ModelCheckpoint(tmp_path, filename='{epoch}', save_top_k=-1)
    whole = fit(loader, checkpoints)
    resumed = fit(loader, resume=tmp_path / 'epoch=0.ckpt')
    for key, value in plain.state_dict().items():
        assert torch.equal(whole.state_dict()[key], value), key
        assert torch.equal(resumed.state_dict()[key], value), key
    averaged = fit(loader, EMAWeightAveraging(decay=0.5, use_buffers=False))
    assert same(masks(averaged), drawn[-1]) and averaged.sparsity.step == 6
    assert not torch.equal(averaged.stem[0].weight, plain.stem[0].weight)


def test_fine_tuning_under_lightning_keeps_the_masks(loader):
    module = train_with_lightning.Classifier('test_sw.digits', pretrained=True)
    before = masks(module)
    lightning.Trainer(
        max_epochs=1, accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False).fit(module, loader)
    assert module.model.sparsity.phase == FIXED and same(before, masks(module))


# --- fastai ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, pretrained', [('test_sw', False), (WEIGHTS, True)])
def test_a_learner_of_fastai_trains_sparse_or_keeps_the_masks(name, pretrained, digits, tmp_path):
    learner = train_with_fastai.make_learner(digits, name, pretrained, epochs=3, batch_size=12)
    before = masks(learner.model)
    schedule = learner.model[0].model.sparsity
    learner.unfreeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(3, 3e-3)
    assert schedule.phase == (FIXED if pretrained else RUNNING)
    assert same(before, masks(learner.model)) == pretrained
    assert pretrained or schedule.step == 12
    learner.export(tmp_path / 'learner.pkl')
    image = next((digits / 'val').glob('*/*.png'))
    again = load_learner(tmp_path / 'learner.pkl')
    with learner.no_bar(), again.no_bar():
        assert torch.equal(again.predict(image)[2], learner.predict(image)[2])


def test_fastais_own_optimisers_train_dense(digits):
    learner = train_with_fastai.make_learner(digits, 'test_sw', False, epochs=1, batch_size=12)
    learner.opt_func = Adam
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
    assert learner.model[0].model.sparsity.phase == WAITING and all(mask.all() for mask in masks(learner.model))

"""From a checkpoint to a Hub folder: what it is read as, what the folder holds, and what is refused."""
import argparse
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import yaml
from authors_networks import AuthorsNetwork
from huggingface_hub import ModelCardData, metadata_load
from packaging.version import Version
from safetensors.torch import load_file, save, save_file
from usage_code import code_blocks, serve_a_photo

import timm_shiftwise
from timm_shiftwise.cli import main
from timm_shiftwise.hub.convert import convert
from timm_shiftwise.hub.errors import HubError
from timm_shiftwise.hub.model_card import Provenance
from timm_shiftwise.models.checkpoint import CheckpointError

SMALL = dict(depths=(1, 2, 1, 1), dims=(12, 16, 24, 32), focus_lengths=(15, 13, 11, 7))
TIMM_READS_ANY_CHANNELS = Version(timm.__version__) >= Version('1.0.31')
"""Earlier versions leave out first convolutions of other than 1 or 3 channels when they read weights."""
KINDS = [('slak', 5, 'slak_tiny'), ('sw', 5, 'sw_tiny'), ('sw_v2', 3, 'sw_v2_tiny')]


def network(name: str = 'test_sw', seed: int = 0, **kwargs) -> torch.nn.Module:
    """A network whose BatchNorms, layer scales and masks are not those of a fresh one."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs)
    for key, value in model.state_dict().items():
        if key.endswith('.running_mean'):
            value.normal_(std=0.1)
        elif key.endswith('.running_var'):
            value.uniform_(0.5, 2)
        elif key.endswith('.gamma'):
            value.uniform_(0.1, 1)
        elif key.endswith('.group_mask'):
            value.copy_(torch.rand(value.shape) < 0.6)
    return model.eval()


def logits(model: torch.nn.Module, size: int = 64) -> torch.Tensor:
    images = torch.randn(2, model.in_chans, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(images)


def load(folder: Path, **kwargs) -> torch.nn.Module:
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(network().state_dict(), tmp_path / 'weights.pth')
    return tmp_path / 'weights.pth'


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# what a checkpoint is read as


@pytest.mark.parametrize('reparameterize', [False, True], ids=['as_trained', 'merged'])
@pytest.mark.parametrize('kind, size, name', KINDS)
def test_the_authors_checkpoint_becomes_a_folder_with_their_logits(tmp_path, kind, size, name, reparameterize):
    net = AuthorsNetwork(kind, size=size)
    state = net.state(pruned=0.4)
    torch.save({'model': state, 'epoch': 3}, tmp_path / 'authors.pth')
    told = {} if kind == 'slak' else dict(focus_lengths=net.lengths)
    done = convert(tmp_path / 'authors.pth', tmp_path / 'out', model_args=told, reparameterize=reparameterize)
    assert (done.network.name, done.network.layout) == (name, 'authors')
    assert done.merged == reparameterize
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(load(tmp_path / 'out')(images), net.logits(state, images), atol=1e-4, rtol=1e-4)


def test_slak_weights_become_the_network_of_small_kernels(tmp_path):
    net = AuthorsNetwork('slak')
    state = net.state()
    torch.save(state, tmp_path / 'authors.pth')
    done = convert(tmp_path / 'authors.pth', tmp_path / 'out', model='eq_slak_tiny')
    assert done.network.name == 'eq_slak_tiny'
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(load(tmp_path / 'out')(images), net.logits(state, images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('name, kwargs', [
    ('test_sw', dict(num_classes=7)),
    ('test_sw', dict(num_classes=0)),
    ('test_sw', dict(in_chans=1)),
    *([('test_sw', dict(in_chans=6))] if TIMM_READS_ANY_CHANNELS else []),
    ('test_sw', dict(focus_lengths=(9, 9, 9, 5), kernel_size=3, num_paths=1, num_shuffles=2, ghost_ratio=0.5)),
    ('test_sw', dict(global_pool='max')),
    ('p_sw_tiny', dict(SMALL, num_classes=3)),
    ('p2_sw_tiny', dict(SMALL, num_classes=3)),
    ('eq_slak_tiny', dict(SMALL, num_classes=3)),
    ('slak_tiny', dict(SMALL, num_classes=3)),
    ('sw_v2_tiny', dict(SMALL, num_classes=3)),
], ids=str)
def test_our_own_weights_tell_their_network(tmp_path, name, kwargs):
    model = network(name, **kwargs)
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    told = {key: value for key, value in kwargs.items() if key == 'global_pool'}
    convert(tmp_path / 'weights.safetensors', tmp_path / 'out', model_args=told)
    loaded = load(tmp_path / 'out')
    assert loaded.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(logits(loaded), logits(model))
    # transformers builds a network of both, and takes no argument twice
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['num_classes'] == model.num_classes and 'num_classes' not in config['model_args']


@pytest.mark.parametrize('name', ['p2_sw_tiny', 'slak_tiny', 'sw_v2_tiny'])
def test_a_folder_can_be_merged_later(tmp_path, name):
    model = network(name, **SMALL, num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    convert(tmp_path / 'weights.pth', tmp_path / 'first')
    config = json.loads((tmp_path / 'first' / 'config.json').read_text())
    config.update(label_names=['a', 'b', 'c'])
    config['pretrained_cfg'].update(mean=[0.1, 0.2, 0.3], input_size=[3, 96, 96])
    (tmp_path / 'first' / 'config.json').write_text(json.dumps(config))
    convert(tmp_path / 'first', tmp_path / 'merged', reparameterize=True)
    merged = load(tmp_path / 'merged')
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)
    assert len(merged.state_dict()) < len(model.state_dict())
    assert tuple(merged.pretrained_cfg['mean']) == (0.1, 0.2, 0.3)
    assert tuple(merged.pretrained_cfg['input_size']) == (3, 96, 96)
    assert merged.pretrained_cfg['label_names'] == ['a', 'b', 'c']
    again = convert(tmp_path / 'merged', tmp_path / 'again', reparameterize=True)
    assert again.merged
    torch.testing.assert_close(logits(load(tmp_path / 'again')), logits(merged))


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """What train.py leaves."""
    folder = tmp_path / 'run'
    folder.mkdir()
    args = dict(
        model='test_sw', num_classes=4, data_dir='/home/someone/private', output='/home/someone/out', epochs=3,
        opt='adamw', lr=1e-3, weight_decay=0.05, model_ema=True, img_size=96, mean=[0.4, 0.4, 0.4], std=None,
        crop_pct=0.9, interpolation='bilinear', gp='avgmax', amp=True, sched='cosine', input_size=None, in_chans=None,
        model_kwargs=dict(focus_lengths=[9, 9, 7, 5], drop_path_rate=0.1),
        wandb_project='secret', experiment='', resume='/home/someone/x',
    )
    kwargs = dict(num_classes=4, focus_lengths=(9, 9, 7, 5), global_pool='avgmax')
    model, averaged = network(seed=0, **kwargs), network(seed=1, **kwargs)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save({
        'epoch': 1, 'arch': 'test_sw', 'args': argparse.Namespace(**args), 'optimizer': optimizer.state_dict(),
        'state_dict': OrderedDict((f'module.{key}', value) for key, value in model.state_dict().items()),
        'state_dict_ema': averaged.state_dict(), 'metric': 55.5, 'version': 2,
    }, folder / 'model_best.pth.tar')
    torch.save({'state_dict': {}}, folder / 'last.pth.tar')
    (folder / 'args.yaml').write_text(yaml.safe_dump(args, default_flow_style=False))
    (folder / 'summary.csv').write_text(
        'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n0,2.0,1.9,30.0,90,0.001\n1,1.5,1.4,55.5,95,0.001\n'
        '2,1.4,1.45,54.25,95,0.001\n')
    return folder


def test_an_output_folder_of_train_is_taken_up(tmp_path, trained):
    convert(trained, tmp_path / 'out')
    model = load(tmp_path / 'out')
    kwargs = dict(num_classes=4, focus_lengths=(9, 9, 7, 5), global_pool='avgmax')
    torch.testing.assert_close(logits(model), logits(network(seed=1, **kwargs)))
    cfg = model.pretrained_cfg
    assert tuple(cfg['input_size']) == (3, 96, 96) and cfg['crop_pct'] == 0.9 and cfg['interpolation'] == 'bilinear'
    assert tuple(cfg['mean']) == (0.4, 0.4, 0.4)
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert 'epochs 3' in card and 'opt adamw' in card and 'sched cosine' in card
    assert '55.50, in epoch 1' in card and 'Epochs in the log (summary.csv): 3' in card
    assert 'amp True' in card and 'remode' not in card
    assert 'someone' not in card and 'secret' not in card
    assert 'Top-1 accuracy 55.50 % on private (validation), img_size 96, crop_pct 0.9, interpolation bilinear' in card
    result, = ModelCardData(**metadata_load(tmp_path / 'out' / 'README.md')).eval_results
    assert (result.metric_value, result.dataset_name, result.dataset_type) == (0.555, 'private', 'imagefolder')

    convert(trained, tmp_path / 'raw', use_ema=False)
    assert 'model-index' not in metadata_load(tmp_path / 'raw' / 'README.md')  # the average is what was validated
    torch.testing.assert_close(logits(load(tmp_path / 'raw')), logits(network(seed=0, **kwargs)))


def test_what_the_checkpoint_does_not_tell_is_asked_for(tmp_path):
    torch.save(AuthorsNetwork('sw').state(), tmp_path / 'authors.pth')
    with pytest.raises(HubError, match=r'does not tell focus_lengths.*--model-kwargs focus_lengths='):
        convert(tmp_path / 'authors.pth', tmp_path / 'out')
    with pytest.raises(HubError, match=r'\[3, 3, 3, 2\] groups, the network has focus_lengths=\(15, 13, 11, 20\)'):
        convert(tmp_path / 'authors.pth', tmp_path / 'out', model_args=dict(focus_lengths=(15, 13, 11, 20)))
    assert leftovers(tmp_path) == ['authors.pth']


def test_a_wrong_name_is_refused_with_the_right_one(tmp_path, checkpoint):
    with pytest.raises(HubError, match=r'depths=.*By its shapes it is of test_sw'):
        convert(checkpoint, tmp_path / 'out', model='sw_tiny')
    with pytest.raises(HubError, match=r"'resnet50' is no network of this package.*sw_tiny"):
        convert(checkpoint, tmp_path / 'out', model='resnet50')
    with pytest.raises(HubError, match='no_such'):
        convert(checkpoint, tmp_path / 'out', model_args=dict(no_such=1))
    assert leftovers(tmp_path) == ['weights.pth']


# the model card


def card_of(tmp_path: Path, model: torch.nn.Module, **kwargs) -> str:
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    convert(tmp_path / 'weights.pth', tmp_path / 'out', **kwargs)
    return (tmp_path / 'out' / 'README.md').read_text()


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split('---\n')[1])


def test_a_card_says_what_the_network_is_and_costs(tmp_path):
    model = network()
    card = card_of(tmp_path, model, provenance=Provenance('Trained on flowers.', 'oxford-flowers', 'mit'))
    told = metadata(card)
    assert told['library_name'] == 'timm' and told['license'] == 'mit' and told['datasets'] == ['oxford-flowers']
    assert told['pipeline_tag'] == 'image-classification'
    assert f'Params (M): {sum(p.numel() for p in model.parameters()) / 1e6:.3g}' in card
    assert 'Image size: 64 x 64' in card and 'as trained' in card and 'Trained on flowers.' in card
    shares = [float(share) for share in re.findall(r'Stage \d: ([\d.]+)% of the groups pruned', card)]
    masks = [[b.conv_dw.kept_groups().flatten() for b in stage.blocks] for stage in model.stages]
    assert shares == pytest.approx([100 * (1 - torch.cat(m).float().mean().item()) for m in masks], abs=0.06)
    assert 'Results' not in card
    assert card.index('## Model Details') < card.index('## Model Usage') < card.index('## Citation')


def test_results_are_those_the_user_gives_with_their_source(tmp_path):
    provenance = Provenance(results=[('Top-1 on ImageNet-1k: 83.39', 'https://example.org/table')])
    card = card_of(tmp_path, network(), provenance=provenance)
    assert 'Top-1 on ImageNet-1k: 83.39 (source: https://example.org/table)' in card


def test_a_card_says_of_a_licence_what_is_known(tmp_path):
    own = card_of(tmp_path, network())
    assert metadata(own)['license'] == 'unknown'
    net = AuthorsNetwork('slak')
    torch.save(net.state(), tmp_path / 'authors.pth')
    convert(tmp_path / 'authors.pth', tmp_path / 'theirs')
    convert(tmp_path / 'theirs', tmp_path / 'merged', reparameterize=True)
    for name in ('theirs', 'merged'):
        told = metadata((tmp_path / name / 'README.md').read_text())
        assert told['license'] == 'other' and told['license_link'] == 'https://github.com/VITA-Group/SLaK'
        assert json.loads((tmp_path / name / 'config.json').read_text())['pretrained_cfg']['license'] == 'other'
    convert(tmp_path / 'theirs', tmp_path / 'told', provenance=Provenance(license='mit'))
    told = metadata((tmp_path / 'told' / 'README.md').read_text())
    assert told['license'] == 'mit' and 'license_link' not in told
    assert json.loads((tmp_path / 'told' / 'config.json').read_text())['pretrained_cfg']['license'] == 'mit'


@pytest.mark.parametrize('origin', ['https://a.org\npipeline_tag: evil', 'javascript:evil', ['evil'], None], ids=str)
def test_no_link_is_smuggled_into_the_metadata(tmp_path, checkpoint, origin):
    convert(checkpoint, tmp_path / 'folder')
    file = tmp_path / 'folder' / 'config.json'
    config = json.loads(file.read_text())
    config['pretrained_cfg'].update(tag='authors_in1k', license='other', origin_url=origin)
    file.write_text(json.dumps(config))
    convert(tmp_path / 'folder', tmp_path / 'out')
    told = metadata((tmp_path / 'out' / 'README.md').read_text())
    assert 'license_link' not in told and told['pipeline_tag'] == 'image-classification'


@pytest.mark.parametrize('provenance', [
    Provenance(dataset='x\nlicense: gpl'), Provenance(license='mit\n- evil'), Provenance(license='')], ids=str)
def test_metadata_cannot_be_smuggled_in(tmp_path, checkpoint, provenance):
    if provenance.license == '':
        convert(checkpoint, tmp_path / 'out', provenance=provenance)
        assert metadata((tmp_path / 'out' / 'README.md').read_text())['license'] == 'unknown'
    else:
        with pytest.raises(HubError, match='as the Hub names them'):
            convert(checkpoint, tmp_path / 'out', provenance=provenance)
        assert leftovers(tmp_path) == ['weights.pth']


@pytest.mark.parametrize('name, kwargs, reparameterize, count', [
    ('test_sw', {}, False, 3),
    ('test_sw', dict(in_chans=1, num_classes=2), True, 3),
    *([('test_sw', dict(in_chans=5), False, 3)] if TIMM_READS_ANY_CHANNELS else []),
    ('test_sw', dict(num_classes=0), False, 2),
    ('slak_tiny', dict(SMALL, num_classes=3), True, 3),
    ('sw_v2_tiny', dict(SMALL, num_classes=3), True, 3),
], ids=str)
def test_the_code_of_a_card_runs_as_written(tmp_path, monkeypatch, capsys, name, kwargs, reparameterize, count):
    card = card_of(tmp_path, network(name, **kwargs), reparameterize=reparameterize)
    serve_a_photo(tmp_path, monkeypatch)
    assert len(code_blocks(card)) == count
    for block in code_blocks(card):
        names: dict = {}
        exec(block, names)
        if 'features_only' in block:
            shapes = [tuple(feature.shape) for feature in names['output']]
            assert [str(shape) for shape in shapes] == re.findall(r'#  (\(.*\))', block)
            assert capsys.readouterr().out.count('torch.Size') == 4
        elif 'num_classes=0' in block:
            assert names['output'].shape == (1, names['model'].num_features)
        else:
            assert names['top_probabilities'].shape == (1, min(5, kwargs.get('num_classes', 10)))


# the command


def test_the_command_converts_and_says_what_it_found(tmp_path, checkpoint, capsys):
    out = tmp_path / 'out'
    args = ['convert', str(checkpoint), '--output', str(out), '--reparameterize', '--no-pictures']
    args += ['--result', '98 % on digits', 'my test set']
    assert main(args) == 0
    told = capsys.readouterr().out
    assert 'test_sw' in told and 'merged for inference' in told and f"timm.create_model('local-dir:{out}'" in told
    assert '98 % on digits (source: my test set)' in (out / 'README.md').read_text()
    assert main(args) == 2
    assert 'is there already' in capsys.readouterr().err
    assert main([*args, '--overwrite']) == 0


def test_the_command_takes_arguments_of_the_network(tmp_path):
    torch.save(AuthorsNetwork('sw').state(), tmp_path / 'authors.pth')
    args = ['convert', str(tmp_path / 'authors.pth'), '--output', str(tmp_path / 'out'), '--model', 'sw_tiny']
    assert main(args) == 2
    assert main([*args, '--model-kwargs', 'focus_lengths=15,13,11,7', '--no-pictures']) == 0


def test_the_command_tells_a_failure_in_one_message(tmp_path, capsys):
    assert main(['convert', str(tmp_path / 'absent.pth'), '--output', str(tmp_path / 'out')]) == 2
    assert 'absent.pth' in capsys.readouterr().err


# the files


@pytest.mark.parametrize('umask', [0o022, 0o077], ids=oct)
def test_files_are_for_those_whom_the_umask_allows(tmp_path, checkpoint, umask):
    before = os.umask(umask)
    try:
        convert(checkpoint, tmp_path / 'out')
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / 'out').iterdir()}
    assert modes == dict.fromkeys(['README.md', 'config.json', 'model.safetensors'], 0o666 & ~umask)
    assert (tmp_path / 'out').stat().st_mode & 0o777 == 0o777 & ~umask


# what goes wrong while writing


def test_only_a_hub_folder_is_replaced(tmp_path, checkpoint):
    (tmp_path / 'precious').mkdir()
    (tmp_path / 'precious' / 'thesis.txt').write_text('all of it')
    for output in (tmp_path / 'precious', checkpoint):
        with pytest.raises(HubError, match='no Hub folder'):
            convert(checkpoint, output, overwrite=True)
    assert (tmp_path / 'precious' / 'thesis.txt').read_text() == 'all of it'


def test_replacing_keeps_the_old_folder_until_the_new_one_is_whole(tmp_path, checkpoint, monkeypatch):
    convert(checkpoint, tmp_path / 'out')
    before = (tmp_path / 'out' / 'model.safetensors').read_bytes()
    torch.save(network(seed=5).state_dict(), tmp_path / 'newer.pth')
    with monkeypatch.context() as broken:
        broken.setattr('timm_shiftwise.hub.convert.write_card', lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(tmp_path / 'newer.pth', tmp_path / 'out', overwrite=True)
    assert (tmp_path / 'out' / 'model.safetensors').read_bytes() == before
    convert(tmp_path / 'newer.pth', tmp_path / 'out', overwrite=True)
    assert (tmp_path / 'out' / 'model.safetensors').read_bytes() != before
    assert leftovers(tmp_path) == ['newer.pth', 'out', 'weights.pth']


@pytest.mark.parametrize('room', [50_000, 1_000], ids=['for_half_of_the_weights', 'for_nothing'])
def test_a_full_disk_leaves_nothing(tmp_path, checkpoint, room):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match=r'(?i)file too large|could not be written'):
            convert(checkpoint, tmp_path / 'out')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(tmp_path) == ['weights.pth']
    convert(checkpoint, tmp_path / 'out')


def test_a_folder_that_gives_other_logits_is_not_kept(tmp_path, checkpoint, monkeypatch):
    from timm.models import save_for_hf

    def save_wrong(model, folder, **kwargs):
        save_for_hf(model, folder, **kwargs)
        file = Path(folder) / 'model.safetensors'
        state = load_file(file)
        state['head.fc.bias'] = state['head.fc.bias'] + 1
        save_file(state, file)

    monkeypatch.setattr('timm_shiftwise.hub.convert.save_for_hf', save_wrong)
    with pytest.raises(HubError, match='does not give the logits of the source'):
        convert(checkpoint, tmp_path / 'out')
    assert leftovers(tmp_path) == ['weights.pth']


@pytest.mark.parametrize(('value', 'error', 'said'), [
    ('nan', CheckpointError, 'head.fc.bias holds NaN'), ('inf', HubError, 'not finite')])
def test_weights_that_are_not_finite_are_refused(value, error, said, tmp_path):
    state = network().state_dict()
    state['head.fc.bias'][0] = float(value)
    torch.save(state, tmp_path / 'weights.pth')
    with pytest.raises(error, match=said):
        convert(tmp_path / 'weights.pth', tmp_path / 'out')


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_that_looks_whole(tmp_path, checkpoint):
    code = (
        'import time\nfrom timm_shiftwise.hub import convert as module\n'
        'module._compare = lambda *args: (print("written", flush=True), time.sleep(600))\n'
        f'module.convert({str(checkpoint)!r}, {str(tmp_path / "out")!r})\n')
    environment = dict(os.environ, PYTHONPATH=str(Path(timm_shiftwise.__file__).parents[1]))
    process = subprocess.Popen([sys.executable, '-c', code], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == 'written'
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = [name for name in leftovers(tmp_path) if name != 'weights.pth']
    assert len(left) == 1 and left[0].startswith('.out.') and left[0].endswith('.partial')
    convert(checkpoint, tmp_path / 'out')


# hostile files


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def refused(tmp_path: Path, source: Path, match: str, **kwargs) -> None:
    before = leftovers(tmp_path)
    with pytest.raises((HubError, CheckpointError), match=match):
        convert(source, tmp_path / 'out', **kwargs)
    assert leftovers(tmp_path) == before


@pytest.mark.parametrize('form', ['zip', 'legacy', 'plain'])
def test_a_pickle_that_would_run_code_is_not_run(tmp_path, form):
    file = tmp_path / 'weights.pth'
    state = {**network().state_dict(), 'extra': Hostile(tmp_path / 'owned')}
    if form == 'plain':
        file.write_bytes(pickle.dumps(state['extra'], protocol=2))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form == 'zip')
    refused(tmp_path, file, 'more than tensors')
    assert not (tmp_path / 'owned').exists()


def repacked(source: Path, target: Path, compression: int = zipfile.ZIP_STORED, names=lambda name: name) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w', compression) as new:
        for entry in old.infolist():
            new.writestr(names(entry.filename), old.read(entry))


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({'stem.0.weight': torch.zeros(50_000_000)}, tmp_path / 'flat.pth')
    repacked(tmp_path / 'flat.pth', tmp_path / 'bomb.pth', zipfile.ZIP_DEFLATED)
    (tmp_path / 'flat.pth').unlink()
    assert (tmp_path / 'bomb.pth').stat().st_size < 400_000
    refused(tmp_path, tmp_path / 'bomb.pth', 'is packed')


def test_entries_on_top_of_each_other_are_refused(tmp_path, checkpoint):
    # the directory at the end of the archive names every entry ten times over
    whole = checkpoint.read_bytes()
    with zipfile.ZipFile(checkpoint) as archive:
        start, entries = archive.start_dir, archive.infolist()
    directory = whole[start:whole.rindex(b'PK\x05\x06')] if b'PK\x06\x06' not in whole else whole[
        start:whole.rindex(b'PK\x06\x06')]
    count, size = 10 * len(entries), 10 * len(directory)
    end = struct.pack('<4s4H2LH', b'PK\x05\x06', 0, 0, count, count, size, start, 0)
    (tmp_path / 'bomb.pth').write_bytes(whole[:start] + 10 * directory + end)
    refused(tmp_path, tmp_path / 'bomb.pth', 'claim [0-9]+ bytes')


@pytest.mark.parametrize('name', ['../../escape', '/etc/escape', 'c:/escape', '..\\escape'])
def test_entries_that_point_out_of_the_archive_are_refused(tmp_path, checkpoint, name):
    repacked(checkpoint, tmp_path / 'tricky.pth', names=lambda old: name if old.endswith('/version') else old)
    refused(tmp_path, tmp_path / 'tricky.pth', 'points out of it')


def test_tensors_larger_than_their_file_are_refused(tmp_path):
    state = network().state_dict()
    state['head.fc.weight'] = torch.zeros(1).expand(10 ** 6, 10 ** 6)
    torch.save(state, tmp_path / 'weights.pth')
    refused(tmp_path, tmp_path / 'weights.pth', r"'head\.fc\.weight', \(1000000, 1000000\), claim")


def with_header(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + body


@pytest.mark.parametrize('content', [
    struct.pack('<Q', 2 ** 62) + b'{}',
    struct.pack('<Q', 10 ** 9) + b'{}',
    with_header({'a': dict(dtype='F32', shape=[10 ** 9], data_offsets=[0, 4 * 10 ** 9])}, b'\0' * 16),
    with_header({'a': dict(dtype='F32', shape=[100], data_offsets=[0, 16])}, b'\0' * 16),
    with_header({key: dict(dtype='F32', shape=[4], data_offsets=[0, 16]) for key in 'ab'}, b'\0' * 16),
    with_header({'a': dict(dtype='F32', shape=[4], data_offsets=[-16, 0])}, b'\0' * 16),
    with_header({'a': dict(dtype='F32', shape=[4], data_offsets=[0, 16])}, b'\0' * 32),
    b'', b'{}', save(network().state_dict())[:-10],
], ids=['huge', 'long', 'claims', 'shape', 'overlap', 'negative', 'trailing', 'empty', 'short', 'cut'])
def test_a_safetensors_header_that_lies_is_refused(tmp_path, content):
    (tmp_path / 'weights.safetensors').write_bytes(content)
    refused(tmp_path, tmp_path / 'weights.safetensors', r'cannot be read|holds nothing')


@pytest.mark.parametrize('value', [
    [1, 2], {}, {'a': 1}, {1: torch.zeros(1)}, {'a': torch.zeros(2).to_sparse()}, {'model': {'a': 'b'}}, torch.zeros(3),
], ids=['list', 'empty', 'number', 'key', 'sparse', 'text', 'tensor'])
def test_what_is_no_state_dict_is_refused(tmp_path, value):
    torch.save(value, tmp_path / 'weights.pth')
    refused(tmp_path, tmp_path / 'weights.pth', 'checkpoint')


def test_what_is_no_file_of_weights_is_refused(tmp_path):
    os.mkfifo(tmp_path / 'pipe.pth')
    refused(tmp_path, tmp_path / 'pipe.pth', 'no file')
    (tmp_path / 'empty').mkdir()
    refused(tmp_path, tmp_path / 'empty', r'model_best\.pth\.tar, last\.pth\.tar, model\.safetensors')
    (tmp_path / 'noise.pth').write_bytes(b'PK\x03\x04' + bytes(range(256)))
    refused(tmp_path, tmp_path / 'noise.pth', 'cannot be read')


@pytest.mark.parametrize('cut', [100, 10_000])
def test_a_checkpoint_cut_short_is_refused(tmp_path, checkpoint, cut):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-cut])
    refused(tmp_path, checkpoint, 'cannot be read|broken')


def test_another_networks_weights_are_refused(tmp_path):
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'weights.pth')
    refused(tmp_path, tmp_path / 'weights.pth', "none of these networks'")


def test_a_size_that_only_a_table_claims_is_not_built(tmp_path):
    state = network().state_dict()
    state['stages.0.blocks.0.conv_dw.built_for'] = torch.tensor([2 ** 31 - 1, 5, 4], dtype=torch.int32)
    torch.save(state, tmp_path / 'weights.pth')
    began = time.monotonic()
    refused(tmp_path, tmp_path / 'weights.pth', r'groups, the network has focus_lengths=\(2147483647')
    assert time.monotonic() - began < 20


@pytest.mark.parametrize('change', [
    dict(architecture='../../etc/passwd'), dict(architecture=['sw_tiny']), dict(model_args='x'),
    dict(model_args=dict(num_paths=10 ** 9)), dict(model_args=dict(depths=[10 ** 9] * 4)),
    dict(model_args=dict(focus_lengths=['x'] * 4)), dict(model_args=dict(focus_lengths=[10 ** 9] * 4)),
    dict(pretrained_cfg=dict(input_size=[3, 10 ** 9, 10 ** 9])), dict(pretrained_cfg=dict(input_size='x')),
], ids=str)
def test_a_hostile_configuration_is_refused(tmp_path, checkpoint, change):
    convert(checkpoint, tmp_path / 'folder')
    file = tmp_path / 'folder' / 'config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    if change == dict(architecture=['sw_tiny']):
        convert(tmp_path / 'folder', tmp_path / 'out')  # the weights tell it
    else:
        refused(tmp_path, tmp_path / 'folder', '.')


@pytest.mark.parametrize('change, told', [
    (dict(num_classes=10 ** 7), 'num_classes=10, the network has 10000000'),
    (dict(in_chans=10 ** 6), 'in_chans=3, the network has 1000000'),
    (dict(num_shuffles=10 ** 9), 'num_shuffles=4, the network has 1000000000'),
    (dict(kernel_size='5'), "kernel_size of test_sw must be int, got '5'"),
    (dict(dims=[12, 24, 36, '48']), r'dims of test_sw must be tuple\[int, ...\]'),
    (dict(dims=10), r'dims of test_sw must be tuple'),
    (dict(ghost_ratio='0.2'), 'ghost_ratio of test_sw must be float'),
    (dict(ghost_ratio=-1), 'cannot be built'),
    (dict(dims=10 ** 400), 'integers of over 64 bits'),
    (dict(reparameterized=1), 'reparameterized of test_sw must be bool'),
    (dict(global_pool=['avg']), 'global_pool of test_sw must be str'),
    (dict(global_pool='none such'), 'cannot be built'),
    (dict(operator='none such'), 'cannot be built'),
    (dict(pretrained_cfg=dict(url='http://127.0.0.1:9/weights.pth')), "no argument 'pretrained_cfg'"),
    (dict(pretrained_cfg_overlay=dict(file='/etc/passwd')), "no argument 'pretrained_cfg_overlay'"),
    (dict(checkpoint_path='/etc/passwd'), "no argument 'checkpoint_path'"),
    (dict(features_only=True), "no argument 'features_only'"),
    (dict(device='cuda'), "no argument 'device'"),
    ({'x' * 10 ** 5: 1}, 'no argument'),
], ids=lambda value: str(value)[:60])
def test_arguments_in_a_configuration_neither_build_nor_fetch_anything(tmp_path, checkpoint, change, told, monkeypatch):
    convert(checkpoint, tmp_path / 'folder')
    file = tmp_path / 'folder' / 'config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), 'model_args': change}))
    if told != 'cannot be built':
        monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: pytest.fail('a network was built'))
    refused(tmp_path, tmp_path / 'folder', told)


def test_a_number_of_paths_that_the_weights_do_not_tell_is_bounded(tmp_path):
    net = AuthorsNetwork('sw')
    torch.save(net.state(merged=True), tmp_path / 'authors.pth')
    told = dict(focus_lengths=net.lengths, num_classes=10)
    for name in ('num_paths', 'num_shuffles'):
        refused(tmp_path, tmp_path / 'authors.pth', f'no more than 64 {name}', model_args={**told, name: 10 ** 8})


BOMBS = {
    'aliases': 'a: &a [' + 'x, ' * 9 + ']\n' + ''.join(
        f'{name}: &{name} [' + f'*{before}, ' * 9 + ']\n' for before, name in zip('abcdefgh', 'bcdefghi', strict=True)),
    'merges': 'a: &a {x: 1}\n' + ''.join(
        f'{name}: &{name} {{<<: [' + f'*{before}, ' * 9 + ']}\n'
        for before, name in zip('abcdefgh', 'bcdefghi', strict=True)),
    'itself': 'a: &a [*a]',
    'depth of lists': '[' * 60_000,
    'depth of mappings': 'a: ' + '{a: ' * 15_000,
    'depth of lines': ''.join(' ' * i + 'a:\n' for i in range(300)),
    'digits': 'a: ' + '1' * 60_000,
    'sixties': 'a: ' + '1:' * 30_000 + '1',
    'no date': 'a: 2001-99-99',
    'no integer': 'a: !!int ""',
    'no truth': 'a: !!bool maybe',
    'keys': '? {a: 1}\n: 2',
    'size': 'a: 1\n' * 250_000,
    'bytes': '\udcff\x00',
}
NESTED = '{"model_args": ' + '[' * 900 + ']' * 900 + '}'


def test_texts_made_to_hurt_are_refused_in_one_line_and_little_memory(tmp_path):
    """In a process of its own, of whose memory the peak is told apart from what was there before."""
    texts = [('last.pth.tar', 'args.yaml', text) for text in BOMBS.values()]
    texts += [('model.safetensors', 'config.json', text) for text in (*BOMBS.values(), NESTED)]
    folders = []
    for number, (weights, file, text) in enumerate(texts):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        (folders[-1] / weights).touch()
        (folders[-1] / file).write_bytes(text.encode(errors='surrogateescape'))
    code = (
        'import resource, sys, time\n'
        'from pathlib import Path\n'
        'from timm_shiftwise.hub import source\n'
        'from timm_shiftwise.hub.errors import HubError\n'
        'source.read_weights = lambda *args: {}\n'
        'for folder in sys.argv[1:]:\n'
        '    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()\n'
        '    try:\n'
        '        told = f"taken: {source.read_source(Path(folder))}"\n'
        '    except HubError as error:\n'
        '        told = str(error)\n'
        '    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n'
        '    assert "\\n" not in told and len(told) < 10_000, told\n'
        '    print(folder, grown // 1024, time.process_time() - began, not told.startswith("taken"))\n')
    run = subprocess.run([sys.executable, '-c', code, *map(str, folders)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [line.split() for line in run.stdout.splitlines()]
    assert len(rows) == len(texts)
    for folder, megabytes, seconds, is_refused in rows:
        assert int(megabytes) < 200 and float(seconds) < 10, folder
        assert is_refused == 'True', folder


@pytest.mark.parametrize('text, told', [
    ('!!python/object/apply:os.mkdir ["owned"]', 'no YAML of plain values'),
    ('- a list', 'must hold names and values'),
    ('{unclosed', 'no YAML'),
    ('img_size: [1, 2, 3]', 'no input'),
    ('model_kwargs: 3', 'must be names and values'),
    ('x: "' + 'a' * 2 ** 20 + '"', 'larger than'),
], ids=['code', 'list', 'broken', 'size', 'kwargs', 'long'])
def test_hostile_arguments_of_train_are_refused(tmp_path, checkpoint, monkeypatch, text, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'run').mkdir()
    shutil.copy(checkpoint, tmp_path / 'run' / 'model_best.pth.tar')
    (tmp_path / 'run' / 'args.yaml').write_text(text)
    refused(tmp_path, tmp_path / 'run', told)
    assert not (tmp_path / 'owned').exists()

"""What a model card shows and claims: pictures of the network, and results that were measured of its weights."""
import copy
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from authors_networks import AuthorsNetwork
from families import TWO_STAGES
from huggingface_hub import ModelCardData, metadata_load
from PIL import Image
from sparse_runs import make_model, train_steps

from timm_shiftwise.cli import main
from timm_shiftwise.hub.convert import convert
from timm_shiftwise.hub.errors import HubError
from timm_shiftwise.hub.model_card import refer_to
from timm_shiftwise.hub.pictures import draw_pictures
from timm_shiftwise.hub.results import results_of_run, results_of_validation
from timm_shiftwise.hub.source import Saved, Source
from timm_shiftwise.profile import profile_model

PICTURES = ('receptive_field.png', 'masks.png')


@pytest.fixture(scope='module')
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a short sparse training run."""
    file = tmp_path_factory.mktemp('sparse') / 'weights.pth'
    torch.manual_seed(0)
    model = make_model(sparsity=0.6, ls_init_value=0.5, num_classes=10)
    train_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 4)
    torch.save(model.state_dict(), file)
    return file


def card_of(folder: Path) -> str:
    return (folder / 'README.md').read_text()


def shown(folder: Path) -> list[str]:
    """Pictures that a card shows, each of which must be a whole PNG file beside it."""
    names = re.findall(r'!\[[^\]]+\]\(([^)]*)\)', card_of(folder))
    for name in names:
        Image.open(folder / name).load()
    assert sorted(names) == sorted(file.name for file in folder.glob('*.png'))
    return names


# pictures


@pytest.mark.parametrize('merged', [False, True], ids=['as_trained', 'merged'])
def test_a_sparse_network_is_shown_by_its_field_and_its_kept_groups(tmp_path, sparse, merged):
    done = convert(sparse, tmp_path / 'out', reparameterize=merged, pictures=True)
    assert shown(tmp_path / 'out') == [*PICTURES] == [*done.pictures] and done.not_drawn is None
    card = card_of(tmp_path / 'out')
    assert 'on 8 x Gaussian noise' in card and '64 x 64 pixels' in card and 'groups pruned' in card
    assert card.index('## Model Usage') < card.index('## Kept Groups') < card.index('## Citation')
    assert sum((tmp_path / 'out' / name).stat().st_size for name in PICTURES) < 300_000


def test_the_same_weights_give_the_same_folder(tmp_path, sparse):
    contents = []
    for _ in range(2):
        convert(sparse, tmp_path / 'out', pictures=True, overwrite=True)
        contents.append({file.name: file.read_bytes() for file in (tmp_path / 'out').iterdir()})
    assert contents[0] == contents[1]


def test_drawing_leaves_the_network_and_random_numbers_as_they_were(tmp_path):
    model = make_model(ls_init_value=0.5).train()
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert draw_pictures(model, profile_model(model), tmp_path, (64, 64)).files == ('receptive_field.png',)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def dense() -> dict:
    return timm.create_model('test_sw', sparsity=0, in_chans=1).state_dict()


def slak() -> dict:
    return timm.create_model('slak_tiny', **TWO_STAGES).state_dict()


def the_authors() -> dict:
    return AuthorsNetwork('slak').state()


@pytest.mark.parametrize('state, told', [
    (dense, '(dense)'), (slak, 'beyond the dashed line none reaches'), (the_authors, "paper's authors")])
def test_a_network_of_which_nothing_is_pruned_is_shown_by_its_field_alone(tmp_path, state, told):
    torch.save(state(), tmp_path / 'weights.pth')
    convert(tmp_path / 'weights.pth', tmp_path / 'out', pictures=True)
    assert shown(tmp_path / 'out') == ['receptive_field.png']
    card = card_of(tmp_path / 'out')
    assert told in card and 'groups pruned' not in card and 'Results' not in card
    assert 'model-index' not in metadata_load(tmp_path / 'out' / 'README.md')


def test_the_field_is_measured_on_the_images_that_are_given(tmp_path, sparse, capsys):
    (tmp_path / 'photos' / 'class').mkdir(parents=True)
    base = ['convert', str(sparse), '--images', str(tmp_path / 'photos'), '--output', str(tmp_path / 'out')]
    assert main(base) == 2
    assert 'cannot be measured on the images in' in capsys.readouterr().err and not (tmp_path / 'out').exists()
    for index in range(2):
        Image.effect_noise((90, 70), 60 + index).convert('RGB').save(tmp_path / 'photos' / 'class' / f'{index}.png')
    assert main(base) == 0
    assert 'receptive_field.png, masks.png' in capsys.readouterr().out
    card = card_of(tmp_path / 'out')
    assert 'on 2 x images of 64 x 64 pixels' in card and 'noise' not in card and 'photos' not in card
    for wrong in (['--no-pictures'], ['--images', str(tmp_path / 'absent')]):
        assert main([*base, '--overwrite', *wrong]) == 2
        assert '--images' in capsys.readouterr().err


def test_without_matplotlib_there_is_a_folder_without_pictures(tmp_path, sparse, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split('.')[0] == 'matplotlib' or name in (
            'timm_shiftwise.profile.picture', 'timm_shiftwise.receptive_field.picture')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert main(['convert', str(sparse), '--output', str(tmp_path / 'out')]) == 0
    assert 'pip install matplotlib' in capsys.readouterr().out
    assert shown(tmp_path / 'out') == [] and (tmp_path / 'out' / 'model.safetensors').is_file()


def test_a_network_that_does_not_see_is_told_and_has_no_field(tmp_path):
    state = {key: value * 0 if key.startswith('stem.') else value for key, value in dense().items()}
    torch.save(state, tmp_path / 'weights.pth')
    done = convert(tmp_path / 'weights.pth', tmp_path / 'out', pictures=True)
    assert done.pictures == () and 'does not depend on the image' in done.not_drawn
    assert shown(tmp_path / 'out') == []


# results


CONFIG = dict(input_size=(3, 96, 96), crop_pct=0.9, interpolation='bicubic')
ROWS = [
    dict(epoch='0', eval_loss='1.9', eval_top1='30.0', eval_top5='90.0'),
    dict(epoch='1', eval_loss='1.4', eval_top1='55.512', eval_top5='95.0'),
    dict(epoch='epoch', eval_loss='eval_loss', eval_top1='eval_top1', eval_top5='eval_top5'),
    dict(epoch='2', eval_loss='1.5', eval_top1='54.0', eval_top5='96.0'),
]
AVERAGED = dict(has_average=True, averaged=True)
RAW = dict(has_average=True, averaged=False)


def run(args: dict | None = None, *, epoch: int = 1, metric: float = 55.512, saved: dict | None = None) -> Source:
    """A run that left weights of an epoch."""
    args = dict(dict(data_dir='/home/someone/flowers', val_split='validation', eval_metric='top1'), **(args or {}))
    left = Saved(epoch, metric, **(saved or dict(has_average=False, averaged=False)))
    return Source(Path('best'), {}, train_args=args, summary=ROWS, saved=left)


@pytest.mark.parametrize('source, wanted', [
    (run(), [0.55512, 0.95]),
    (run(epoch=2, metric=54.0), [0.54, 0.96]),
    (run(saved=AVERAGED), [0.55512, 0.95]),
    (run(dict(eval_metric='loss'), metric=1.4), [0.55512, 0.95]),
    (run(dict(model_ema_force_cpu=True), saved=RAW), [0.55512, 0.95]),
    (run(saved=RAW), []),
    (run(dict(model_ema_force_cpu=True), saved=AVERAGED), []),
    (run(epoch=2), []),
    (run(epoch=7), []),
    (run(metric=55.5), []),
    (run(metric=float('nan')), []),
    (Source(Path('bare'), {}, summary=ROWS), []),
], ids=['best', 'last', 'average', 'ranked by loss', 'raw beside a CPU average', 'raw beside an average',
        'CPU average', 'other epoch', 'no such epoch', 'other metric', 'NaN', 'bare'])
def test_results_are_those_that_the_run_measured_of_these_weights(source, wanted):
    found = results_of_run(source, CONFIG, 100, None)
    assert [result.metric_value for result in found] == wanted
    for result in found:
        assert result.dataset_name == 'flowers' and result.dataset_split == 'validation'
        assert result.metric_args == dict(img_size=96, crop_pct=0.9, interpolation='bicubic')


def test_the_first_five_of_five_classes_are_no_result():
    assert [result.metric_name for result in results_of_run(run(), CONFIG, 5, None)] == ['Top-1 accuracy']


def test_results_tell_an_image_that_is_no_square_and_augmentation():
    result, _ = results_of_run(run(dict(tta=2)), dict(CONFIG, input_size=(3, 64, 96)), 100, None)
    assert result.metric_args == dict(img_size='64x96', crop_pct=0.9, interpolation='bicubic', tta=2)


@pytest.mark.parametrize('args, dataset, told', [
    ({}, 'oxford-flowers', ('oxford-flowers', 'oxford-flowers')),
    (dict(dataset='hfds/you/flowers'), None, ('you/flowers', 'you/flowers')),
    (dict(dataset='torch/cifar10', data_dir='/data'), None, ('cifar10', 'cifar10')),
    (dict(data_dir='C:\\Users\\someone\\flowers'), None, ('flowers', 'imagefolder')),
    (dict(data_dir=None, data='/home/someone/leaves/'), None, ('leaves', 'imagefolder')),
    (dict(data_dir=None), None, ('unknown', 'imagefolder')),
])
def test_the_data_set_is_named_without_its_place(args, dataset, told):
    result, _ = results_of_run(run(args), CONFIG, 100, dataset)
    assert (result.dataset_name, result.dataset_type) == told


ROW = dict(model='test_sw', top1=91.25, top5=99.5, param_count=0.08, img_size=96, crop_pct=0.9, interpolation='bicubic')


def written(file: Path, *rows: dict) -> Path:
    """A results file as validate.py writes it."""
    if file.suffix == '.json':
        file.write_text(json.dumps(rows[0] if len(rows) == 1 else rows))
    else:
        lines = [','.join(map(str, values)) for values in (rows[0], *(row.values() for row in rows))]
        file.write_text('\n'.join(lines) + '\n')
    return file


@pytest.mark.parametrize('name, rows', [
    ('one.csv', [ROW]), ('one.json', [ROW]), ('more.csv', [dict(ROW, model='resnet50'), ROW]),
    ('more.json', [ROW, dict(ROW, model='resnet50')]), ('tag.json', [dict(ROW, model='test_sw.digits')]),
    ('folder.json', [dict(ROW, model='local-dir:/somewhere')]),
])
def test_a_results_file_of_validate_is_read(tmp_path, name, rows):
    file = written(tmp_path / name, *rows)
    top1, top5 = results_of_validation(file, 'digits', 'test_sw', [76_000, 60_000], 10)
    assert (top1.metric_value, top5.metric_value, top1.dataset_type) == (0.9125, 0.995, 'digits')
    assert top1.metric_args == top5.metric_args == dict(img_size=96, crop_pct=0.9, interpolation='bicubic')


@pytest.mark.parametrize('content, told', [
    (None, 'There is no file'), ('', 'it holds 0'),
    ('{', 'neither CSV nor JSON'), ('[' * 10 ** 5, 'neither CSV nor JSON'),
    (json.dumps(dict(ROW, model='resnet50')), 'it holds 0'), (json.dumps([ROW, ROW]), 'it holds 2'),
    (json.dumps(dict(ROW, param_count=25.6)), 'of 25.6 million parameters; this one has 0.08 or, merged, 0.06'),
    (json.dumps(dict(ROW, top1=None)), 'tells None'), (json.dumps(dict(ROW, top1=912)), 'tells 912'),
    (json.dumps(dict(ROW, top1=10 ** 400)), 'top1'),
], ids=['absent', 'empty', 'broken', 'deep', 'other', 'two', 'size', 'none', 'too much', 'endless'])
def test_a_results_file_that_tells_nothing_of_the_network_is_refused(tmp_path, content, told):
    if content is not None:
        (tmp_path / 'results').write_text(content)
    with pytest.raises(HubError, match=told):
        results_of_validation(tmp_path / 'results', 'digits', 'test_sw', [76_000, 60_000], 10)


def test_validated_results_are_in_the_fields_of_the_hub_and_follow_the_repository(tmp_path, sparse, capsys):
    count = sum(p.numel() for p in timm.create_model('test_sw').parameters())
    file = written(tmp_path / 'results.json', dict(ROW, param_count=round(count / 1e6, 2)))
    title = 'out: 1' + ' and more' * 20  # YAML must quote it, and breaks the line
    folder = tmp_path / title
    base = ['convert', str(sparse), '--output', str(folder), '--reparameterize', '--no-pictures']
    assert main([*base, '--validated', str(file), 'no such name']) == 2
    assert "'no such name' is no data set" in capsys.readouterr().err
    assert main([*base, '--validated', str(file), 'you/digits', '--result', 'Nice', 'me']) == 0
    card = card_of(folder)
    assert 'Top-1 accuracy 91.25 % on you/digits, img_size 96' in card and 'Nice (source: me)' in card
    metadata = metadata_load(folder / 'README.md')
    told = ModelCardData(**metadata)
    assert told.model_name == title and told.metrics == ['accuracy']
    assert [result.metric_value for result in told.eval_results] == [0.9125, 0.995]
    assert told.to_dict() == metadata  # huggingface_hub reads what it wrote
    for name in ('flowers', '1.0', 'null'):
        (tmp_path / 'README.md').write_text(refer_to(card, f'you/{name}'))
        assert metadata_load(tmp_path / 'README.md') == {
            **metadata, 'model-index': [{**metadata['model-index'][0], 'name': name}]}

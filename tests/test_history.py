"""What sparsity did in a run: read while train.py goes on, kept, compared, drawn as a page, opened in a browser."""
import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sparse_runs import make_model, masks_of, train_steps
from timm.utils import reparameterize_model
from torch import Tensor, nn

from timm_shiftwise.cli import main
from timm_shiftwise.history import run as reading
from timm_shiftwise.history.changes import Fate, fates, missing_epochs, stage_histories
from timm_shiftwise.history.kernels import caveat, wide_and_tall
from timm_shiftwise.history.record import Epoch, RecordError
from timm_shiftwise.history.run import NoRunError, curves_of, find_run, read_history
from timm_shiftwise.ops import shiftwise_conv2d
from timm_shiftwise.profile import network_groups

pytest.importorskip('matplotlib')

from timm_shiftwise.history.page import ranges, render_page
from timm_shiftwise.history.pictures import Line, draw_lines

SMALL = dict(depths=(1, 2), dims=(10, 12), focus_lengths=(13, 6), num_classes=5)
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


def write_run(folder: Path, name: str = 'test_sw', **args) -> None:
    """A folder as train.py begins it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'args.yaml').write_text(yaml.safe_dump(dict(model=name, seed=1, epochs=9, **args)))


def write_epoch(folder: Path, model: nn.Module, epoch: int, name: str = 'last.pth.tar', **more) -> None:
    """A checkpoint of an epoch as train.py saves it."""
    saved = {'epoch': epoch, 'arch': 'test_sw', 'state_dict': model.state_dict(), **more}
    torch.save(saved, folder / 'tmp.pth.tar')
    (folder / 'tmp.pth.tar').replace(folder / name)


def write_summary(folder: Path, epochs: int) -> None:
    """Rows of so many epochs."""
    with open(folder / 'summary.csv', 'w') as file:
        writer = csv.DictWriter(file, ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'])
        writer.writeheader()
        for epoch in range(epochs):
            writer.writerow(dict(
                epoch=epoch, train_loss=2 / (1 + epoch), eval_loss=3 / (1 + epoch), eval_top1=10. * epoch,
                eval_top5=20. * epoch, lr=1e-3))


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[Path, list[list[Tensor]]]:
    """A run of four epochs, of whose checkpoints train.py has removed that of epoch 1, and the masks of each."""
    folder = tmp_path_factory.mktemp('output') / 'a run'
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    write_run(folder)
    masks = []
    for epoch in range(4):
        train_steps(model, optimizer, 3, seed=epoch)
        masks.append(masks_of(model))
        if epoch != 1:
            write_epoch(folder, model, epoch, f'checkpoint-{epoch}.pth.tar')
    write_epoch(folder, model, 3)
    write_summary(folder, 4)
    return folder, masks


@pytest.fixture
def run_folder(trained, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained[0], tmp_path / 'run'))


def record_of(folder: Path) -> Path:
    return folder / 'watch.safetensors'


def read(folder: Path) -> reading.Run:
    return read_history(folder, record_of(folder))


def known(run: reading.Run) -> list[int]:
    return [epoch.number for epoch in run.epochs]


# reading

def test_the_masks_of_each_checkpoint_are_read(trained, run_folder):
    run = read(run_folder)
    assert (run.model, known(run), run.passed_over) == ('test_sw', [0, 2, 3], ())
    assert [epoch.step for epoch in run.epochs] == [3, 9, 12]
    for epoch in run.epochs:
        assert all(map(np.array_equal, epoch.masks, trained[1][epoch.number]))
    assert run.curves['eval_top1'] == {0: 0., 1: 10., 2: 20., 3: 30.}


def test_what_was_seen_is_known_when_checkpoints_are_gone_and_not_read_again(trained, run_folder, monkeypatch):
    last = run_folder / 'last.pth.tar'
    early = [run_folder / f'checkpoint-{epoch}.pth.tar' for epoch in (0, 2, 3)]
    before = read(run_folder)
    read_weights, files = reading.read_weights, []
    monkeypatch.setattr(
        reading, 'read_weights', lambda file, **kwargs: files.append(file) or read_weights(file, **kwargs))
    assert known(read(run_folder)) == [0, 2, 3]
    assert len(files) == 1  # the latest alone
    for file in early:
        file.unlink()
    after = read(run_folder)
    assert known(after) == [0, 2, 3] and files[1:] == [last]
    for old, new in zip(before.epochs, after.epochs, strict=True):
        assert (old.number, old.step) == (new.number, new.step)
        assert all(map(np.array_equal, old.masks, new.masks))


def test_the_masks_are_of_the_weights_that_train_not_of_their_average(tmp_path):
    model, other = make_model(), make_model()
    model.stages[0].blocks[0].conv_dw.group_mask[:, 0] = False
    write_run(tmp_path)
    write_epoch(tmp_path, model, 0, state_dict_ema=other.state_dict())
    assert not read(tmp_path).epochs[0].masks[0][:, 0].any()


def test_a_run_that_was_resumed_forgets_the_epochs_to_come(run_folder):
    model = make_model()
    assert known(read(run_folder)) == [0, 2, 3]
    model.stages[0].blocks[0].conv_dw.group_mask[:, 1] = False
    write_epoch(run_folder, model, 1)
    run = read(run_folder)  # checkpoint-2 and -3 are those of before
    assert known(run) == [0, 1]
    assert not run.epochs[1].masks[0][:, 1].any()


def test_half_a_checkpoint_is_passed_over_and_read_when_it_is_whole(run_folder):
    last = run_folder / 'last.pth.tar'
    (run_folder / 'checkpoint-3.pth.tar').unlink()
    whole = last.read_bytes()
    last.write_bytes(whole[:len(whole) // 2])
    run = read(run_folder)
    assert known(run) == [0, 2]
    assert len(run.passed_over) == 1 and 'last.pth.tar' in run.passed_over[0]
    last.write_bytes(whole)
    assert (known(read(run_folder)), read(run_folder).passed_over) == ([0, 2, 3], ())


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_passed_over(run_folder, monkeypatch):
    read_weights = reading.read_weights

    def replaced(file, **kwargs):
        state = read_weights(file, **kwargs)
        if file.name == 'checkpoint-2.pth.tar':
            os.utime(file, ns=(1, time.time_ns()))
        return state

    monkeypatch.setattr(reading, 'read_weights', replaced)
    run = read(run_folder)
    assert known(run) == [0, 3] and 'replaced' in run.passed_over[0]


def test_a_diverged_epoch_and_one_of_another_network_are_passed_over(run_folder):
    diverged, other = make_model(), make_model(num_classes=5, num_shuffles=2)
    with torch.no_grad():
        diverged.stem[0].weight.fill_(torch.nan)
    write_epoch(run_folder, diverged, 4)
    write_epoch(run_folder, other, 1, 'checkpoint-1.pth.tar')
    run = read(run_folder)
    assert known(run) == [0, 2, 3]
    text = ' '.join(run.passed_over)
    assert 'NaN' in text and 'checkpoint-1.pth.tar' in text and 'wiring' in text


def test_a_code_running_checkpoint_runs_nothing(run_folder):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(run_folder / 'evil'),)

    torch.save({'epoch': 9, 'state_dict': Evil()}, run_folder / 'last.pth.tar')
    run = read(run_folder)
    assert known(run) == [0, 2, 3] and not (run_folder / 'evil').exists()
    assert 'refused' in run.passed_over[0]


def test_a_run_without_checkpoints_says_what_was_looked_for(tmp_path):
    with pytest.raises(NoRunError, match=r'holds none: looked for args\.yaml, last\.pth\.tar'):
        find_run(tmp_path)
    write_run(tmp_path / 'run')
    with pytest.raises(NoRunError, match=r'no checkpoint that can be read: looked for last\.pth\.tar'):
        read(tmp_path / 'run')
    torch.save(make_model().state_dict(), tmp_path / 'run' / 'last.pth.tar')
    with pytest.raises(NoRunError, match=r'last\.pth\.tar tells no epoch'):
        read(tmp_path / 'run')
    write_epoch(tmp_path / 'run', make_model(), 10 ** 9)
    with pytest.raises(NoRunError, match=r'last\.pth\.tar tells no epoch'):
        read(tmp_path / 'run')


def test_of_several_runs_the_one_begun_last_is_found(tmp_path):
    for age, name in enumerate(('new', 'old')):
        write_run(tmp_path / name)
        os.utime(tmp_path / name / 'args.yaml', (1e9 - age, 1e9 - age))
    assert find_run(tmp_path) == tmp_path / 'new'
    assert find_run(tmp_path / 'old') == tmp_path / 'old'


# the record

@pytest.mark.parametrize(('change', 'named'), [
    (dict(seed=2), "seed is 1, that of this run 2"),
    (dict(model_kwargs=dict(num_shuffles=4)), 'model_kwargs is None'),
])
def test_the_record_of_another_run_is_not_mixed_with_this_one(run_folder, change, named):
    read(run_folder)
    kept = record_of(run_folder).read_bytes()
    args = yaml.safe_load((run_folder / 'args.yaml').read_text())
    (run_folder / 'args.yaml').write_text(yaml.safe_dump({**args, **change}))
    with pytest.raises(RecordError, match=f'watch.safetensors is the record of another run: its {named}'):
        read(run_folder)
    assert record_of(run_folder).read_bytes() == kept


def test_the_record_stays_with_a_folder_that_is_moved_and_is_of_no_other(run_folder, tmp_path):
    read(run_folder)
    moved = run_folder.rename(tmp_path / 'moved')
    assert known(read(moved)) == [0, 2, 3]
    read_history(moved, tmp_path / 'page.safetensors')
    shutil.copytree(moved, tmp_path / 'other')
    with pytest.raises(RecordError, match='its folder is'):
        read_history(tmp_path / 'other', tmp_path / 'page.safetensors')


def test_files_that_are_no_record_are_left_alone(run_folder):
    file = record_of(run_folder)
    save_file({'weight': torch.zeros(2)}, file)
    with pytest.raises(RecordError, match='no record of a run: it is not written over'):
        read(run_folder)
    file.unlink()
    read(run_folder)
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(RecordError, match='cannot be read'):
        read(run_folder)
    assert file.read_bytes() == whole[:-3]


# the curves

def test_curves_follow_what_a_resumed_run_told_last():
    names = ('epoch', 'train_loss', 'lr')
    rows = [dict(zip(names, row, strict=False)) for row in [
        ('0', '3.0', '1e-3'), ('1', '2.0', 'nan'), ('2', '1.0', '1e-4'), names, ('1', '2.5', ''), ('2.0', '1.5'),
        ('1e9', '1.0', '1e-4'), ('-1', '1.0', '1e-4')]]
    assert curves_of(rows) == {'train_loss': {0: 3., 1: 2.5, 2: 1.5}, 'lr': {0: 1e-3}}
    assert curves_of([]) == curves_of([{'loss': '1'}]) == {}


# what changed

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2 ** 32 - 1))
def test_fates_are_those_counted_group_by_group(epochs, paths, channels, maps, seed):
    generator = np.random.default_rng(seed)
    masks = generator.random((epochs, paths, channels, maps)) < .6
    cells = fates(list(masks))
    for channel in range(channels):
        for group in range(maps):
            kept = [bool(masks[epoch, :, channel, group].any()) for epoch in range(epochs)]
            changes = sum(a != b for a, b in itertools.pairwise(kept))
            wanted = {0: (Fate.NEVER, Fate.KEPT), 1: (Fate.PRUNED, Fate.GROWN)}.get(changes, (Fate.OFTEN, Fate.OFTEN))
            assert cells[channel, group] == wanted[kept[-1]]


def test_shares_of_stages_are_those_of_their_layers():
    model = timm.create_model('sw_tiny', **SMALL)
    groups = network_groups(model)
    generator = np.random.default_rng(0)
    epochs = [
        Epoch(number, 0, (0, 0), tuple(generator.random(mask.shape) < .5 for mask in masks_of(model)))
        for number in (0, 1, 4)]
    first, second = stage_histories(epochs, groups)
    assert (first.layers, second.layers) == (slice(0, 1), slice(1, 3))
    for stage in (first, second):
        layers = [[epoch.masks[i] for i in range(*stage.layers.indices(3))] for epoch in epochs]
        total = sum(mask[0].size for mask in layers[0])
        for number, masks in zip((0, 1, 4), layers, strict=True):
            assert stage.kept[number] == pytest.approx(sum(mask.any(0).sum() for mask in masks) / total)
            assert [path[number] for path in stage.by_path] == pytest.approx(
                [sum(mask[path].sum() for mask in masks) / total for path in range(2)])
        assert [each[:2] for each in stage.exchanged] == [(0, 1), (1, 4)]
        new, old = ([bit for mask in layers[i] for bit in mask.ravel()] for i in (2, 1))
        grown = sum(bool(now and not then) for now, then in zip(new, old, strict=True))
        assert stage.exchanged[1][2] == pytest.approx(grown / sum(new))
        assert stage.has_paths_apart
    assert missing_epochs(epochs) == [2, 3]
    assert missing_epochs(epochs, interval=2) == [3]
    assert (ranges([]), ranges([0, 1, 2, 4, 6, 7])) == ('', '0-2, 4, 6-7')


def test_curves_are_broken_where_epochs_are_not_known_and_a_change_across_is_a_bar():
    def steps(line: Line) -> list[str]:
        """Of the curve, and of what else is drawn in its colour without a marker: what the pen does."""
        svg = draw_lines([line], 'unit', 'Seen: <all> of it')
        assert svg.startswith('<svg role="img" aria-label="Seen: &lt;all&gt; of it"') and 'var(--ink)' in svg
        drawn = re.findall(r'<path d="([^"]*)" clip-path[^>]*stroke: #0072b2', svg)
        return [''.join(re.findall('[A-Z]', path)) for path in drawn]

    assert steps(Line('seen', {0: 1., 1: 2., 2: 3., 5: 3., 6: 2.}, 0)) == ['MLLML']
    assert sorted(steps(Line('seen', {1: .4, 5: .3, 6: .2}, 0, since={1: 0, 5: 1, 6: 5}))) == ['ML', 'MML']


# the kernels

@pytest.mark.parametrize(('name', 'kwargs'), [
    ('sw_tiny', {}), ('eq_slak_tiny', {}), ('p_sw_tiny', dict(kernel_size=4, focus_lengths=(9, 5)))])
def test_wide_and_tall_kernels_compute_what_the_branches_do(name, kwargs):
    operator = timm.create_model(name, **{**SMALL, **kwargs}).double().stages[1].blocks[0].conv_dw
    operator.group_mask[0, 3, 0] = False
    kernels = operator.kernels.masked_fill(~operator.group_mask[..., None, None], 0).sum(0)
    x = torch.randn(1, operator.num_worked, 7, 9, dtype=torch.float64)
    h, v, _ = shiftwise_conv2d(x, kernels, operator.wiring, operator.focus_length, 'full')
    wide, tall = (torch.from_numpy(kernel) for kernel in wide_and_tall(operator))
    middles = (operator.kernel_size // 2, operator.focus_length // 2)
    for branch, kernel, middle in ((h, wide, middles), (v, tall, middles[::-1])):
        kernel = _in_the_middle(kernel, *middle)
        out = F.conv2d(
            x, kernel[:, None].double(), padding=[side // 2 for side in kernel.shape[1:]], groups=len(kernel))
        torch.testing.assert_close(out, branch, atol=1e-6, rtol=1e-5)  # kernels are drawn in single precision


def _in_the_middle(kernel: Tensor, row: int, column: int) -> Tensor:
    """Kernels with zeros added until the element at a row and column is in the middle."""
    rows, columns = kernel.shape[1:]
    above, left = max(rows - 1 - 2 * row, 0), max(columns - 1 - 2 * column, 0)
    below, right = max(2 * row + 1 - rows, 0), max(2 * column + 1 - columns, 0)
    return F.pad(kernel, [left, right, above, below])


def test_large_kernels_are_their_own_and_merged_ones_say_what_they_hold():
    slak = timm.create_model('slak_tiny', **SMALL).stages[0].blocks[0].conv_dw
    for kernel, conv in zip(wide_and_tall(slak), (slak.conv_h, slak.conv_v), strict=True):
        assert np.array_equal(kernel, conv.weight.detach()[:, 0])
    merged = reparameterize_model(timm.create_model('sw_tiny', **SMALL)).stages[0].blocks[0].conv_dw
    assert [len(kernel) for kernel in wide_and_tall(merged)] == [merged.num_worked] * 2
    same = timm.create_model('p2_sw_tiny', **SMALL)
    kernels = wide_and_tall(same.stages[0].blocks[0].conv_dw)
    merged_same = reparameterize_model(same).stages[0].blocks[0].conv_dw
    assert all(map(np.array_equal, wide_and_tall(merged_same), kernels))
    assert 'merged' in caveat(merged) and 'border' in caveat(merged_same) and caveat(slak) == ''


# the page

class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections, self.loads, self.described, self.tags = [], [], [], set()
        self.words = ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.add(tag)
        if tag == 'section':
            self.sections.append(values['id'])
        self.loads += [value for name, value in attrs if name in ('src', 'href', 'xlink:href', 'srcset', 'data')]
        if tag in ('img', 'svg'):
            self.described.append(values.get('alt') or values.get('aria-label'))

    def handle_data(self, data):
        self.words = ' '.join([self.words, *data.split()])


def page_of(folder: Path, **options) -> Page:
    return Page(render_page(read(folder), **options))


def test_the_page_has_its_parts_loads_nothing_and_describes_every_picture(run_folder):
    page = page_of(run_folder)
    assert page.sections == ['curves', 'kept', 'groups', 'kernels']
    assert page.loads and all(link.startswith(('data:image/png;base64,', '#')) for link in page.loads)
    assert all(page.described) and 'script' not in page.tags
    # curves, shares, a map of each of five blocks, and two kernels and the groups of four channels of four stages
    assert len(page.described) == 3 + 2 + 5 + 4 * 4 * 3
    assert 'Masks are known of epochs 0, 2-3.' in page.words and 'Not known: 1.' in page.words
    assert '--checkpoint-hist' in page.words
    assert 'from epoch 2 to 3' in page.words and 'from epoch 0 to 3' in page_of(run_folder, since=0).words
    few = page_of(run_folder, only=[2, 3], channels=1)
    assert len(few.described) == 3 + 2 + 3 + 2 * 3


def test_names_of_the_users_are_shown_as_they_are(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / '<b>&amp;<script>x')
    text = render_page(read(folder))
    assert 'test_sw: <b>&amp;<script>x' in Page(text).words
    assert not {'b', 'script'} & Page(text).tags


def test_the_page_of_a_dense_run_and_of_one_epoch(tmp_path):
    write_run(tmp_path, model_ema=True)
    write_epoch(tmp_path, make_model(sparsity=0), 0)
    page = page_of(tmp_path)
    assert 'Dense: every group was kept' in page.words and 'Nothing is pruned' in page.words
    assert 'no summary.csv yet' in page.words
    sparse = make_model()
    sparse.stages[0].blocks[0].conv_dw.group_mask[:, 0] = False
    write_epoch(tmp_path, sparse, 0)
    write_summary(tmp_path, 1)
    page = page_of(tmp_path)
    assert 'begin with the last known epoch' in page.words and 'moving average' in page.words
    assert 'Dense' not in page.words


@pytest.mark.parametrize(('name', 'merged', 'said'), [
    ('slak_tiny', False, 'A network of large kernels'),
    ('eq_slak_tiny', False, '7 of 7 groups kept'),
    ('p2_sw_tiny', False, 'windows over the border are dropped'),
    ('sw_v2_tiny', True, 'The network is merged'),
])
def test_the_page_of_other_networks_says_what_there_is(name, merged, said, tmp_path):
    model = timm.create_model(name, **SMALL)
    sizes = {key: list(SMALL[key]) for key in ('depths', 'dims', 'focus_lengths')}
    write_run(tmp_path, name, model_kwargs=sizes)
    write_epoch(tmp_path, reparameterize_model(model) if merged else model, 0)
    page = page_of(tmp_path)
    assert said in page.words
    assert page.sections == (['curves', 'kernels'] if name == 'slak_tiny' else ['curves', 'kept', 'groups', 'kernels'])
    assert record_of(tmp_path).exists() == (name != 'slak_tiny')


MEASURE = '''<script>
document.body.dataset.measured = JSON.stringify({
  pictures: [...document.querySelectorAll('svg, img')].map(each => {
    const box = each.getBoundingClientRect();
    return [box.width, box.height, each.tagName == 'IMG' ? each.naturalWidth : 1];
  }),
  loaded: performance.getEntriesByType('resource').map(each => each.name).filter(name => !name.startsWith('data:')),
  sections: [...document.querySelectorAll('section')].map(each => each.getBoundingClientRect().height),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
});
</script>'''


def browse(page: Path, *options: str) -> subprocess.CompletedProcess:
    """Open a page in a browser of a profile of its own."""
    command = [
        BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
        f'--user-data-dir={page.parent / "profile"}', '--enable-logging=stderr', '--dump-dom', *options,
        page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(BROWSER is None, reason='no chromium to open the page in')
@pytest.mark.parametrize('width', [500, 1200])  # of windows, of which the first is the narrowest that there is
def test_a_browser_shows_the_page_and_loads_nothing_else(run_folder, width):
    text = render_page(read(run_folder))
    page = run_folder / 'page.html'
    page.write_text(text)
    opened = browse(page, f'--window-size={width},900')
    assert 'CONSOLE' not in opened.stderr, opened.stderr
    # what the page forbids is allowed to measure it
    page.write_text(re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', '', text).replace(
        '</body>', f'{MEASURE}</body>'))
    shown = browse(page, f'--window-size={width},900')
    assert 'CONSOLE' not in shown.stderr, shown.stderr
    measured = json.loads(re.search(r'data-measured="([^"]*)"', shown.stdout)[1].replace('&quot;', '"'))
    assert len(measured['pictures']) == len(Page(text).described)
    assert all(min(sizes) > 0 for sizes in measured['pictures'])
    assert len(measured['sections']) == 4 and min(measured['sections']) > 50
    assert (measured['loaded'], measured['overflow']) == ([], 0)


# the command

def test_the_command_writes_a_page_and_says_where(run_folder, capsys):
    assert main(['watch', str(run_folder.parent)]) == 0
    shown = ' '.join(capsys.readouterr().out.split())
    assert 'begun last' in shown and str(run_folder / 'watch.html') in shown
    last, before = read(run_folder).epochs[-1:-3:-1]
    stage = stage_histories((before, last), network_groups(make_model()))[0]
    assert f'1 {100 * stage.kept[3]:.1f} % {100 * stage.exchanged[0][2]:.1f} % (epoch 2)' in shown
    page = (run_folder / 'watch.html').read_text()
    assert 'http-equiv="refresh"' not in page
    elsewhere = run_folder.parent / 'here.html'
    assert main(['watch', str(run_folder), '--output', str(elsewhere), '--stage', '1']) == 0
    assert elsewhere.is_file() and elsewhere.with_suffix('.safetensors').is_file()


def test_following_waits_writes_anew_and_ends_when_interrupted(tmp_path, monkeypatch, capsys):
    model = make_model()
    write_run(tmp_path)
    page = tmp_path / 'watch.html'
    pages = []

    def work(seconds: float) -> None:
        """What goes on while the command sleeps."""
        assert seconds == 2.5
        pages.append(page.read_text() if page.exists() else None)
        if len(pages) == 1:
            write_epoch(tmp_path, model, 0)
        elif len(pages) == 3:  # nothing in the second
            model.stages[0].blocks[0].conv_dw.group_mask[:, 0] = False
            write_epoch(tmp_path, model, 1)
        elif len(pages) == 4:
            write_summary(tmp_path, 2)
        elif len(pages) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, 'sleep', work)
    assert main(['watch', str(tmp_path), '--follow', '2.5']) == 0
    assert pages[0] is None and pages[1] == pages[2] and len(set(pages)) == 4
    assert all('http-equiv="refresh" content="2.5"' in text for text in pages[1:])
    assert 'http-equiv="refresh"' not in page.read_text()
    assert 'Masks are known of epochs 0-1.' in Page(page.read_text()).words
    shown = capsys.readouterr().out
    assert shown.startswith('Waiting: ') and shown.count('epoch 1:') == 2
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {'args.yaml', 'last.pth.tar', 'summary.csv', 'watch.html', 'watch.safetensors'}


def test_what_is_interrupted_in_the_middle_leaves_the_page_as_it_was(run_folder, monkeypatch):
    assert main(['watch', str(run_folder)]) == 0
    whole = (run_folder / 'watch.html').read_bytes()
    write_summary(run_folder, 3)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, 'write_text', interrupted)
    assert main(['watch', str(run_folder), '--follow']) == 0
    assert (run_folder / 'watch.html').read_bytes() == whole
    assert not list(run_folder.glob('.*'))


@pytest.mark.parametrize(('options', 'said'), [
    (['--output', 'page.htm'], "--output takes a file that ends in .html, got 'page.htm'"),
    (['--output', 'no/where/page.html'], 'cannot be kept beside no/where/page.html'),
    (['--channels', '0'], 'There must be at least 1 channel to draw, got 0'),
    (['--stage', '1', '5'], 'test_sw has stages 1 to 4, not 5'),
    (['--since', '4'], 'No epoch is known since 4, the last is 3'),
    (['--follow', '0'], "expected seconds above 0, got '0'"),
    (['--follow', 'nan'], "expected seconds above 0, got 'nan'"),
])
def test_wrong_options_are_told(options, said, run_folder, capsys):
    try:
        assert main(['watch', str(run_folder), *options]) == 2
    except SystemExit as exit_:  # argparse's own
        assert exit_.code == 2
    assert said in capsys.readouterr().err
    assert not (run_folder / 'watch.html').exists()


def test_a_folder_that_is_no_run_and_one_of_another_network_are_told(run_folder, tmp_path, capsys):
    for folder, said in ((tmp_path / 'nothing', 'is no run of train.py'), (run_folder / 'args.yaml', 'is no run of')):
        assert main(['watch', str(folder)]) == 2
        assert said in capsys.readouterr().err
    write_run(run_folder, 'sw_tiny')
    assert main(['watch', str(run_folder)]) == 2
    assert 'The checkpoint is none of sw_tiny' in capsys.readouterr().err
    write_run(run_folder, 'resnet50')
    assert main(['watch', str(run_folder)]) == 2
    assert "'resnet50' is no network of this package" in capsys.readouterr().err

"""Which groups a network keeps: counted, printed and drawn."""
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from authors_networks import AuthorsNetwork
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.utils import reparameterize_model
from torch import nn

from timm_shiftwise.cli import main
from timm_shiftwise.profile import network_groups
from timm_shiftwise.sparsity.masks import random_mask

pytest.importorskip('matplotlib')

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from timm_shiftwise.profile import picture

SMALL = dict(depths=(1, 2, 1), dims=(12, 16, 24), focus_lengths=(15, 13, 6), num_classes=7)
DENSITIES = (.2, .6, .7, .9)
each_family = pytest.mark.parametrize('name', ['sw_tiny', 'sw_v2_tiny', 'p_sw_tiny', 'p2_sw_tiny', 'eq_slak_tiny'])


def pruned(name: str, densities=DENSITIES, **kwargs) -> nn.Module:
    """A network with random masks of a density for each stage, the same for all paths."""
    model = timm.create_model(name, **kwargs)
    for stage, density in zip(model.stages, densities, strict=False):
        for index, block in enumerate(stage.blocks):
            mask = block.conv_dw.group_mask
            count = max(1, round(density * mask[0].numel()))
            mask.copy_(random_mask(tuple(mask.shape[1:]), count, 1, 0, index))
    return model


def masks(model: nn.Module) -> list[torch.Tensor]:
    """The kept groups of a network, in order."""
    return [block.conv_dw.kept_groups() for stage in model.stages for block in stage.blocks]


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """What train.py leaves of a sparse run."""
    model = pruned('test_sw', num_classes=3)
    model.sparsity.phase.fill_(1)
    model.sparsity.step.fill_(4200)
    torch.save({'state_dict': model.state_dict(), 'arch': 'test_sw', 'epoch': 2}, tmp_path / 'last.pth.tar')
    return tmp_path


# counting

@each_family
def test_kept_groups_are_those_of_the_masks_before_and_after_merging(name):
    model = pruned(name, **SMALL)
    wanted = masks(model)
    groups = network_groups(model)
    layers = [layer for stage in groups.stages for layer in stage.layers]
    assert [layer.name for layer in layers] == [
        'stages.0.blocks.0.conv_dw', 'stages.1.blocks.0.conv_dw', 'stages.1.blocks.1.conv_dw',
        'stages.2.blocks.0.conv_dw']
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(layers, wanted, strict=True))
    assert groups.kept == sum(int(mask.sum()) for mask in wanted)
    assert groups.total == sum(mask.numel() for mask in wanted)
    assert groups.stages[1].kept == sum(int(mask.sum()) for mask in wanted[1:3])
    merged = network_groups(reparameterize_model(model))
    assert merged.updates == 'none'
    for stage, other in zip(groups.stages, merged.stages, strict=True):
        assert (stage.dim, stage.focus_length, stage.groups) == (other.dim, other.focus_length, other.groups)
        for layer, merged_layer in zip(stage.layers, other.layers, strict=True):
            assert torch.equal(layer.mask, merged_layer.mask)


def test_channels_without_a_group_are_counted():
    model = timm.create_model('test_sw')
    mask = model.stages[0].blocks[0].conv_dw.group_mask
    mask[:, [0, 3, 4]] = False
    mask[:, 1, 0] = False
    mask[0, 2] = False  # which the other path keeps
    layer = network_groups(model).stages[0].layers[0]
    assert (layer.empty_channels, layer.kept) == (3, mask[0].numel() - 10)
    assert layer.path_kept == (layer.kept - 3, layer.kept)


def test_what_has_no_groups_is_an_error():
    with pytest.raises(ValueError, match='SLaK'):
        network_groups(timm.create_model('slak_tiny', **SMALL))
    with pytest.raises(TypeError, match='Linear'):
        network_groups(nn.Linear(1, 1))


# the command

def test_the_table_shows_every_stage_and_layer(capsys, run_folder):
    assert main(['sparsity', str(run_folder)]) == 0
    shown = capsys.readouterr().out
    assert 'trained sparse for 4,200 optimiser steps' in ' '.join(shown.split())
    state = torch.load(run_folder / 'last.pth.tar', weights_only=True)['state_dict']
    for key, mask in state.items():
        if key.endswith('.group_mask'):
            mask = mask.any(0)
            line = next(line for line in shown.splitlines() if key.removesuffix('.group_mask') in line)
            assert line.split()[1:4] == [str(mask.numel()), str(int(mask.sum())), f'{100 * mask.float().mean():.1f}']
    assert sum(line.startswith('stage ') for line in shown.splitlines()) == 4


def test_json_and_csv_hold_the_same_counts(capsys, run_folder):
    assert main(['sparsity', str(run_folder), '--format', 'json']) == 0
    printed = json.loads(capsys.readouterr().out)
    assert main(['sparsity', str(run_folder), '--format', 'csv']) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    layers = [layer for stage in printed['stages'] for layer in stage['layers']]
    assert [(row['layer'], int(row['kept'])) for row in rows] == [(layer['layer'], layer['kept']) for layer in layers]
    assert sum(layer['kept'] for layer in layers) == printed['kept'] == sum(s['kept'] for s in printed['stages'])
    assert (printed['model'], printed['dense'], printed['schedule'], printed['step']) == (
        'test_sw', False, 'running', 4200)


@pytest.mark.parametrize('command', [['sparsity'], ['profile', 'test_sw', '--checkpoint']])
def test_what_any_path_keeps_is_shown_and_the_share_of_each(capsys, tmp_path, command):
    model = timm.create_model('test_sw')
    first, second = model.stages[0].blocks[0].conv_dw.group_mask
    first[:3] = False
    second[2:5] = False
    kept, total = network_groups(model).kept, network_groups(model).total
    shares = [1 - 9 / total] * 2
    assert kept == total - 3 and network_groups(model).path_densities == pytest.approx(shares)
    path = str(tmp_path / 'weights.pth')
    torch.save(model.state_dict(), path)
    assert main([*command, path, '--format', 'json']) == 0
    printed = json.loads(capsys.readouterr().out)
    of_stage = printed['stages'][0]
    assert (printed['kept'], printed['path_densities']) == (kept, pytest.approx(shares))
    assert (of_stage['kept'], of_stage['path_densities']) == (27, pytest.approx([.7] * 2))
    assert main([*command, path, '--format', 'csv']) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    row = next(row for row in rows if row.get('part', 'stage 1') == 'stage 1')
    assert [float(share) for share in row['path_densities'].split()] == pytest.approx([.7] * 2)
    assert main([*command, path]) == 0
    shown = capsys.readouterr().out
    assert 'by the paths 97.3 / 97.3 %' in ' '.join(shown.split())
    assert '70.0 / 70.0 %' in shown
    both = timm.create_model('test_sw', reparameterized=True)
    assert network_groups(both).path_densities == () and network_groups(both).is_dense
    second.fill_(True)
    assert not network_groups(model).is_dense, 'a path is pruned, though not all of them'


@pytest.mark.parametrize('kind', ['folder', 'pth', 'safetensors', 'hub', 'merged hub'])
def test_every_kind_of_checkpoint_is_read(capsys, tmp_path, kind):
    model = pruned('test_sw', num_classes=3)
    kept = sum(int(mask.sum()) for mask in masks(model))
    path = tmp_path / 'weights'
    if kind == 'folder':
        path.mkdir()
        torch.save({'state_dict': model.state_dict(), 'arch': 'test_sw'}, path / 'model_best.pth.tar')
    elif kind == 'pth':
        torch.save(model.state_dict(), path)
    elif kind == 'safetensors':
        path = path.with_suffix('.safetensors')
        save_file(model.state_dict(), path)
    else:
        args: dict = dict(num_classes=3)
        if kind == 'merged hub':
            args['reparameterized'] = True
            model = reparameterize_model(model)
        save_for_hf(model, str(path), model_args=args, safe_serialization=True)
    assert main(['sparsity', str(path), '--format', 'json']) == 0
    assert json.loads(capsys.readouterr().out)['kept'] == kept


@pytest.mark.parametrize('kind, model', [('sw', 'sw_tiny'), ('sw_v2', 'sw_v2_tiny')])
def test_groups_that_the_authors_pruned_are_recovered(capsys, tmp_path, kind, model):
    network = AuthorsNetwork(kind)
    state = network.state(pruned=.4)
    paths: dict[str, list[torch.Tensor]] = {}  # a group that is zero on all of them costs nothing
    for key, value in state.items():
        if '.LoRAs.' in key:
            paths.setdefault(key.split('.large_kernel.')[0], []).append(value)
    kept = sum(int((sum(w.abs() for w in weights).sum(dim=(1, 2, 3)) > 0).sum()) for weights in paths.values())
    torch.save({'model': state}, tmp_path / 'authors.pth')
    args = [f'{name}={value}' for name, value in network.model_args().items() if name != 'kernel_size']
    argv = ['sparsity', str(tmp_path / 'authors.pth'), '--model', model, '--format', 'json', '--model-kwargs']
    assert main([*argv, *args, f'kernel_size={network.size}']) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed['kept'] == kept < printed['total']
    assert [stage['focus_length'] for stage in printed['stages']] == list(network.lengths)


def test_a_dense_checkpoint_says_so(capsys, tmp_path):
    torch.save(timm.create_model('test_sw').state_dict(), tmp_path / 'dense.pth')
    assert main(['sparsity', str(tmp_path / 'dense.pth')]) == 0
    assert 'dense: every group is kept' in ' '.join(capsys.readouterr().out.split())
    assert main(['sparsity', str(tmp_path / 'dense.pth'), '--format', 'json']) == 0
    assert json.loads(capsys.readouterr().out)['dense'] is True


def test_a_checkpoint_of_large_kernels_says_so(capsys, tmp_path):
    torch.save(timm.create_model('slak_tiny', **SMALL).state_dict(), tmp_path / 'slak.pth')
    assert main(['sparsity', str(tmp_path / 'slak.pth')]) == 2
    shown = capsys.readouterr()
    assert shown.out == ''
    assert 'SLaK' in shown.err


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def test_a_pickle_that_runs_code_is_refused(capsys, tmp_path):
    torch.save({'state_dict': Bomb(tmp_path / 'it_ran')}, tmp_path / 'bad.pth')
    assert main(['sparsity', str(tmp_path / 'bad.pth')]) == 2
    assert 'refused' in capsys.readouterr().err
    assert not (tmp_path / 'it_ran').exists()


@pytest.mark.parametrize('argv, message', [
    (['nowhere.pth'], 'nowhere.pth'),
    (['{run}', '--output', '{run}/groups.jpg'], '.png'),
    (['{run}', '--output', '{run}/no/such/folder.png'], 'No such file'),
    (['{run}', '--model', 'sw_tiny'], 'test_sw'),
    (['{run}', '--model', 'resnet50'], 'resnet50'),
])
def test_what_the_command_cannot_do_is_said_without_a_traceback(capsys, run_folder, argv, message):
    assert main(['sparsity', *(part.format(run=run_folder) for part in argv)]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert 'Traceback' not in shown


# the picture

def draw(model: nn.Module, path: Path) -> np.ndarray:
    """Draw the groups of a network and read the picture back, [height, width, 3]."""
    picture.draw_groups(network_groups(model), 'a network', path)
    return np.asarray(Image.open(path).convert('RGB'))


def share_of(colour: str, pixels: np.ndarray) -> float:
    return float((np.abs(pixels - 255 * np.array(to_rgb(colour))).max(axis=-1) < 2).mean())


def test_the_command_draws_beside_a_table_and_beside_json(capsys, run_folder):
    target = run_folder / 'groups.png'
    assert main(['sparsity', str(run_folder), '--output', str(target), '--format', 'json']) == 0
    shown = capsys.readouterr()
    json.loads(shown.out)
    assert str(target) in shown.err.replace('\n', '')
    with Image.open(target) as image:
        assert image.format == 'PNG'
        assert image.width > 1000
    assert sorted(path.name for path in run_folder.iterdir()) == ['groups.png', 'last.pth.tar']


def test_the_coloured_share_follows_the_kept_share(tmp_path):
    full = draw(timm.create_model('test_sw'), tmp_path / 'a.png')
    half = draw(pruned('test_sw', (.5, .5, .5, .5)), tmp_path / 'b.png')
    for colour in picture._COLOURS:
        assert share_of(colour, half) == pytest.approx(share_of(colour, full) / 2, rel=.12)
    assert share_of(picture._PRUNED, half) > 10 * share_of(picture._PRUNED, full)


def test_a_map_has_a_row_for_each_channel_the_fullest_first():
    mask = torch.tensor([[True, False], [True, True], [False, False], [False, True]])
    pixels = picture._map_pixels(mask, '#000000')
    assert pixels.shape == (4, 2, 3)
    assert (pixels[..., 0] == 0).tolist() == [[True, True], [True, False], [False, True], [False, False]]


def test_channels_beyond_the_pixels_are_averaged():
    mask = random_mask((1999, 5), 4000, 0, 0, 0)
    pixels = picture._map_pixels(mask, '#000000')
    light = to_rgb(picture._PRUNED)[0]
    assert len(pixels) < 1999
    assert 1 - pixels[..., 0].mean() / light == pytest.approx(4000 / mask.numel(), abs=.01)


@pytest.mark.parametrize('name, layers', [('sw_tiny', 18), ('sw_base', 36), ('test_sw', 5)])
def test_every_layer_has_a_bar_and_a_map_and_nothing_is_cut_off(name, layers):
    groups = network_groups(pruned(name))
    figure = picture._figure(groups, name)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    maps = [axes for axes in figure.axes if axes.images]
    assert len(maps) == len(groups.stages)
    assert sum(len(axes.images) for axes in maps) == layers
    bars = [axes for axes in figure.axes if not axes.images]
    heights = [bar.get_height() for axes in bars for bar in axes.patches if bar.get_height() != 100]
    assert heights == pytest.approx([100 * layer.density for stage in groups.stages for layer in stage.layers])
    texts = [*figure.texts, *figure.legends[0].get_texts(), *(text for axes in figure.axes for text in axes.texts)]
    assert any(name in text.get_text() for text in texts)
    assert {'pruned', 'kept, stage 4'} <= {text.get_text() for text in texts}
    for text in texts:
        box = text.get_window_extent(canvas.get_renderer())
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()
    for axes in bars:
        # labels of neighbours, and headings, do not run into each other
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1:])


def test_a_picture_that_fails_leaves_the_old_one_and_no_remains(tmp_path, monkeypatch):
    target = tmp_path / 'groups.png'
    target.write_bytes(b'old')

    def fail(self, stream):
        stream.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(FigureCanvasAgg, 'print_png', fail)
    with pytest.raises(OSError, match='No space'):
        picture.draw_groups(network_groups(timm.create_model('test_sw')), 'test_sw', target)
    assert [path.name for path in tmp_path.iterdir()] == ['groups.png']
    assert target.read_bytes() == b'old'


def test_drawing_leaves_pyplot_alone_and_counting_needs_no_matplotlib(run_folder):
    script = f'''
import sys
from timm_shiftwise.cli import main
assert main(['sparsity', {str(run_folder)!r}, '--format', 'csv']) == 0
assert 'matplotlib' not in sys.modules
assert main(['sparsity', {str(run_folder)!r}, '--format', 'csv', '--output', {str(run_folder / 'x.png')!r}]) == 0
assert 'matplotlib.pyplot' not in sys.modules
'''
    run = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

"""`timm-shiftwise export`: files that run without the package, give its logits, and are refused where they do not."""
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from timm_shiftwise.cli import main
from timm_shiftwise.hub import export as module
from timm_shiftwise.hub.errors import HubError
from timm_shiftwise.hub.export import INT8_ALL, INT8_BUT_DEPTHWISE, export, open_file

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')


@pytest.fixture(scope='module')
def network():
    """The packaged network, which reads digits."""
    return timm.create_model('test_sw.digits', pretrained=True).eval()


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    """A folder of handwritten digits, twelve of each class."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp('digits')
    found = load_digits()
    for label in range(10):
        (folder / str(label)).mkdir()
        for index in np.flatnonzero(found.target == label)[:12]:
            pixels = (found.images[index] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).resize((64, 64)).convert('RGB').save(folder / str(label) / f'{index}.png')
    return folder


def noise(*size: int, count: int = 4) -> list[torch.Tensor]:
    """Images of noise."""
    return list(torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0)))


def logits_of(network, images) -> torch.Tensor:
    """Logits of the network itself."""
    with torch.inference_mode():
        return network(torch.stack(images))


@pytest.mark.parametrize('to, dynamic', [('onnx', True), ('torchscript', False), ('pt2', False), ('pt2', True)])
def test_a_file_gives_the_logits_of_the_network_it_was_made_of(network, tmp_path, to, dynamic):
    file = tmp_path / f'net.{to}'
    done = export(network, file, to, noise(64, 64), dynamic=dynamic)
    assert sorted(tmp_path.iterdir()) == [done.file, done.description] == [file, tmp_path / f'net.{to}.json']
    run = open_file(file, to)
    sizes = [(64, 64), (96, 64), (64, 136)] if dynamic else [(64, 64)]
    for size in sizes:
        images = noise(*size, count=3)
        wanted = logits_of(network, images)
        torch.testing.assert_close(run(torch.stack(images)), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    told = json.loads(done.description.read_text())
    assert told['input']['shape'] == (['B', 3, 'H', 'W'] if dynamic else ['B', 3, 64, 64])
    assert told['input']['mean'] == [0.5, 0.5, 0.5] and told['compared']['kept'] == 'float32'
    assert not any(hasattr(block.conv_dw, 'tall') for stage in network.stages for block in stage.blocks)


def test_a_file_in_half_precision_names_the_same_classes(network, tmp_path):
    done = export(network, tmp_path / 'net.onnx', 'onnx', noise(64, 64), half=True)
    assert done.kept.name == 'float16' and 0 < done.kept.error < 0.02
    assert json.loads(done.description.read_text())['input']['dtype'] == 'float16'
    kinds = {weight.data_type for weight in onnx.load(done.file).graph.initializer if np.prod(weight.dims) > 100}
    assert onnx.TensorProto.FLOAT16 in kinds and onnx.TensorProto.FLOAT not in kinds


def test_int8_is_measured_whole_and_with_its_depthwise_kernels_in_float(tmp_path, digits, capsys):
    file = tmp_path / 'net.onnx'
    command = ['export', 'test_sw.digits', '--pretrained', '--to', 'onnx', '--output', str(file)]
    assert main([*command, '--int8', str(digits), '--samples', '60']) == 0
    shown = capsys.readouterr().out
    assert INT8_BUT_DEPTHWISE in shown and '60 images of' in shown
    told = json.loads(Path(f'{file}.json').read_text())
    forms = {form['name']: form for form in told['compared']['forms']}
    assert forms.keys() == {INT8_ALL, INT8_BUT_DEPTHWISE}
    whole, mixed = forms[INT8_ALL], forms[INT8_BUT_DEPTHWISE]
    better = mixed['error'] < whole['error'] or mixed['milliseconds'] < whole['milliseconds']
    assert told['compared']['kept'] == (INT8_BUT_DEPTHWISE if better else INT8_ALL)
    assert forms[told['compared']['kept']]['agreement'] >= 0.95
    weights = [w for w in onnx.load(file).graph.initializer if w.data_type == onnx.TensorProto.INT8]
    assert any(len(w.dims) == 2 for w in weights)  # linear layers


def test_a_file_that_disagrees_is_not_kept(network, tmp_path, monkeypatch):
    opened = module.open_file
    monkeypatch.setattr(module, 'open_file', lambda *args: lambda x: 1.01 * opened(*args)(x))
    with pytest.raises(HubError, match='does not give the logits of PyTorch'):
        export(network, tmp_path / 'net.pt2', 'pt2', noise(64, 64))
    monkeypatch.setattr(module, 'open_file', lambda *args: lambda x: -opened(*args)(x))
    with pytest.raises(HubError, match=r'names the class that PyTorch does for 0\.0%'):
        export(network, tmp_path / 'net.pt2', 'pt2', noise(64, 64), half=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('change, said', [
    (dict(to='tflite'), "got 'tflite'"),
    (dict(images=[]), 'at least one image'),
    (dict(int8=True), 'int8 is for ONNX'),
    (dict(least_agreement=1.5), 'between 0 and 1'),
    (dict(labels=['a', 'b']), 'each of 10 classes, got 2'),
])
def test_what_cannot_be_exported_is_an_error_and_writes_nothing(network, tmp_path, change, said):
    arguments = {'output': tmp_path / 'net.pt2', 'to': 'pt2', 'images': noise(64, 64), **change}
    with pytest.raises(HubError, match=said):
        export(network, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_replaced_only_if_asked(network, tmp_path):
    file = tmp_path / 'net.pt2'
    file.write_text('mine')
    with pytest.raises(HubError, match='--overwrite'):
        export(network, file, 'pt2', noise(64, 64))
    assert file.read_text() == 'mine' and not Path(f'{file}.json').exists()
    assert open_file(export(network, file, 'pt2', noise(64, 64), overwrite=True).file, 'pt2')


def test_the_command_takes_a_checkpoint_and_real_images(tmp_path, digits, capsys):
    checkpoint = tmp_path / 'mine.safetensors'
    save_file(timm.create_model('test_sw.digits', pretrained=True).state_dict(), checkpoint)
    file = tmp_path / 'net.pt2'
    base = ['export', str(checkpoint), '--to', 'pt2', '--output', str(file), '--images', str(digits), '--size', '64']
    assert main([*base, '--samples', '5']) == 0
    shown = ' '.join(capsys.readouterr().out.split())
    assert '5 images of' in shown and '100.0%' in shown and file.is_file()


@pytest.mark.parametrize('arguments, said', [
    (['no_such_network', '--to', 'onnx'], 'no_such_network'),
    (['test_sw', '--to', 'onnx', '--images', 'no/such/folder'], 'no/such/folder'),
    (['test_sw', '--to', 'pt2', '--int8', '.'], 'int8 is for ONNX'),
    (['test_sw', '--to', 'pt2', '--size', '0'], 'one or two numbers of at least 1'),
    (['test_sw', '--to', 'pt2', '--samples', '0'], '--samples'),
    (['test_sw', '--to', 'pt2', '--size', '32', '--output', 'no/such/folder/net.pt2'], 'no/such/folder'),
])
def test_bad_arguments_of_the_command_are_told_in_a_line(arguments, said, capsys, tmp_path, monkeypatch, digits):
    monkeypatch.chdir(digits)
    output = [] if '--output' in arguments else ['--output', str(tmp_path / 'net')]
    assert main(['export', *arguments, *output]) == 2
    error = ' '.join(capsys.readouterr().err.split())
    assert said in error and 'Traceback' not in error and list(tmp_path.iterdir()) == []


def test_openvino_runs_the_file(network, tmp_path):
    openvino = pytest.importorskip('openvino')
    file = export(network, tmp_path / 'net.onnx', 'onnx', noise(64, 64)).file
    compiled = openvino.Core().compile_model(str(file), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    images = noise(64, 64, count=3)
    wanted = logits_of(network, images)
    seen = torch.from_numpy(compiled(torch.stack(images).numpy())[0])
    torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))

"""The code and the commands of the README, as they stand there."""
import os
import re
import runpy
import shlex
from pathlib import Path

import pytest
import timm
import torch
import yaml
from authors_networks import AuthorsNetwork
from hub_server import connected
from safetensors.torch import save
from usage_code import code_blocks

from timm_shiftwise.cli import main
from timm_shiftwise.cli.recipe import recipes
from timm_shiftwise.models.pretrained import ORGANISATION

README = (Path(__file__).parent.parent / 'README.md').read_text(encoding='utf-8')
COMMANDS = [
    line.strip() for block in code_blocks(README, 'sh') for line in block.splitlines()
    if line.strip() and not line.startswith('#')]
SCRIPTS = Path(os.environ.get('TIMM_SCRIPTS') or 'TIMM_SCRIPTS is not set')
IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IMAGES)


def words_after(command: str, start: str) -> list[str]:
    """Arguments of a command; what the shell would put in is the path of a recipe."""
    command = re.sub(r'"\$\(timm-shiftwise recipe (\w+)\)"', lambda match: shlex.quote(recipes()[match[1]]), command)
    return shlex.split(command.partition(start)[2])


def test_every_block_is_of_a_kind_that_a_test_reads():
    languages = re.findall(r'^```(\w+)$', README, re.MULTILINE)
    assert languages.count('python') == 2 and set(languages) == {'python', 'sh', 'bibtex'}
    starts = 'python3 -m venv', 'python train.py', 'torchrun', 'timm-shiftwise'
    assert all(command.startswith(starts) for command in COMMANDS)


@pytest.mark.slow
def test_the_first_code_runs_with_its_comments_taken_away(tmp_path, monkeypatch):
    code = re.sub('^# model', 'model', code_blocks(README)[0], flags=re.MULTILINE)
    network = timm.create_model('sw_tiny')
    weights = save(network.state_dict())
    config = b'{"architecture": "sw_tiny", "num_classes": 1000, "model_args": {}, "pretrained_cfg": {}}'
    seen = []
    with connected(tmp_path, monkeypatch) as hub:
        hub.add(f'{ORGANISATION}/sw_tiny.in1k', {'model.safetensors': weights})
        hub.add('you/your_sw', {'model.safetensors': weights, 'config.json': config})
        create = timm.create_model
        monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: seen.append(create(*args, **kwargs)))
        exec(code, {})
    assert [model.num_classes for model in seen] == [10, 10, 1000, 1000]
    for model in seen[2:]:
        assert torch.equal(logits(model), logits(network))


@pytest.mark.slow
def test_the_code_for_the_authors_checkpoints_runs_and_gives_their_logits(tmp_path, monkeypatch):
    sizes = dict(lengths=(51, 49, 47, 13), classes=1000)
    slak = AuthorsNetwork('slak', depths=(3, 3, 9, 3), dims=(124, 249, 499, 998), size=5, **sizes)
    shiftwise = AuthorsNetwork('sw_v2', depths=(3, 3, 18, 3), dims=(80, 160, 320, 640), size=3, **sizes)
    torch.save({'model': slak.state()}, tmp_path / 'their_slak_tiny.pth')
    torch.save({'model': shiftwise.state(pruned=0.3)}, tmp_path / 'their_sw_tiny.pth')
    monkeypatch.chdir(tmp_path)
    networks = iter([slak, slak, shiftwise])
    for line in code_blocks(README)[1].splitlines():
        names = {'timm': timm}
        exec(line, names)
        network = next(networks)
        wanted = network.logits(network.state(pruned=0. if network is slak else 0.3), IMAGES)
        torch.testing.assert_close(logits(names['model']), wanted, rtol=1e-4, atol=1e-4)
    assert not list(networks)


@pytest.mark.slow
def test_a_training_run_is_converted_and_published_by_the_lines_given(tmp_path, monkeypatch):
    convert, publish = (
        next(command for command in COMMANDS if command.startswith(f'timm-shiftwise {name}'))
        for name in ('convert', 'publish'))
    run = tmp_path / words_after(convert, 'timm-shiftwise ')[1]
    run.mkdir(parents=True)
    network = timm.create_model('sw_tiny')
    torch.save({'state_dict': network.state_dict(), 'arch': 'sw_tiny'}, run / 'model_best.pth.tar')
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(model='sw_tiny', epochs=300)))
    monkeypatch.chdir(tmp_path)
    with connected(tmp_path, monkeypatch) as hub:
        hub.tokens['secret'] = 'you'
        monkeypatch.setenv('HF_TOKEN', 'secret')
        for command in (convert, publish):
            assert main(words_after(command, 'timm-shiftwise ')) == 0
        repository, = hub.repositories
        assert torch.equal(logits(timm.create_model(f'hf-hub:{repository}', pretrained=True)), logits(network))


@pytest.mark.slow
@pytest.mark.parametrize('command', [command for command in COMMANDS if re.search(r'(train|validate)\.py', command)])
def test_timms_scripts_know_the_arguments_given(command):
    if not (SCRIPTS / 'train.py').is_file():
        pytest.skip("train.py is not in timm's wheel: set TIMM_SCRIPTS to the directory that holds it")
    name = re.search(r'\w+\.py', command)[0]
    words = words_after(command.replace('...', 'PLACE'), f'{name} ')
    if '--config' in words:  # which train.py reads with a parser of its own
        at = words.index('--config')
        assert Path(words[at + 1]).is_file()
        del words[at:at + 2]
    runpy.run_path(str(SCRIPTS / name), run_name=name)['parser'].parse_args(words)

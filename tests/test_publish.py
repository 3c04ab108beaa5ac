"""From a Hub folder to the Hub, through the real huggingface_hub client and a server on the loopback address."""
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from authors_networks import AuthorsNetwork
from hub_server import HubServer, connected
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from usage_code import code_blocks, serve_a_photo

from timm_shiftwise.cli import main
from timm_shiftwise.hub.convert import convert
from timm_shiftwise.hub.errors import HubError
from timm_shiftwise.hub.publish import plan, publish

REPO = 'me/flowers'
SENT = ['README.md', 'config.json', 'model.safetensors']


@pytest.fixture(scope='module')
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('made')
    torch.manual_seed(0)
    torch.save(timm.create_model('test_sw', num_classes=4).state_dict(), folder / 'weights.pth')
    convert(folder / 'weights.pth', folder / 'flowers')
    return folder / 'flowers'


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / 'flowers'))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server on which the user `me` has a token."""
    with connected(tmp_path, monkeypatch) as server:
        server.tokens['secret'] = 'me'
        monkeypatch.setenv('HF_TOKEN', 'secret')
        yield server


def logits(model: torch.nn.Module) -> torch.Tensor:
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.eval()(images)


def load(name: str) -> torch.nn.Module:
    return timm.create_model(name, pretrained=True)


def assert_published(folder: Path, name: str = f'hf-hub:{REPO}') -> None:
    torch.testing.assert_close(logits(load(name)), logits(load(f'local-dir:{folder}')), rtol=0, atol=0)


def sent(hub: HubServer, repo_id: str = REPO, revision: str = 'main') -> dict[str, bytes]:
    repository = hub.repositories[repo_id]
    return repository.commits[repository.refs[revision]]


def test_a_published_folder_is_loaded_by_name(hub, folder):
    address = publish(plan(folder, REPO))
    assert address.startswith(f'{hub.endpoint}/{REPO}/commit/')
    assert_published(folder)
    files = sent(hub)
    assert sorted(files) == ['.gitattributes', *SENT]
    assert files['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    assert hub.repositories[REPO].messages == ['Add test_sw']
    assert not hub.repositories[REPO].private


def test_the_card_names_the_repository_and_its_code_runs(hub, folder, tmp_path, monkeypatch):
    publish(plan(folder, REPO))
    card = sent(hub)['README.md'].decode()
    assert '# Model card for flowers' in card and 'local-dir:' not in card
    blocks = code_blocks(card)
    assert len(blocks) == 3 and all(f"'hf-hub:{REPO}'" in block for block in blocks)
    assert 'local-dir:' in (folder / 'README.md').read_text()
    serve_a_photo(tmp_path, monkeypatch)
    for block in blocks:
        exec(block, {})


def test_publishing_again_replaces_what_changed(hub, folder):
    publish(plan(folder, REPO))
    state = load_file(folder / 'model.safetensors')
    state['head.fc.bias'] += 1
    save_file(state, folder / 'model.safetensors')
    publish(plan(folder, REPO))
    assert_published(folder)
    assert len(hub.repositories[REPO].messages) == 2
    publish(plan(folder, REPO))
    assert len(hub.repositories[REPO].messages) == 2


def test_pictures_are_sent_and_the_same_conversion_again_changes_nothing(hub, folder):
    for _ in range(2):
        convert(folder, folder.parent / 'shown', pictures=True, overwrite=True)
        planned = plan(folder.parent / 'shown', REPO)
        assert sorted(planned.files) == sorted([*SENT, 'receptive_field.png']) and not planned.left_out
        publish(planned)
    assert sent(hub)['receptive_field.png'] == (folder.parent / 'shown' / 'receptive_field.png').read_bytes()
    assert '(receptive_field.png)' in sent(hub)['README.md'].decode()
    assert len(hub.repositories[REPO].messages) == 1


def test_a_private_repository_is_private(hub, folder, monkeypatch):
    publish(plan(folder, REPO, private=True))
    assert hub.repositories[REPO].private
    assert_published(folder)
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(Exception, match='401'):
        timm.create_model(f'hf-hub:{REPO}', cache_dir=folder / 'elsewhere')


def test_nothing_private_is_sent_to_a_public_repository(hub, folder):
    hub.add(REPO, {'README.md': b'hello'})
    with pytest.raises(HubError, match=f'{REPO} is there already and is public, nothing was sent'):
        publish(plan(folder, REPO, private=True))
    assert sent(hub) == {'README.md': b'hello'}
    assert not any('preupload' in line or '/lfs/' in line for line in hub.requests)


def test_a_branch_is_made_and_found(hub, folder):
    hub.add(REPO, {'README.md': b'hello'})
    publish(plan(folder, REPO, revision='v2'))
    assert sent(hub) == {'README.md': b'hello'}
    assert_published(folder, f'hf-hub:{REPO}@v2')
    publish(plan(folder, REPO, revision='v2'))


def test_a_pull_request_is_opened_where_one_may_not_write(hub, folder):
    hub.add('them/flowers', {'README.md': b'hello'})
    address = publish(plan(folder, 'them/flowers', create_pr=True))
    assert address == f'{hub.endpoint}/them/flowers/discussions/1'
    assert sent(hub, 'them/flowers') == {'README.md': b'hello'}
    assert set(SENT) <= set(sent(hub, 'them/flowers', 'refs/pr/1'))
    with pytest.raises(HubError, match="leave out the revision 'v2'"):
        plan(folder, REPO, create_pr=True, revision='v2')


def test_a_dry_run_shows_everything_and_sends_nothing(hub, folder, capsys, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    (folder / 'notes.pth').write_bytes(b'x')
    assert main(['publish', str(folder), '--repo', REPO, '--private', '--dry-run']) == 0
    told = capsys.readouterr().out
    for part in (REPO, hub.endpoint, 'private', *SENT, f'{(folder / "model.safetensors").stat().st_size:,}',
                 'Not sent: notes.pth', f"'hf-hub:{REPO}'", 'Nothing was sent'):
        assert part in told
    assert hub.requests == []


def test_the_command_publishes_and_says_how_to_load(hub, folder, capsys):
    assert main(['publish', str(folder), '--repo', REPO, '--revision', 'v1']) == 0
    told = capsys.readouterr().out
    assert f"timm.create_model('hf-hub:{REPO}@v1', pretrained=True)" in told
    assert_published(folder, f'hf-hub:{REPO}@v1')
    assert main(['publish', str(folder), '--repo', 'no-user']) == 2
    assert 'USER/NAME' in capsys.readouterr().err


# what may be sent


def test_only_the_model_and_texts_and_pictures_are_sent(hub, folder, tmp_path):
    for name in ('LICENSE', 'curve.png', 'notes.txt'):
        (folder / name).write_bytes(b'mine')
    for name in ('pytorch_model.bin', '.env', 'args.yaml', 'weights.pth', 'run.sh'):
        (folder / name).write_bytes(b'not for others')
    (tmp_path / 'id_rsa').write_text('secret')
    (folder / 'key.txt').symlink_to(tmp_path / 'id_rsa')
    (folder / 'sub').mkdir()
    (folder / 'sub' / 'more.txt').write_text('deeper')
    os.mkfifo(folder / 'pipe.txt')
    (folder / 'two\nlines.txt').write_text('tricky')
    (folder / '..\\up.txt').write_text('tricky')
    planned = plan(folder, REPO)
    assert sorted(planned.files) == sorted([*SENT, 'LICENSE', 'curve.png', 'notes.txt'])
    assert len(planned.left_out) == 10 and 'link' in planned.left_out['key.txt']
    publish(planned)
    assert sorted(sent(hub)) == sorted(['.gitattributes', *planned.files])


@pytest.mark.parametrize('name', SENT)
def test_a_needed_file_must_be_a_file(hub, folder, tmp_path, name):
    (folder / name).rename(tmp_path / 'elsewhere')
    with pytest.raises(HubError, match=f'no {re.escape(name)}'):
        plan(folder, REPO)
    (folder / name).symlink_to(tmp_path / 'elsewhere')
    with pytest.raises(HubError, match=f'{re.escape(name)} in .* is a link'):
        plan(folder, REPO)


@pytest.mark.parametrize('repo_id', [
    'flowers', 'a/b/c', '../flowers', 'me/..', 'me/fl owers', 'me/', '/x', 'me/a--b', ''])
def test_a_name_that_no_repository_can_have_is_refused(hub, folder, repo_id):
    with pytest.raises(HubError, match=r'repository|USER/NAME'):
        plan(folder, repo_id)


@pytest.mark.parametrize('revision', ['../main', 'a b', 'x//y', '-f', 'refs/../main'])
def test_a_name_that_no_branch_can_have_is_refused(hub, folder, revision):
    with pytest.raises(HubError, match='no name of a branch'):
        plan(folder, REPO, revision=revision)


def change_config(folder: Path, **change) -> None:
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, **change}))


def spoil_weights(folder: Path, value: float) -> None:
    state = load_file(folder / 'model.safetensors')
    state['head.fc.bias'][0] = value
    save_file(state, folder / 'model.safetensors')


def swap_network(folder: Path) -> None:
    save_for_hf(timm.create_model('test_resnet'), str(folder), safe_serialization=True)


@pytest.mark.parametrize('spoil, told', [
    (lambda folder: (folder / 'config.json').write_text('{'), 'does not load'),
    (lambda folder: change_config(folder, architecture='no_such_network'), 'no_such_network'),
    (lambda folder: change_config(folder, model_args=dict(focus_lengths=[5, 5, 5, 5])), 'does not load'),
    (lambda folder: change_config(folder, model_args=dict(no_such_argument=1)), 'no_such_argument'),
    (lambda folder: (folder / 'model.safetensors').write_bytes(b'nothing'), 'cannot be read'),
    (lambda folder: spoil_weights(folder, float('inf')), 'not finite'),
    (swap_network, 'no network of this package'),
], ids=['json', 'name', 'shapes', 'argument', 'weights', 'infinite', 'other'])
def test_a_folder_that_does_not_load_is_not_published(hub, folder, spoil, told):
    spoil(folder)
    with pytest.raises(HubError, match=told):
        plan(folder, REPO)
    assert main(['publish', str(folder), '--repo', REPO]) == 2
    assert hub.requests == []


# what can go wrong on the way: the repository stays as it was, and the next attempt works


def test_without_a_token_nothing_is_asked(hub, folder, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(HubError, match=r'no token.*hf auth login'):
        publish(plan(folder, REPO))
    assert hub.requests == []


def test_a_token_that_is_not_valid_is_told(hub, folder, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'stolen')
    with pytest.raises(HubError, match=f'{REPO} .*not changed.*401.*token is not valid'):
        publish(plan(folder, REPO))
    assert hub.repositories == {}


def test_a_token_of_somebody_else_is_told(hub, folder):
    for _ in range(2):  # without their repository, then with it
        with pytest.raises(HubError, match=r'403.*may not write to them'):
            publish(plan(folder, 'them/flowers'))
        hub.add('them/flowers', {'README.md': b'hello'})
    assert sent(hub, 'them/flowers') == {'README.md': b'hello'}


STEPS = ['repos/create', 'validate-yaml', 'preupload', 'lfs/objects/batch', 'PUT /lfs/', 'commit/main']


@pytest.mark.parametrize('action', [404, 500, 503, 'refuse', 'cut', 'die'])
@pytest.mark.parametrize('step', STEPS)
def test_a_failing_server_is_told_and_changes_nothing(hub, folder, step, action):
    hub.add(REPO, {'README.md': b'hello'})
    hub.fail(step, action)
    with pytest.raises(HubError) as raised:
        publish(plan(folder, REPO))
    assert REPO in str(raised.value) and hub.endpoint in str(raised.value)
    assert raised.value.__cause__ is not None
    if step == 'commit/main' and action in ('cut', 'die'):
        # the Hub had done its work when the answer was lost
        assert set(SENT) <= set(sent(hub))
    else:
        assert sent(hub) == {'README.md': b'hello'}
    hub.faults.clear()
    hub.stop()
    hub.start()
    publish(plan(folder, REPO))
    assert_published(folder)


def test_a_server_that_is_not_there_is_told(hub, folder):
    hub.stop()
    with pytest.raises(HubError, match=f'{REPO} on {hub.endpoint} was not reached'):
        publish(plan(folder, REPO))


# the whole way


SLAK, SW, SW_V2 = (
    dict(depths=depths, dims=dims, size=size) for depths, dims, size in (
        ((3, 3, 9, 3), (124, 249, 499, 998), 5), ((3, 3, 9, 3), (96, 192, 384, 768), 5),
        ((3, 3, 18, 3), (80, 160, 320, 640), 3)))


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'model', 'sizes', 'merged'), [
    ('slak', 'slak_tiny', SLAK, False),
    ('slak', 'eq_slak_tiny', SLAK, True),
    ('sw', 'sw_tiny', SW, False),
    ('sw', 'sw_tiny', SW, True),
    ('sw_v2', 'sw_v2_tiny', SW_V2, True),
], ids=['slak', 'eq_slak, merged', 'sw', 'sw, merged', 'sw_v2, merged'])
def test_a_checkpoint_of_full_size_goes_all_the_way(hub, tmp_path, kind, model, sizes, merged):
    net = AuthorsNetwork(kind, lengths=(51, 49, 47, 13), classes=1000, **sizes)
    state = net.state(pruned=0.45)
    torch.save({'model': state}, tmp_path / 'authors.pth')
    args = ['convert', str(tmp_path / 'authors.pth'), '--output', str(tmp_path / 'out'), '--no-pictures']
    args += ['--model', model] * model.startswith('eq_') + ['--reparameterize'] * merged
    assert main(args) == 0
    assert main(['publish', str(tmp_path / 'out'), '--repo', f'me/{model}']) == 0
    loaded = load(f'hf-hub:me/{model}').eval().double()
    # double precision tells that the networks are the same
    state = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
    images = torch.randn(1, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = net.logits(state, images)
        # merged weights were rounded to single precision once more
        tolerance = 1e-6 * theirs.abs().max().item() if merged else 1e-9
        torch.testing.assert_close(loaded(images), theirs, atol=tolerance, rtol=0)

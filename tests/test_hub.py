"""Weights from the Hub, through the real huggingface_hub client and a server on the loopback address that can fail."""
import contextlib
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from hub_server import HubServer, connected
from safetensors.torch import save

import timm_shiftwise
from timm_shiftwise.models.pretrained import PretrainedWeightsError, WeightsNotPublishedError

REGISTERED = 'sw_tiny.in1k'
REPO = f'timm-shiftwise/{REGISTERED}'
SMALL = dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), focus_lengths=(11, 9, 7, 5))
"""Arguments that make a registered network small enough to be sent many times."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with connected(tmp_path, monkeypatch) as server:
        yield server


def weights(name: str = 'sw_tiny', seed: int = 0, **kwargs) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return timm.create_model(name, **{**SMALL, **kwargs}).state_dict()


def create(name: str = 'sw_tiny', **kwargs) -> torch.nn.Module:
    """A network with weights from the repository that its name would have, did somebody publish them."""
    return timm.create_model(
        name, pretrained=True, **{'pretrained_cfg_overlay': dict(hf_hub_id=REPO), **SMALL, **kwargs})


def cached_files(tmp_path: Path) -> list[str]:
    """Names of the files that the cache holds; what older versions keep of a broken download is not taken for one."""
    kept = (path for path in (tmp_path / 'hub').rglob('*') if path.is_file() and path.suffix != '.incomplete')
    return sorted(path.name for path in kept if {'blobs', 'snapshots'} & set(path.parts))


def assert_same(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    # of the schedule of sparsity nothing is taken over but the masks it made, see test_sparsity
    assert all(torch.equal(own[key], state[key]) for key in own if not key.startswith('sparsity.'))


def config(architecture: str = 'test_sw', num_classes: int = 10, **model_args) -> bytes:
    cfg = dict(
        num_classes=num_classes, input_size=[3, 64, 64], pool_size=[2, 2], first_conv='stem.0', classifier='head.fc')
    return json.dumps(dict(
        architecture=architecture, num_classes=num_classes, model_args=model_args, pretrained_cfg=cfg)).encode()


def test_registered_weights_are_fetched_once_and_then_come_from_the_cache(hub, tmp_path):
    state = weights()
    hub.add(REPO, {'model.safetensors': save(state)})
    assert_same(create(), state)
    assert hub.downloads() == [f'GET /{REPO}/resolve/main/model.safetensors']
    assert_same(create(), state)
    assert len(hub.downloads()) == 1
    hub.stop()
    assert_same(create(), state)


def test_new_weights_under_the_same_name_are_seen(hub):
    hub.add(REPO, {'model.safetensors': save(weights(seed=0))})
    create()
    newer = weights(seed=1)
    hub.add(REPO, {'model.safetensors': save(newer)})
    assert_same(create(), newer)


@pytest.mark.parametrize('change', [
    dict(in_chans=1), dict(num_classes=5), dict(num_classes=0), dict(features_only=True),
], ids=str)
def test_weights_are_adapted_to_other_inputs_classes_and_uses(hub, change):
    state = weights()
    hub.add(REPO, {'model.safetensors': save(state)})
    model = create(**change)
    key = 'stages_1.blocks.0.mlp.fc1.weight' if 'features_only' in change else 'stages.1.blocks.0.mlp.fc1.weight'
    assert torch.equal(model.state_dict()[key], state['stages.1.blocks.0.mlp.fc1.weight'])
    out = model(torch.rand(1, change.get('in_chans', 3), 64, 64))
    if 'features_only' in change:
        assert [tuple(feature.shape) for feature in out] == [
            (1, 8, 16, 16), (1, 12, 8, 8), (1, 16, 4, 4), (1, 20, 2, 2)]
    else:
        assert out.shape == (1, change.get('num_classes', 1000) or 20)


def test_a_repository_brings_its_configuration(hub):
    other = dict(SMALL, focus_lengths=(9, 9, 5, 5), kernel_size=3, num_paths=1)
    state = weights('test_sw', num_classes=4, **other)
    hub.add('someone/flowers', {'model.safetensors': save(state), 'config.json': config(num_classes=4, **other)})
    model = timm.create_model('hf-hub:someone/flowers', pretrained=True)
    assert_same(model, state)
    assert model.num_classes == 4


@pytest.mark.parametrize('revision', ['v1', 'hash'])
def test_a_revision_is_honoured(hub, revision):
    old, new = weights('test_sw', seed=0, num_classes=10), weights('test_sw', seed=1, num_classes=10)
    sha = hub.add('someone/flowers', {'model.safetensors': save(old), 'config.json': config(**SMALL)})
    hub.repositories['someone/flowers'].refs['v1'] = sha
    hub.add('someone/flowers', {'model.safetensors': save(new)})
    assert_same(timm.create_model('hf-hub:someone/flowers', pretrained=True), new)
    name = f"hf-hub:someone/flowers@{sha if revision == 'hash' else revision}"
    assert_same(timm.create_model(name, pretrained=True), old)


def test_a_folder_brings_its_configuration(tmp_path):
    state = weights('test_sw', num_classes=10)
    (tmp_path / 'model.safetensors').write_bytes(save(state))
    (tmp_path / 'config.json').write_bytes(config(**SMALL))
    assert_same(timm.create_model(f'local-dir:{tmp_path}', pretrained=True), state)


def test_a_configuration_that_does_not_fit_its_weights_is_named(hub):
    state = weights('test_sw', num_classes=10)
    files = {'model.safetensors': save(state), 'config.json': config(**dict(SMALL, focus_lengths=(13, 9, 7, 5)))}
    hub.add('someone/flowers', files)
    told = r'(?s)stages\.0\.blocks\.0\.conv_dw.*\b11\b.*\b13\b'
    with pytest.raises((ValueError, RuntimeError), match=told) as raised:
        timm.create_model('hf-hub:someone/flowers', pretrained=True)
    assert not isinstance(raised.value, PretrainedWeightsError)


# what can go wrong: each ends in an error that names the repository, and once mended the same call works


@pytest.mark.parametrize('token', [None, 'secret'], ids=['answer_401', 'answer_404'])
def test_weights_that_nobody_published_are_told_with_the_ways_on(hub, tmp_path, monkeypatch, token):
    if token:
        hub.tokens[token] = 'someone'
        monkeypatch.setenv('HF_TOKEN', token)
    with pytest.raises(WeightsNotPublishedError) as raised:
        create()
    message = str(raised.value)
    for part in (
            'No weights are published under the name sw_tiny.in1k yet', REPO, hub.endpoint,
            "timm.create_model('sw_convnext_tiny', pretrained=True)",
            'timm-shiftwise recipe sw_tiny --data-dir IMAGENET', 'timm-shiftwise convert',
            'https://github.com/lidc54/shift-wiseConv: one checkpoint, that of sw_v2_tiny',
            'TIMM_SHIFTWISE_ORG', 'hf-hub:', 'local-dir:'):
        assert part in message
    assert isinstance(raised.value.__cause__, huggingface_hub.errors.RepositoryNotFoundError)
    assert cached_files(tmp_path) == []
    asked = [line for line in hub.requests if '/resolve/' in line]
    assert asked == [f'HEAD /{REPO}/resolve/main/model.safetensors']  # once, whatever else weights are called
    hub.add(REPO, {'model.safetensors': save(weights())})
    create()


def test_weights_that_nobody_can_download_are_not_listed():
    listed = {name.split('.')[0] for name in timm.list_pretrained()}
    ours = {name for name in listed if timm.model_entrypoint(name).__module__.startswith('timm_shiftwise.')}
    assert {name for name in ours if 'convnext' not in name} == {'test_sw'}


def test_without_a_repository_the_ways_on_are_told_at_once(hub):
    with pytest.raises(WeightsNotPublishedError, match=r"(?s)sw_base\.in1k yet.*'sw_convnext_base', pretrained=True"):
        timm.create_model('sw_base', pretrained=True, **SMALL)
    assert hub.requests == []


@pytest.mark.parametrize('name, paper, origin', [
    ('sw_v2_tiny', 'arXiv:2401.12736', 'https://github.com/lidc54/shift-wiseConv'),
    ('slak_tiny', 'arXiv:2207.03620', 'https://github.com/VITA-Group/SLaK'),
    ('slak_small', 'arXiv:2207.03620', 'https://github.com/VITA-Group/SLaK'),
    ('slak_base', 'arXiv:2207.03620', 'https://github.com/VITA-Group/SLaK'),
])
def test_weights_of_the_authors_are_told_where_they_are(hub, name, paper, origin):
    with pytest.raises(WeightsNotPublishedError) as raised:
        timm.create_model(f'{name}.authors_in1k', pretrained=True, **SMALL)
    for part in (
            f'under the name {name}.authors_in1k yet',
            f'timm-shiftwise convert FILE.pth --model {name} --output FOLDER',
            f'The authors publish at {origin}'):
        assert part in str(raised.value)
    cfg = timm.get_pretrained_cfg(f'{name}.authors_in1k')
    assert (cfg.paper_ids, cfg.origin_url, cfg.license) == (paper, origin, 'other')


def test_a_repository_named_by_the_user_is_told_without_the_ways_on(hub):
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError, match='someone/absent'):
        timm.create_model('hf-hub:someone/absent', pretrained=True)
    hub.add('someone/flowers', {'config.json': config(**SMALL)})
    with pytest.raises(PretrainedWeightsError, match=r'someone/flowers .*no file') as raised:
        timm.create_model('hf-hub:someone/flowers', pretrained=True)
    assert 'ways on' not in str(raised.value)


def test_a_private_repository_opens_with_a_token(hub, monkeypatch):
    state = weights()
    hub.add(REPO, {'model.safetensors': save(state)}, private=True)
    with pytest.raises(WeightsNotPublishedError, match='private'):
        create()
    hub.tokens['secret'] = 'someone'
    monkeypatch.setenv('HF_TOKEN', 'secret')
    assert_same(create(), state)


def test_a_gated_repository_is_named_as_such(hub):
    hub.add(REPO, {'model.safetensors': save(weights())}, gated=True)
    with pytest.raises(PretrainedWeightsError, match=rf'{REPO} .*gated') as raised:
        create()
    assert not isinstance(raised.value, WeightsNotPublishedError)


def test_a_repository_without_weights_is_named(hub, tmp_path):
    hub.add(REPO, {'README.md': b'soon'})
    with pytest.raises(PretrainedWeightsError, match=rf'{REPO} .*no file model\.safetensors or pytorch_model\.bin'):
        create()
    assert cached_files(tmp_path) == []
    hub.add(REPO, {'model.safetensors': save(weights())})
    create()


def test_a_missing_revision_is_named(hub):
    hub.add(REPO, {'model.safetensors': save(weights())})
    with pytest.raises(PretrainedWeightsError, match=rf"{REPO} .*no revision 'v9'"):
        create(pretrained_cfg_overlay=dict(hf_hub_id=f'{REPO}@v9'))


def test_a_name_that_no_repository_can_have_is_named(hub):
    with pytest.raises(PretrainedWeightsError, match=r"'a/b/sw_tiny\.in1k' is not the name of a repository"):
        create(pretrained_cfg_overlay=dict(hf_hub_id='a/b/sw_tiny.in1k'))


@pytest.mark.parametrize('action, told', [
    (500, '500'),
    (503, '503'),
    (401, 'token'),
    (403, 'token'),
    (404, '404'),
    (429, '429'),
    ('refuse', 'connection was cut'),
    ('die', 'connection was cut'),
    ('short', 'Consistency check failed'),
    ('garbage', 'no safetensors file'),
])
def test_a_failing_server_is_told_and_leaves_no_broken_cache(hub, tmp_path, action, told):
    state = weights()
    hub.add(REPO, {'model.safetensors': save(state)})
    hub.fail('GET .*safetensors' if isinstance(action, str) else 'resolve', action)
    with pytest.raises(PretrainedWeightsError, match='(?s)' + told) as raised:
        create()
    assert REPO in str(raised.value) and hub.endpoint in str(raised.value)
    assert not isinstance(raised.value, WeightsNotPublishedError)
    assert raised.value.__cause__ is not None
    assert cached_files(tmp_path) == []
    hub.faults.clear()
    hub.stop()
    hub.start()
    assert_same(create(), state)


def test_a_connection_cut_once_is_taken_up_again(hub):
    state = weights()
    hub.add(REPO, {'model.safetensors': save(state)})
    hub.fail('GET .*safetensors', 'cut', times=1)
    with contextlib.suppress(PretrainedWeightsError):  # older versions leave it to the next call
        create()
    assert_same(create(), state)
    assert len(hub.downloads()) == 2


def test_a_full_disk_is_told_and_leaves_no_broken_cache(hub, tmp_path):
    state = weights()
    hub.add(REPO, {'model.safetensors': save(state)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(save(state)) // 2, hard))
    try:
        with pytest.raises(PretrainedWeightsError, match=f'{REPO}.*(?i:file too large)'):
            create()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cached_files(tmp_path) == []
    assert_same(create(), state)


def test_a_server_that_is_not_there_is_told(hub, tmp_path):
    hub.stop()
    with pytest.raises(PretrainedWeightsError, match=f'(?s){REPO}.*not reached'):
        create()
    assert cached_files(tmp_path) == []


@pytest.mark.parametrize('content', [
    b'', b'\0' * 100, b'{"not": "weights"}', (2 ** 60).to_bytes(8, 'little') + b'{}', save(weights())[:-1000],
], ids=['empty', 'zeros', 'json', 'header_lies', 'cut'])
def test_a_file_that_is_not_whole_safetensors_is_told(hub, tmp_path, content):
    hub.add(REPO, {'model.safetensors': content})
    with pytest.raises(PretrainedWeightsError, match=rf'model\.safetensors from .* {REPO} .* cannot be read'):
        create()
    assert cached_files(tmp_path) == []
    state = weights()
    hub.add(REPO, {'model.safetensors': save(state)})
    assert_same(create(), state)


def test_weights_that_do_not_fit_stay_in_the_cache_and_pass_their_own_error(hub, tmp_path):
    hub.add(REPO, {'model.safetensors': save(weights(dims=(8, 12, 16, 24)))})
    with pytest.raises(ValueError, match=r'dims=\(8, 12, 16, 24\)') as raised:
        create()
    assert not isinstance(raised.value, PretrainedWeightsError)
    assert 'model.safetensors' in cached_files(tmp_path)


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('form', ['zip', 'plain'])
def test_a_pickle_that_would_run_code_is_refused(hub, tmp_path, form):
    path = tmp_path / 'weights.bin'
    if form == 'zip':
        torch.save({'stem.0.weight': _Hostile(tmp_path / 'owned')}, path)
    else:
        path.write_bytes(pickle.dumps({'stem.0.weight': _Hostile(tmp_path / 'owned')}, protocol=2))
    hub.add(REPO, {'pytorch_model.bin': path.read_bytes()})
    with pytest.raises(PretrainedWeightsError, match=rf'(?s)pytorch_model\.bin.*{REPO}.*never run'):
        create()
    assert not (tmp_path / 'owned').exists()
    assert cached_files(tmp_path) == []


def test_a_harmless_pickle_is_read(hub, tmp_path):
    state = weights()
    torch.save(state, tmp_path / 'weights.bin')
    hub.add(REPO, {'pytorch_model.bin': (tmp_path / 'weights.bin').read_bytes()})
    assert_same(create(), state)


def test_an_unreadable_file_in_a_folder_is_named_and_left_alone(tmp_path):
    (tmp_path / 'model.safetensors').write_bytes(b'not weights')
    (tmp_path / 'config.json').write_bytes(config(**SMALL))
    with pytest.raises(PretrainedWeightsError, match=rf'{tmp_path}/model\.safetensors cannot be read'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert (tmp_path / 'model.safetensors').exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PretrainedWeightsError, match=r'absent\.safetensors'):
        create(pretrained_cfg_overlay=dict(file=str(tmp_path / 'absent.safetensors')))


def test_errors_of_the_model_itself_pass():
    with pytest.raises(TypeError, match='no_such_argument'):
        create(no_such_argument=1)
    with pytest.raises(ValueError, match='focus_length'):
        create(focus_lengths=(0, 1, 1, 1))


# environment variables act when the libraries are imported: these need processes of their own


def run(code: str, hub_cache: Path, endpoint: str, **environment: str) -> str:
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'HUGGING', 'TIMM_SHIFTWISE'))},
        'HF_HOME': str(hub_cache), 'HF_ENDPOINT': endpoint, 'NO_PROXY': '127.0.0.1', 'OMP_NUM_THREADS': '1',
        'PYTHONPATH': str(Path(timm_shiftwise.__file__).parents[1]),
        **environment,
    }
    done = subprocess.run(
        [sys.executable, '-c', f'import timm, timm_shiftwise\nsmall = {SMALL!r}\n{code}'],
        env=environment, capture_output=True, text=True, timeout=240, check=False)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_environment_variables_name_the_server_the_cache_and_the_organisation(tmp_path):
    server = HubServer()
    try:
        server.add('ours/sw_tiny.in1k', {'model.safetensors': save(weights())})
        create_one = "timm.create_model('sw_tiny', pretrained=True, **small)\nprint('loaded')"
        assert 'loaded' in run(create_one, tmp_path, server.endpoint, TIMM_SHIFTWISE_ORG='ours')
        assert server.downloads() == ['GET /ours/sw_tiny.in1k/resolve/main/model.safetensors']
        before = len(server.requests)
        assert 'loaded' in run(create_one, tmp_path, server.endpoint, TIMM_SHIFTWISE_ORG='ours', HF_HUB_OFFLINE='1')
        assert len(server.requests) == before
        told = run(create_one, tmp_path, server.endpoint, TIMM_SHIFTWISE_ORG='theirs', HF_HUB_OFFLINE='1')
        assert 'loaded' not in told
        assert 'theirs/sw_tiny.in1k' in told and "'theirs'" in told and 'HF_HUB_OFFLINE' in told
    finally:
        server.stop()


def test_the_demo_weights_are_in_the_package_and_need_no_network(tmp_path):
    code = (
        "import torch\n"
        "model = timm.create_model('test_sw.digits', pretrained=True).eval()\n"
        "fresh = timm.create_model('test_sw', num_classes=10)\n"
        "assert model.num_classes == 10 and model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)\n"
        "assert not torch.equal(model.head.fc.weight, fresh.head.fc.weight)\n"
        "assert model.stages[0].blocks[0].conv_dw.norm_h.num_batches_tracked > 0\n"
        "print('loaded')"
    )
    assert 'loaded' in run(code, tmp_path, 'http://127.0.0.1:9', HF_HUB_OFFLINE='1')
    file = Path(timm_shiftwise.__file__).parent / 'weights' / 'test_sw.digits.safetensors'
    assert file.stat().st_size < 1_000_000

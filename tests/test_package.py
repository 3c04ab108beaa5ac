"""What is installed: one version, the data files in the wheel, and an import that leaves the program as it was."""
import configparser
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import timm_shiftwise

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'timm_shiftwise'


@pytest.fixture(scope='module')
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'setup.cfg')
    return parser


def test_the_installed_version_is_the_packages_own():
    assert importlib.metadata.version('timm-shiftwise') == timm_shiftwise.__version__


def test_citation_and_changelog_name_the_version():
    assert f'\nversion: {timm_shiftwise.__version__}\n' in (ROOT / 'CITATION.cff').read_text()
    assert f'\n## [{timm_shiftwise.__version__}]' in (ROOT / 'CHANGELOG.md').read_text()


def test_the_command_is_installed():
    command, = importlib.metadata.entry_points(group='console_scripts', name='timm-shiftwise')
    assert callable(command.load())


def test_readme_states_the_lowest_versions(setup_cfg):
    bounds = dict(line.split(' >= ') for line in setup_cfg['options']['install_requires'].strip().splitlines())
    readme = (ROOT / 'README.md').read_text()
    for name in ('torch', 'timm'):
        assert f'{name} {bounds[name]}' in readme


def test_ci_takes_its_test_command_from_the_readme():
    readme, = [line for line in (ROOT / 'README.md').read_text().splitlines() if line.endswith('.venv/bin/pytest')]
    assert readme.startswith('python3 -m venv .venv && ')
    assert "grep -m1 '\\.venv/bin/pytest$' README.md" in (ROOT / '.ci' / 'run').read_text()


IMPORT = '''
import logging, os, random, signal, sys, warnings
import numpy, timm, torch, torchvision

def state():
    root = logging.getLogger()
    return {
        'torch random state': torch.get_rng_state().tolist(),
        'numpy random state': repr(numpy.random.get_state()),
        'python random state': random.getstate(),
        'default dtype': torch.get_default_dtype(),
        'default device': torch.get_default_device(),
        'threads': (torch.get_num_threads(), torch.get_num_interop_threads()),
        'grad mode': torch.is_grad_enabled(),
        'deterministic': torch.are_deterministic_algorithms_enabled(),
        'matmul precision': torch.get_float32_matmul_precision(),
        'warnings': list(warnings.filters),
        'logging': (root.level, list(root.handlers), logging.getLogger('timm_shiftwise').handlers),
        'excepthook': sys.excepthook,
        'signals': [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        'environment': dict(os.environ),
    }

before = state()
import timm_shiftwise
after = state()
changed = [name for name in before if before[name] != after[name]]
assert not changed, changed
heavy = {'taichi', 'matplotlib', 'sklearn', 'rich', 'triton', 'onnx'} & (set(sys.modules) - BEFORE)
assert not heavy, heavy
assert timm.is_model('sw_tiny')
'''.replace('before = state()', 'before, BEFORE = state(), set(sys.modules)')


def test_importing_is_quiet_light_and_leaves_global_state():
    run = subprocess.run([sys.executable, '-c', IMPORT], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert (run.stdout, run.stderr) == ('', '')


def tracked() -> list[str]:
    """Files of the clone, or of the source distribution, where there is no git."""
    if not (ROOT / '.git').exists():
        names = (ROOT / 'timm_shiftwise.egg-info' / 'SOURCES.txt').read_text().split()
        return [name for name in names if '.egg-info/' not in name]
    files = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return list(filter(None, files.split('\0')))


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> Path:
    """A copy of the files that git tracks, so that a build leaves nothing in the clone."""
    folder = tmp_path_factory.mktemp('source')
    for name in tracked():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory) -> Path:
    """A wheel built from them."""
    folder = tmp_path_factory.mktemp('wheel')
    subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--wheel-dir', str(folder), str(source)],
        check=True)
    path, = folder.glob('*.whl')
    return path


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {name for name in tracked() if name.startswith('timm_shiftwise/')}
    assert 'timm_shiftwise/py.typed' in modules
    assert {name for name in names if '.dist-info/' not in name} == modules
    assert any(name.endswith('.dist-info/licenses/LICENSE') for name in names)


def test_the_source_distribution_holds_every_file_of_the_clone(source, tmp_path):
    pytest.importorskip('setuptools', '77', reason='building a source distribution needs setuptools 77 or later')
    subprocess.run(
        [sys.executable, '-c', 'import setuptools.build_meta, sys; setuptools.build_meta.build_sdist(sys.argv[1])',
         str(tmp_path)], cwd=source, check=True, capture_output=True)
    path, = tmp_path.glob('*.tar.gz')
    with tarfile.open(path) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    assert set(tracked()) <= names


@pytest.mark.slow
def test_the_wheel_works_without_the_clone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = '''
import timm, timm_shiftwise
print(timm_shiftwise.__file__)
timm.create_model('test_sw.digits', pretrained=True)
from timm_shiftwise.cli import main
main(['recipe', 'sw_tiny'])
'''
    run = subprocess.run(
        [sys.executable, '-c', script],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr
    package, recipe = run.stdout.split()
    assert Path(package).is_relative_to(tmp_path)
    assert (tmp_path / recipe).is_file()

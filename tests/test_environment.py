"""Letting timm know the models without an import: in an environment of its own, beside programs that do not care."""
import csv
import json
import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError, PathDistribution
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import timm_shiftwise
from timm_shiftwise.cli import main
from timm_shiftwise.environment import enabled
from timm_shiftwise.environment.enabled import HOOK, START

SCRIPTS = Path(os.environ.get('TIMM_SCRIPTS') or 'TIMM_SCRIPTS is not set')
SOURCE = Path(timm_shiftwise.__file__).parents[1]
KNOWS = 'import timm; print(timm.is_model("sw_tiny"))'


# packages that are imported in no time; the real ones are taken where it matters
STAND_INS = {
    'timm/__init__.py': 'from .models import is_model\nfrom . import layers\n',
    'timm/models.py': 'known = set()\ndef is_model(name): return name in known\n',
    'timm/layers.py': 'DropPath = None\n',
    'timm_shiftwise/__init__.py': 'import timm\ntimm.models.known.add("sw_tiny")\n',
}


class Environment:
    """A virtual environment in which the package counts as installed, as an editable one does.

    Args:
        folder: Where it is made.
        real: Whether timm and the package are those of the tests' own environment.
    """

    def __init__(self, folder: Path, real: bool = False) -> None:
        self.folder = folder
        venv.create(folder, symlinks=True)
        self.python = folder / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
        paths = {'base': str(folder), 'platbase': str(folder)}
        self.site = Path(sysconfig.get_path('purelib', 'nt' if os.name == 'nt' else 'posix_prefix', paths))
        if real:
            (self.site / 'needed.pth').write_text(f'{SOURCE}\n{sysconfig.get_path("purelib")}\n')
        for name, content in () if real else STAND_INS.items():
            (self.site / name).parent.mkdir(exist_ok=True)
            (self.site / name).write_text(content)
        self.info = self.site / 'timm_shiftwise-0.0.dist-info'
        self.info.mkdir()
        (self.info / 'METADATA').write_text('Metadata-Version: 2.1\nName: timm-shiftwise\nVersion: 0.0\n')
        (self.info / 'INSTALLER').write_text('pip\n')
        own = [[f'{self.info.name}/{name}', '', ''] for name in ('METADATA', 'INSTALLER', 'RECORD')]
        with open(self.info / 'RECORD', 'w', newline='') as file:
            csv.writer(file, lineterminator='\n').writerows(own)

    def run(self, *arguments: str, status: int = 0, cwd: Path | None = None, **variables: str) -> str:
        """Run the environment's interpreter; what it wrote, errors included."""
        inherited = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
        result = subprocess.run(
            [str(self.python), *arguments], env={**inherited, 'OMP_NUM_THREADS': '1', **variables},
            cwd=cwd or self.folder,  # else the interpreter would find the package there
            capture_output=True, text=True, timeout=500, check=False)
        assert result.returncode == status, result.stdout + result.stderr
        return result.stdout + result.stderr

    def switch(self, on: bool) -> object:
        """Enable or disable, in this process, and what that returns."""
        with mock.patch.object(enabled, 'distribution', lambda name: PathDistribution(self.info)):
            return (enabled.enable if on else enabled.disable)()

    def recorded(self) -> set[str]:
        """Files that the RECORD lists."""
        with open(self.info / 'RECORD', newline='') as file:
            return {row[0] for row in csv.reader(file)}


@pytest.fixture
def environment(tmp_path) -> Environment:
    """An environment that does not know the models yet."""
    return Environment(tmp_path / 'venv')


@pytest.fixture
def knowing(environment) -> Environment:
    """One that does."""
    environment.switch(on=True)
    return environment


def test_timm_knows_the_models_once_enabled_and_no_more_when_disabled(environment):
    before = environment.recorded()
    assert environment.run('-c', KNOWS).split() == ['False']
    for _ in range(2):  # the second time changes nothing
        assert environment.switch(on=True) == environment.site.resolve()
        assert environment.run('-c', KNOWS).split() == ['True']
        assert environment.recorded() == before | {HOOK, START}
    assert environment.switch(on=False)
    assert environment.run('-c', KNOWS).split() == ['False']
    assert environment.recorded() == before
    assert not any((environment.site / name).exists() for name in (HOOK, START))
    assert not environment.switch(on=False)


@pytest.mark.slow
def test_the_commands_do_it_for_the_real_packages(tmp_path):
    environment = Environment(tmp_path / 'venv', real=True)
    assert 'know the models now' in environment.run('-m', 'timm_shiftwise', 'enable')
    assert environment.run('-c', KNOWS).split() == ['True']
    assert 'enabled without import  yes' in environment.run('-m', 'timm_shiftwise', 'doctor')
    assert 'only where timm_shiftwise is imported' in environment.run('-m', 'timm_shiftwise', 'disable')


@pytest.mark.parametrize('program', [
    'import importlib.util; importlib.util.find_spec("timm"); ' + KNOWS,
    'import timm.models; ' + KNOWS,
    'import timm_shiftwise; ' + KNOWS,
    'from timm.layers import DropPath; ' + KNOWS,
    'import importlib, timm; importlib.reload(timm); ' + KNOWS,
    'import pkgutil, importlib.util; assert importlib.util.find_spec("timm").loader.get_source("timm"); ' + KNOWS,
])
def test_however_timm_is_imported(knowing, program):
    assert knowing.run('-W', 'error::UserWarning', '-c', program).split() == ['True']


def test_a_program_without_timm_gets_one_small_module(environment):
    listed = 'import sys, json; print(json.dumps(sorted(sys.modules)))'
    before = json.loads(environment.run('-c', listed))
    environment.switch(on=True)
    more = set(json.loads(environment.run('-c', listed))) - set(before)
    assert more - {'encodings.utf_8_sig'} == {HOOK.removesuffix('.py')}  # Python 3.13 on read .pth by it


def test_the_interpreter_starts_whatever_happened_to_the_files(knowing):
    (knowing.site / HOOK).write_text('raise RuntimeError("broken")')
    assert knowing.run('-c', 'print("fine")') == 'fine\n'
    (knowing.site / HOOK).unlink()
    assert knowing.run('-c', 'print("fine")') == 'fine\n'


def test_timm_is_imported_where_the_package_is_broken(knowing, tmp_path):
    (tmp_path / 'timm_shiftwise.py').write_text('raise ImportError("not today")')
    said = knowing.run('-c', KNOWS, PYTHONPATH=str(tmp_path))
    assert 'False' in said and 'not today' in said and 'timm-shiftwise disable' in said and 'Traceback' not in said


def test_uninstalling_removes_it(knowing):
    pip = [sys.executable, '-m', 'pip', '--python', str(knowing.python), 'uninstall', '--yes', 'timm-shiftwise']
    # on PYTHONPATH pip would find another installation first
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    subprocess.run(pip, check=True, capture_output=True, timeout=300, env=env)
    assert not any((knowing.site / name).exists() for name in (HOOK, START))


def test_where_nothing_is_installed_it_says_so(monkeypatch, capsys):
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(enabled, 'distribution', missing)
    assert not enabled.is_enabled()
    for command in ('enable', 'disable'):
        assert main([command]) == 2
        assert 'not installed in this environment' in ' '.join(capsys.readouterr().err.split())


def test_a_source_folder_without_a_record_is_told(environment):
    (environment.info / 'RECORD').unlink()
    with pytest.raises(enabled.SiteError, match='without a RECORD'):
        environment.switch(on=True)
    assert not (environment.site / START).exists()


def test_a_folder_that_cannot_be_written_is_told(environment):
    (environment.site / START).mkdir()
    with pytest.raises(enabled.SiteError, match='cannot be changed'):
        environment.switch(on=True)
    assert environment.recorded().isdisjoint({HOOK, START})


@pytest.mark.slow
@pytest.mark.skipif(
    not (SCRIPTS / 'train.py').is_file(),
    reason='TIMM\'S SCRIPTS NOT TESTED without a flag: set TIMM_SCRIPTS to a directory that has train.py')
def test_train_and_validate_need_no_flag(tmp_path):
    knowing = Environment(tmp_path / 'venv', real=True)
    knowing.switch(on=True)
    for split in ('train', 'validation'):
        for index, name in enumerate(('dark', 'light')):
            (tmp_path / 'images' / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = np.full((32, 32, 3), 40 + 160 * index + number, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / 'images' / split / name / f'{number}.png')
    data = ['--data-dir', str(tmp_path / 'images'), '--model', 'test_sw', '--num-classes', '2', '--img-size', '32']
    common = [*data, '--device', 'cpu', '--workers', '1', '--batch-size', '4']
    knowing.run(
        str(SCRIPTS / 'train.py'), *common, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'run',
        cwd=tmp_path)
    trained = tmp_path / 'run' / 'last.pth.tar'
    assert trained.is_file()
    said = knowing.run(str(SCRIPTS / 'validate.py'), *common, '--checkpoint', str(trained), '--reparam', cwd=tmp_path)
    assert '"top1"' in said

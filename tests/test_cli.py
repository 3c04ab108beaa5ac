"""The command line itself and its small sub-commands."""
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import timm_shiftwise
from timm_shiftwise.cli import COMMANDS, CommandError, main
from timm_shiftwise.cli.run import find_script


def exit_status(*argv: str) -> int:
    """Status with which the command ends, argparse's own exits included."""
    try:
        return main(argv)
    except SystemExit as exit_:
        return exit_.code


@pytest.mark.parametrize('name', COMMANDS)
def test_each_command_explains_itself(name, capsys):
    assert exit_status(name, '--help') == 0
    assert f'timm-shiftwise {name}' in capsys.readouterr().out


def test_help_lists_the_commands_in_the_tables_order(capsys):
    assert exit_status('--help') == 0
    listed = re.findall(r'^    (\w+)', capsys.readouterr().out, flags=re.MULTILINE)
    assert listed == list(COMMANDS)


def test_version_is_the_packages(capsys):
    assert exit_status('--version') == 0
    assert capsys.readouterr().out.strip() == timm_shiftwise.__version__


@pytest.mark.parametrize('argv', [(), ('fly',), ('run',), ('run', '--fast', 'train.py'), ('recipe', 'sw_tiny', 'more')])
def test_wrong_usage_ends_with_status_2(argv, capsys):
    assert exit_status(*argv) == 2
    assert 'usage: timm-shiftwise' in capsys.readouterr().err


def test_a_commands_error_is_shown_without_a_traceback_or_markup(monkeypatch, capsys):
    def fail(args):
        raise CommandError('no [bold]file[/bold] :smile: ' + 'x' * 200)

    monkeypatch.setattr(importlib.import_module('timm_shiftwise.cli.recipe'), 'run', fail)
    assert exit_status('recipe') == 2
    captured = capsys.readouterr()
    assert captured.err == 'timm-shiftwise recipe: no [bold]file[/bold] :smile: ' + 'x' * 200 + '\n'
    assert captured.out == ''


def test_a_script_is_found_by_path_before_timm_scripts(tmp_path, monkeypatch):
    here, scripts = tmp_path / 'here', tmp_path / 'scripts'
    for directory in (here, scripts, scripts / 'sub'):
        directory.mkdir()
    (here / 'train.py').touch()
    (here / 'sub').mkdir()
    for name in ('train.py', 'validate.py', 'sub/tool.py'):
        (scripts / name).touch()
    monkeypatch.chdir(here)
    environ = {'TIMM_SCRIPTS': str(scripts)}
    assert find_script('train.py', environ) == 'train.py'
    assert find_script('validate.py', environ) == str(scripts / 'validate.py')
    assert find_script('sub/tool.py', environ) == str(scripts / 'sub/tool.py')
    assert find_script(str(scripts / 'train.py'), {}) == str(scripts / 'train.py')


@pytest.mark.parametrize(('version', 'branch'), [('1.0.31', 'v1.0.31'), ('1.0.32.dev0', 'main')])
@pytest.mark.parametrize('with_directory', [True, False])
def test_a_script_that_is_not_found_names_the_places_and_timms_scripts(
        version, branch, with_directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, '__version__', version)
    monkeypatch.delenv('TIMM_SCRIPTS', raising=False)
    if with_directory:
        monkeypatch.setenv('TIMM_SCRIPTS', str(tmp_path / 'scripts'))
    (tmp_path / 'train.py').mkdir()  # a directory of that name is no script
    assert exit_status('run', 'train.py', '--help') == 2
    captured = capsys.readouterr()
    assert captured.out == ''
    lines = captured.err.splitlines()
    assert lines[0] == "timm-shiftwise run: no script 'train.py'. Looked at"
    assert lines[1] == f'  {tmp_path / "train.py"}'
    assert lines[2] == (f'  {tmp_path / "scripts" / "train.py"}' if with_directory else '  $TIMM_SCRIPTS (not set)')
    assert f'timm {version}' in captured.err and f'--branch {branch} ' in captured.err


# every command, in one process because starting one takes longer than most of them
ANYWHERE = '''
import contextlib, sys
import torch
from safetensors.torch import load_file
from timm_shiftwise.cli import COMMANDS, main
torch.save({'epoch': 0, 'state_dict': load_file(sys.argv[1])}, 'last.pth.tar')
for name in COMMANDS:
    with contextlib.suppress(SystemExit):
        main([name, '--help'])
folder = 'w\\u00e4ights \\u2713'
for argv in (
    ['recipe'],
    ['convert', sys.argv[1], '--model', 'test_sw', '--output', folder],
    ['publish', folder, '--repo', 'a/b', '--dry-run'],
    ['sparsity', folder],
    ['watch', '.', '--output', 'p\\u00e4ge \\u2713.html'],
    ['profile', 'test_sw'],
    ['run', 'script.py', '\\u2713'],
):
    assert main(argv) == 0, argv
assert main(['sparsity', 'n\\u00f6 file \\u2713']) == 2
'''
WEIGHTS = Path(timm_shiftwise.__file__).parent / 'weights' / 'test_sw.digits.safetensors'


@pytest.mark.slow
@pytest.mark.parametrize('environment', [
    dict(PYTHONIOENCODING='cp1252', NO_COLOR='1', FORCE_COLOR='1', TERM='xterm'),
    dict(PYTHONIOENCODING='ascii', TERM='dumb'),
], ids=['terminal of Windows', 'pipe of ASCII'])
def test_every_command_does_its_work_whatever_its_output_can_show(environment, tmp_path):
    (tmp_path / 'script.py').write_text('import sys; print(len(sys.argv))')
    package = str(Path(timm_shiftwise.__file__).parents[1])
    done = subprocess.run(  # quickstart's own tests train with such an output
        [sys.executable, '-c', ANYWHERE, str(WEIGHTS)], cwd=tmp_path, capture_output=True, timeout=500,
        env=os.environ | environment | dict(COLUMNS='60', PYTHONPATH=package, OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stdout + done.stderr
    text = re.sub(r'\x1b\[[\d;?]*\w', '', done.stdout.decode(environment['PYTHONIOENCODING']))
    assert len(re.findall(r'^all\b.* -{10,}', text, flags=re.MULTILINE)) == 1  # a bar of what there is
    assert (tmp_path / 'wäights ✓' / 'model.safetensors').is_file()

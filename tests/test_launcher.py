"""`timm-shiftwise run SCRIPT` behaves as `python SCRIPT`, each script being run both ways; then torchrun."""
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

import timm_shiftwise
from timm_shiftwise.cli import CommandError, main
from timm_shiftwise.cli.run import own_gpu, tell_children

LAUNCHER = [sys.executable, '-m', 'timm_shiftwise', 'run']
PLAIN = [sys.executable]
COMMAND = shutil.which('timm-shiftwise', path=sysconfig.get_path('scripts'))
needs_command = pytest.mark.skipif(
    COMMAND is None, reason='the command timm-shiftwise is not installed for this Python: pip install -e .')
needs_posix = pytest.mark.skipif(os.name != 'posix', reason='signals as POSIX has them')


@pytest.fixture
def environ() -> dict[str, str]:
    """An environment in which the package is importable from anywhere and nothing else is set for the launcher."""
    unwanted = ('TIMM_SCRIPTS', 'PYTHON_EXEC', 'CUDA_VISIBLE_DEVICES', 'LOCAL_RANK', 'RANK', 'WORLD_SIZE')
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    path = [str(Path(timm_shiftwise.__file__).parents[1]), *filter(None, [os.environ.get('PYTHONPATH')])]
    return kept | {'PYTHONPATH': os.pathsep.join(path), 'OMP_NUM_THREADS': '1'}


@pytest.fixture
def write(tmp_path):
    """Write a script under tmp_path from an indented string."""
    def write(name: str, text: str) -> Path:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(textwrap.dedent(text))
        return file

    return write


def execute(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


LOOK = """
    import atexit, json, sys

    class Local:
        pass

    def at_exit():
        print(json.dumps({'at exit': sys.modules['__main__'].Local is Local}))

    atexit.register(at_exit)
    print(json.dumps(dict(
        argv=sys.argv, name=__name__, file=__file__, package=__package__, spec=repr(__spec__), doc=__doc__,
        main=sys.modules['__main__'].__dict__ is globals(), builtins=type(__builtins__).__name__, path0=sys.path[0],
        sibling=__import__('sibling').__file__,
    )))
"""


@pytest.mark.parametrize('typed', ['./sub/../sub/look.py', 'link.py', 'absolute'])
def test_a_script_sees_what_python_shows_it(typed, tmp_path, write, environ):
    script = write('sub/look.py', LOOK)
    write('sub/sibling.py', '')
    (tmp_path / 'link.py').symlink_to(script)
    arguments = ['--help', '-h', '--', 'run', '-u', '--device', '', 'two words', '--', '--x=1', '*']
    command = [str(script) if typed == 'absolute' else typed, *arguments]
    plain, launched = (execute([*start, *command], env=environ, cwd=tmp_path) for start in (PLAIN, LAUNCHER))
    assert plain.returncode == launched.returncode == 0, launched.stderr
    assert [json.loads(line) for line in launched.stdout.splitlines()] \
        == [json.loads(line) for line in plain.stdout.splitlines()]
    assert json.loads(launched.stdout.splitlines()[0])['argv'][1:] == arguments


@needs_command
def test_through_the_installed_command_a_scripts_own_parser_answers_help(write, environ):
    script = write('tool.py', """
        import argparse
        parser = argparse.ArgumentParser(description='What the tool does.')
        parser.add_argument('--model')
        parser.parse_args()
    """)
    plain, launched = (execute([*start, str(script), '--help'], env=environ) for start in (PLAIN, [COMMAND, 'run']))
    assert (launched.returncode, launched.stdout, launched.stderr) == (0, plain.stdout, plain.stderr)
    assert 'usage: tool.py' in launched.stdout


def test_timm_scripts_is_where_a_bare_name_is_found_and_the_models_are_registered(tmp_path, write, environ):
    write('scripts/tool.py', """
        import sys, timm
        print(sys.argv[0], sys.path[0], timm.is_model('sw_tiny'))
    """)
    scripts = str(tmp_path / 'scripts')
    launched = execute([*LAUNCHER, 'tool.py'], env=environ | {'TIMM_SCRIPTS': scripts}, cwd=tmp_path)
    assert launched.stdout.split() == [os.path.join(scripts, 'tool.py'), scripts, 'True'], launched.stderr


@pytest.mark.parametrize(('ending', 'status'), [
    ('sys.exit(3)', 3),
    ('sys.exit("what went wrong")', 1),
    ('raise ValueError("what went wrong")', 1),
    ('raise KeyboardInterrupt', -signal.SIGINT),
])
@needs_posix
def test_a_scripts_end_is_the_launchers(ending, status, write, environ):
    script = write('ending.py', f'import sys\nprint("ran", flush=True)\n{ending}\n')
    plain, launched = (execute([*start, str(script)], env=environ) for start in (PLAIN, LAUNCHER))
    assert launched.returncode == plain.returncode == status
    assert launched.stdout == plain.stdout
    assert launched.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]


@needs_posix
@pytest.mark.parametrize(('signals', 'handled', 'status'), [
    ([signal.SIGINT], False, -signal.SIGINT),
    ([signal.SIGTERM], False, -signal.SIGTERM),
    ([signal.SIGINT, signal.SIGTERM], True, 5),
])
def test_a_signal_does_what_it_does_to_python(signals, handled, status, write, environ):
    script = write('wait.py', f"""
        import signal, sys, time

        def terminate(signum, frame):
            sys.exit(5)

        if {handled}:
            signal.signal(signal.SIGINT, lambda signum, frame: print('caught', signum, flush=True))
            signal.signal(signal.SIGTERM, terminate)
        try:
            print('ready', flush=True)
            time.sleep(60)
        finally:
            print('cleaned up', flush=True)
    """)

    def end(start: list[str]) -> tuple[int, str]:
        # a test run started in the background ignores SIGINT, and its children would inherit that
        process = subprocess.Popen(
            [*start, str(script)], env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        output = ''
        for signum in signals:
            output += process.stdout.readline()  # the answer to the signal before, the first time 'ready'
            process.send_signal(signum)
        output += process.communicate(timeout=60)[0]
        return process.returncode, output

    plain, launched = end(PLAIN), end(LAUNCHER)
    assert launched == plain
    assert launched[0] == status
    assert launched[1].startswith('ready\n')


def test_a_script_can_start_worker_processes_in_every_way(write, environ):
    script = write('workers.py', """
        import multiprocessing, sys

        def double(x):
            return 2 * x

        if __name__ == '__main__':
            for method in multiprocessing.get_all_start_methods():
                with multiprocessing.get_context(method).Pool(1) as pool:
                    print(method, pool.map(double, [1, 2]))
    """)
    plain, launched = (execute([*start, str(script)], env=environ) for start in (PLAIN, LAUNCHER))
    assert plain.stdout
    assert (launched.returncode, launched.stdout) == (0, plain.stdout), launched.stderr


CHILD = """
    import json, sys, timm
    print('--result', json.dumps([sys.argv, timm.is_model('sw_tiny'), __name__]))
"""


@needs_command
@needs_posix
def test_python_processes_that_bulk_runner_starts_know_the_models(tmp_path, write, environ):
    write('child.py', CHILD)
    # the way in which timm's bulk_runner.py, and torchrun, choose the interpreter of their child processes
    write('runner.py', """
        import os, subprocess, sys
        cmd = os.getenv('PYTHON_EXEC', sys.executable)
        print(subprocess.check_output([cmd, '-u', 'child.py', '--amp', '--', '--model', 'sw_tiny'], text=True))
    """)
    launched = execute([*LAUNCHER, 'runner.py'], env=environ, cwd=tmp_path)
    assert launched.returncode == 0, launched.stderr
    result = json.loads(launched.stdout.split('--result')[-1])
    assert result == [['child.py', '--amp', '--', '--model', 'sw_tiny'], True, '__main__']


def test_an_interpreter_for_child_processes_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv('PYTHON_EXEC', '/usr/bin/mine')
    tell_children()
    assert os.environ['PYTHON_EXEC'] == '/usr/bin/mine'


def test_without_the_installed_command_the_launcher_warns_that_child_processes_lack_the_models(monkeypatch, caplog):
    monkeypatch.delenv('PYTHON_EXEC', raising=False)
    monkeypatch.setattr(shutil, 'which', lambda name, path: None)
    tell_children()
    assert 'PYTHON_EXEC' not in os.environ
    assert 'will not know the models' in caplog.text


@pytest.mark.parametrize(('argv', 'first'), [(['child.py'], 'child.py'), (['-m', 'child'], '{tmp_path}/child.py')])
def test_in_the_interpreters_place_scripts_and_modules_know_the_models(argv, first, tmp_path, write, environ):
    write('child.py', CHILD)
    command = [sys.executable, '-m', 'timm_shiftwise', '-u', *argv, '--model', '-m']
    launched = execute(command, env=environ, cwd=tmp_path)
    assert launched.returncode == 0, launched.stderr
    assert json.loads(launched.stdout.split('--result')[-1]) \
        == [[first.format(tmp_path=tmp_path), '--model', '-m'], True, '__main__']


@pytest.mark.parametrize(('argv', 'text'), [
    ([], "got ''"),
    (['-c', 'pass'], "got '-c pass'"),
    (['-m'], "got '-m'"),
    (['nowhere.py'], "no script 'nowhere.py'"),
])
def test_in_the_interpreters_place_anything_else_is_refused(argv, text, capsys):
    assert main(['-u', *argv]) == 2
    assert text in capsys.readouterr().err


TORCHRUN = {'LOCAL_RANK': '2', 'RANK': '10', 'WORLD_SIZE': '16', 'LOCAL_WORLD_SIZE': '4'}


@pytest.mark.parametrize(('listed', 'count', 'gpu'), [
    (None, 4, '2'),
    ('4,5,6,7', 4, '6'),
    (' 7, 6 ,5', 3, '5'),
    ('GPU-aa,GPU-bb,GPU-cc,GPU-dd', 4, 'GPU-cc'),
    ('MIG-a/1/0,MIG-a/2/0,MIG-b/1/0', 3, 'MIG-b/1/0'),
    ('3,1,0,-1,2', 3, '0'),
])
def test_a_process_of_a_job_gets_the_gpu_of_its_local_rank(listed, count, gpu):
    environ = TORCHRUN if listed is None else TORCHRUN | {'CUDA_VISIBLE_DEVICES': listed}
    changes = own_gpu(environ, [], lambda: count)
    assert changes == {'CUDA_VISIBLE_DEVICES': gpu, 'LOCAL_RANK': '0'}
    assert own_gpu(environ | changes, [], lambda: 1) == changes  # a launcher inside the launcher changes nothing


@pytest.mark.parametrize('environ', [
    {},
    {'CUDA_VISIBLE_DEVICES': '3'},
    {'LOCAL_RANK': '0', 'RANK': '0', 'WORLD_SIZE': '1'},
    {'LOCAL_RANK': '1'},
    {'WORLD_SIZE': '8', 'RANK': '3'},
])
def test_outside_a_job_of_several_processes_nothing_changes_and_no_gpu_is_counted(environ):
    def count():
        raise AssertionError('counted the GPUs')

    assert own_gpu(environ, ['--device', 'cuda'], count) == {}


@pytest.mark.parametrize(('script_args', 'count', 'changed'), [
    ([], 0, False),
    (['--device', 'cpu'], 4, False),
    (['--model', 'sw_tiny', '--device=cpu', '--amp'], 4, False),
    (['--device', 'cuda:1'], 4, True),
    (['--device-modules', 'timm_shiftwise', '--device', 'cuda'], 4, True),
    (['--device'], 4, False),
])
def test_a_job_on_the_cpu_is_left_alone(script_args, count, changed):
    assert bool(own_gpu(TORCHRUN, script_args, lambda: count)) == changed


@pytest.mark.parametrize(('listed', 'shown'), [
    (None, 'is not set'),
    ('0,1', "is '0,1'"),
    ('5,6,-1,7', "is '5,6,-1,7'"),
])
def test_more_processes_than_gpus_is_an_error_that_names_both(listed, shown):
    environ = TORCHRUN if listed is None else TORCHRUN | {'CUDA_VISIBLE_DEVICES': listed}
    with pytest.raises(CommandError, match='LOCAL_RANK=2 needs a GPU of its own, but the number of GPUs is 2') as error:
        own_gpu(environ, [], lambda: 2)
    assert shown in str(error.value)


def test_importing_the_package_makes_no_cuda_call(environ):
    """CUDA_VISIBLE_DEVICES, which the launcher sets after the import, is read at the first CUDA call."""
    program = textwrap.dedent("""
        import torch

        def called(*args):
            raise AssertionError('a CUDA call')

        for name in ('_cuda_getDeviceCount', '_cuda_init'):
            setattr(torch._C, name, called)
        import timm_shiftwise.cli.run
        assert 'taichi' not in __import__('sys').modules
        try:
            torch.cuda.init()
        except AssertionError:
            print('torch.cuda calls what was replaced')
    """)
    result = execute([sys.executable, '-c', program], env=environ)
    assert result.stdout == 'torch.cuda calls what was replaced\n', result.stderr


def torchrun(arguments: list[str], environ: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *arguments]
    return execute(command, env=environ, cwd=cwd)


@pytest.mark.slow
def test_under_torchrun_on_the_cpu_the_script_sees_torchruns_environment(tmp_path, write, environ):
    script = write('job.py', """
        import json, os, sys
        import timm, torch, torch.distributed as dist
        assert timm.is_model('sw_tiny') and sys.argv[1:] == ['--device', 'cpu', '--', '--help']
        dist.init_process_group('gloo')
        total = torch.tensor(float(dist.get_rank() + 1))
        dist.all_reduce(total)
        names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'CUDA_VISIBLE_DEVICES')
        with open(f'seen{dist.get_rank()}.json', 'w') as file:
            json.dump([*(os.environ.get(name) for name in names), total.item()], file)
        dist.destroy_process_group()
    """)
    result = torchrun(
        ['-m', 'timm_shiftwise', 'run', str(script), '--device', 'cpu', '--', '--help'], environ, tmp_path)
    assert result.returncode == 0, result.stderr
    seen = [json.loads((tmp_path / f'seen{rank}.json').read_text()) for rank in (0, 1)]
    assert seen == [['0', '0', '2', None, 3.0], ['1', '1', '2', None, 3.0]]


# torchrun's own environment with GPUs made up for torch.cuda.device_count, which is all that the launcher asks.
FAKE_GPUS = """
    import os, sys
    import torch

    def device_count():
        listed = os.environ.get('CUDA_VISIBLE_DEVICES')
        return 8 if listed is None else len(listed.split(','))

    torch.version.cuda = '13.0'
    torch.cuda.device_count = device_count if os.environ['NVML'] == '1' else lambda: 8
    from timm_shiftwise.cli import main
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(('listed', 'gpus'), [(None, ['0', '1']), ('6,3', ['6', '3'])])
def test_under_torchrun_each_process_has_its_own_gpu_as_number_0(listed, gpus, tmp_path, write, environ):
    write('fake_gpus.py', FAKE_GPUS)
    write('job.py', """
        import json, os
        from timm.utils import world_info_from_env
        with open(f"seen{os.environ['RANK']}.json", 'w') as file:
            json.dump([os.environ['CUDA_VISIBLE_DEVICES'], *world_info_from_env()], file)
    """)
    environ = environ | {'NVML': '1'} | ({} if listed is None else {'CUDA_VISIBLE_DEVICES': listed})
    result = torchrun(['fake_gpus.py', 'run', 'job.py', '--model', 'sw_tiny'], environ, tmp_path)
    assert result.returncode == 0, result.stderr
    seen = [json.loads((tmp_path / f'seen{rank}.json').read_text()) for rank in (0, 1)]
    # timm's train.py takes cuda:LOCAL_RANK, and the group's size and ranks from RANK and WORLD_SIZE
    assert seen == [[gpus[0], 0, 0, 2], [gpus[1], 0, 1, 2]]


@pytest.mark.slow
def test_where_counting_the_gpus_started_cuda_the_launcher_says_so(tmp_path, write, environ):
    fake = write('fake_gpus.py', FAKE_GPUS)
    script = write('job.py', 'print("ran")')
    job = {'LOCAL_RANK': '1', 'RANK': '1', 'WORLD_SIZE': '2', 'NVML': '0'}
    result = execute([sys.executable, str(fake), 'run', str(script)], env=environ | job)
    assert result.returncode == 2
    assert 'CUDA was running before GPU 1 could be chosen for LOCAL_RANK=1' in result.stderr
    assert 'ran' not in result.stdout.splitlines()

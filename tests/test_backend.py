"""Which backend runs, and that Taichi is a good guest in the process.

What leaves traces in a process runs in one of its own.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from timm_shiftwise.ops import backend as chooser
from timm_shiftwise.ops.backend import ENVIRONMENT_VARIABLE, choose_backend, explain_backend
from timm_shiftwise.ops.taichi import runtime
from timm_shiftwise.ops.taichi.cache import proven_cache

CPU = torch.device('cpu')
# an operator call on two backends, and the check that they agree
PRELUDE = '''
import torch
from timm_shiftwise.ops.shift_add import shift_add
y = torch.randn(2, 12, 10, 11, generator=torch.Generator().manual_seed(0))
wide = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0, 2]], dtype=torch.int32)
wiring = torch.cat([wide, wide.flip(1), wide[:, :1]], dim=1)[None]
def call(backend=None):
    return torch.stack(shift_add(y, wiring, 11, 3, 'full', backend))
def agree(backend=None):
    torch.testing.assert_close(call(backend), call('torch'))
'''


def run(code: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
    """Run code after the prelude in a fresh Python; fail with its output if it fails or hangs."""
    env = {name: value for name, value in os.environ.items() if name != ENVIRONMENT_VARIABLE}
    done = subprocess.run(
        [sys.executable, '-c', PRELUDE + textwrap.dedent(code)],
        env={**env, **environment}, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f'{done.stdout}\n{done.stderr}'
    return done


@pytest.fixture
def no_variable(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


# -- the choice --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures('needs_taichi')
def test_taichi_is_the_default_where_it_can_run(no_variable, caplog):
    assert choose_backend(None, CPU) == choose_backend('auto', CPU) == 'taichi'
    assert 'default' in explain_backend(None, CPU).reason
    assert not caplog.records


@pytest.mark.usefixtures('needs_taichi')
def test_the_environment_variable_chooses_and_the_argument_overrides_it(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, 'torch')
    assert choose_backend(None, CPU) == 'torch'
    assert ENVIRONMENT_VARIABLE in explain_backend(None, CPU).reason
    assert choose_backend('taichi', CPU) == 'taichi'
    assert choose_backend('auto', CPU) == 'taichi'
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, '')
    assert choose_backend(None, CPU) == 'taichi'


def test_unknown_names_are_refused_with_those_allowed(monkeypatch):
    with pytest.raises(ValueError, match="the backend argument must be one of 'auto', 'taichi', 'torch', got 'Taichi'"):
        choose_backend('Taichi', CPU)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, 'triton')
    message = f"{ENVIRONMENT_VARIABLE} must be one of 'auto', 'taichi', 'torch', got 'triton'"
    with pytest.raises(ValueError, match=message):
        choose_backend(None, CPU)


@pytest.mark.parametrize('device', ['mps', 'xpu', 'meta'])
def test_devices_that_taichi_never_serves_fall_back_without_a_warning(device, no_variable, caplog):
    caplog.set_level('DEBUG')
    assert choose_backend(None, torch.device(device)) == 'torch'
    assert not caplog.records
    with pytest.raises(RuntimeError, match=f"asks for 'taichi'.*not on {device}"):
        choose_backend('taichi', torch.device(device))


def test_a_backend_asked_for_that_cannot_run_raises_and_one_chosen_falls_back_with_one_warning(
        no_variable, monkeypatch, caplog):
    monkeypatch.setattr(runtime, 'obstacle', lambda device: 'it rains')
    monkeypatch.setattr(chooser, '_warned', set())
    with pytest.raises(RuntimeError, match="the backend argument asks for 'taichi', which cannot run here: it rains"):
        choose_backend('taichi', CPU)
    assert not caplog.records
    assert [choose_backend(None, CPU) for _ in range(3)] == ['torch'] * 3
    assert [record.levelname for record in caplog.records] == ['WARNING']
    assert 'it rains' in caplog.text
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, 'taichi')
    with pytest.raises(RuntimeError, match=f'{ENVIRONMENT_VARIABLE} asks for'):
        choose_backend(None, CPU)


def test_only_the_first_visible_cuda_device_is_taichis(no_variable, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', '12.8')
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 3)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(runtime, '_ensure_program', lambda device_type: None)
    assert explain_backend('taichi', torch.device('cuda', 0)).backend == 'taichi'
    for device in (torch.device('cuda', 1), torch.device('cuda')):
        with pytest.raises(RuntimeError, match='CUDA_VISIBLE_DEVICES'):
            explain_backend('taichi', device)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    with pytest.raises(RuntimeError, match='graph'):
        explain_backend('taichi', torch.device('cuda', 0))


def test_on_a_gpu_taichi_is_asked_for_or_does_not_run(no_variable, monkeypatch, caplog):
    monkeypatch.setattr(runtime, 'obstacle', lambda device: pytest.fail('Taichi was looked for'))
    for requested in (None, 'auto'):
        choice = explain_backend(requested, torch.device('cuda', 0))
        assert choice.backend == 'torch' and 'asked for' in choice.reason and not choice.fallback


def test_a_chosen_backend_costs_little_per_call(no_variable, monkeypatch):
    choose_backend(None, CPU)
    monkeypatch.setattr(runtime, '_start', lambda *args: pytest.fail('Taichi was started again'))
    called = []
    sys.setprofile(lambda frame, event, function: called.append(frame.f_code.co_name) if event == 'call' else None)
    try:
        choose_backend(None, CPU)
    finally:
        sys.setprofile(None)
    assert len(called) < 20, called


# -- a fresh process ---------------------------------------------------------------------------------------------------


def test_importing_the_operators_does_not_import_taichi():
    run('''
        import sys
        assert not [name for name in sys.modules if name.split('.')[0] == 'taichi']
        call('torch')
        assert 'taichi' not in sys.modules
    ''')


@pytest.mark.usefixtures('needs_taichi')
def test_nothing_is_printed():
    done = run("call('taichi'); assert 'taichi' in __import__('sys').modules")
    assert done.stdout == done.stderr == ''


@pytest.mark.parametrize('installed, reason', [
    (True, 'Taichi cannot be imported (ZeroDivisionError: division by zero)'),
    (False, 'Taichi is not installed (it has wheels for Python 3.10 to 3.13)'),
])
def test_without_a_taichi_that_loads_there_is_one_warning_and_the_call_runs(installed, reason, tmp_path):
    (tmp_path / 'taichi.py').write_text('1 / 0')
    done = run(f'''
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        if not {installed}:
            sys.modules['taichi'] = None
        agree(); agree('auto')
    ''')
    assert done.stdout == ''
    assert done.stderr.count('Shift-wise operators run in plain PyTorch') == 1
    assert reason in done.stderr


@pytest.mark.parametrize('argument, variable', [("'taichi'", 'auto'), ('None', 'taichi')])
def test_without_taichi_asking_for_it_raises(argument, variable):
    run(f'''
        import sys
        sys.modules['taichi'] = None
        try:
            call({argument})
        except RuntimeError as error:
            assert 'Taichi is not installed' in str(error)
        else:
            raise SystemExit('no error')
    ''', TIMM_SHIFTWISE_BACKEND=variable)


def test_the_environment_variable_keeps_taichi_out():
    run("call(); import sys; assert 'taichi' not in sys.modules", TIMM_SHIFTWISE_BACKEND='torch')


@pytest.mark.usefixtures('needs_taichi')
def test_the_process_is_left_as_it_was():
    run('''
        import logging, os, random, signal, sys, warnings
        import numpy

        def signals():
            """Blocked, ignored and caught by native code; those above 31 the C library uses for threads."""
            if not os.path.exists('/proc/self/status'):
                return None
            lines = [line.split() for line in open('/proc/self/status')]
            return {name: int(mask, 16) & 0x7fffffff for name, mask in (line for line in lines if line[0] in (
                'SigBlk:', 'SigIgn:', 'SigCgt:'))}

        def state():
            return {
                'random': random.getstate(),
                'numpy.random': numpy.random.get_state()[1].tolist(),
                'torch.random': torch.get_rng_state().tolist(),
                'handlers': [signal.getsignal(number) for number in sorted(signal.valid_signals())],
                'signals': signals(),
                'environment': dict(os.environ),
                'directory': os.getcwd(),
                'logging': (list(logging.root.handlers), logging.root.level),
                'threads': (torch.get_num_threads(), torch.get_num_interop_threads()),
                'errors': (numpy.geterr(), sys.excepthook),
                'streams': (sys.stdout, sys.stderr),
                'warnings': warnings.filters[:],
                'dtype': torch.get_default_dtype(),
                'umask': os.umask(os.umask(0o22)),
            }

        agree('torch')
        before = state()
        agree('taichi')
        changed = {name: (value, state()[name]) for name, value in before.items() if value != state()[name]}
        assert not changed, changed
    ''')


@pytest.mark.usefixtures('needs_taichi')
def test_threads_are_those_of_pytorch():
    run('''
        from timm_shiftwise.ops.taichi import runtime
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            agree('taichi')
            assert runtime.num_threads() == threads == torch.get_num_threads()
    ''')


# -- what outlasts a process -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures('needs_taichi')
def test_an_unknown_architecture_in_the_environment_is_a_reason_and_no_abort(monkeypatch):
    monkeypatch.setattr(runtime, '_failures', {})
    monkeypatch.setenv('TI_ARCH', 'bogus')
    reason = runtime._start(runtime.import_taichi(), 'cpu')
    assert reason is not None and re.search("TI_ARCH must be one of x64, .*got 'bogus'", reason)


def kernels_after(folder: Path, damage: Callable[[Path], object]) -> list[str]:
    """Names that the next to use a cache of two files finds, after some damage to it."""
    with proven_cache(folder) as kernels:
        (kernels / 'ticache.tcb').write_bytes(b'index')
        (kernels / 'T0.tic').write_bytes(b'code')
    damage(kernels)
    with proven_cache(folder) as kernels:
        found = sorted(path.name for path in kernels.iterdir())
    with proven_cache(folder) as kernels:  # whatever it was, it is over
        assert sorted(path.name for path in kernels.iterdir()) == found
    return found


@pytest.mark.parametrize('damage', [
    lambda kernels: None,
    lambda kernels: (kernels / 'ticache.lock').touch(),  # a process was killed while it held Taichi's lock
], ids=['none', 'lock left'])
def test_a_cache_as_it_was_written_is_kept_without_the_locks_of_the_dead(damage, tmp_path):
    assert kernels_after(tmp_path, damage) == ['T0.tic', 'ticache.tcb']


@pytest.mark.parametrize('damage', [
    lambda kernels: (kernels / 'ticache.tcb').write_bytes(b'indeX'),
    lambda kernels: (kernels / 'T0.tic').write_bytes(b'cod'),
    lambda kernels: (kernels / 'T0.tic').unlink(),
    lambda kernels: (kernels / 'T1.tic').touch(),
    lambda kernels: (kernels.parent / 'checksums.json').write_bytes(b'{"T0.tic": '),
    lambda kernels: (kernels.parent / 'checksums.json').write_bytes(b'\xff'),
    lambda kernels: (kernels.parent / 'checksums.json').unlink(),
    lambda kernels: shutil.rmtree(kernels),
], ids=['byte', 'cut', 'file gone', 'file too many', 'sums cut', 'sums damaged', 'sums gone', 'all gone'])
def test_a_cache_that_is_not_as_it_was_written_is_emptied(damage, tmp_path):
    assert kernels_after(tmp_path, damage) == []


@pytest.mark.slow
def test_a_damaged_cache_and_processes_that_start_together_cost_time_only(tmp_path):
    """One byte of Taichi's index changed, and a lock left: each alone kills Taichi or switches its cache off."""
    environment = dict(XDG_CACHE_HOME=str(tmp_path))
    with ThreadPoolExecutor(2) as ranks:
        starts = list(ranks.map(lambda _: run("agree('taichi')", **environment), range(2)))
    index, = tmp_path.glob('taichi/timm_shiftwise/*/kernels/ticache.tcb')
    sums = index.parents[1] / 'checksums.json'
    kernels = {path.name for path in index.parent.iterdir()}
    assert len(kernels) == 2 and json.loads(sums.read_text()).keys() == kernels

    damaged = bytearray(index.read_bytes())
    damaged[32] ^= 0xff  # the process dies of this byte where it is read
    index.write_bytes(damaged)
    index.with_name('ticache.lock').touch()
    starts.append(run("agree('taichi')", **environment))
    assert json.loads(sums.read_text()).keys() == kernels == {path.name for path in index.parent.iterdir()}
    assert [done.stderr for done in starts] == [''] * 3


@pytest.mark.usefixtures('needs_taichi')
def test_without_a_place_for_the_cache_kernels_run_and_the_reason_is_said(tmp_path):
    (tmp_path / 'taichi').mkdir()
    (tmp_path / 'taichi' / 'timm_shiftwise').touch()
    done = run("agree('taichi')", XDG_CACHE_HOME=str(tmp_path))
    assert done.stderr.count('compiled anew in this process') == 1


# -- somebody else's Taichi program ------------------------------------------------------------------------------------


@pytest.mark.usefixtures('needs_taichi')
def test_a_running_program_is_used_and_keeps_its_fields():
    done = run('''
        import taichi as ti
        ti.init(arch=ti.cpu, default_fp=ti.f64, default_ip=ti.i64)
        field = ti.field(ti.f32, shape=8)
        field.fill(3)
        later = ti.field(ti.i32, shape=4)
        program = ti.lang.impl.get_runtime().prog
        agree('taichi')
        assert ti.lang.impl.get_runtime().prog is program
        assert field.to_numpy().tolist() == [3] * 8
        later.fill(2)
        new = ti.field(ti.i32, shape=3)
        new.fill(1)
        agree('taichi')
        assert later.to_numpy().tolist() == [2] * 4 and new.to_numpy().tolist() == [1] * 3
    ''')
    assert done.stderr.count('compile for minutes at their first call') == 1  # before they do


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    'debug=True, default_fp=ti.f16, kernel_profiler=True',
    'force_scalarize_matrix=True, cpu_max_num_threads=1',
    'real_matrix_scalarize=False, fast_math=False, offline_cache=False, opt_level=0',
])
def test_kernels_run_in_a_program_with_other_settings(options):
    run(f'''
        import taichi as ti
        ti.init(arch=ti.cpu, {options})
        y.requires_grad_()
        for backend in ('taichi', 'torch'):
            out = call(backend)
            grad, = torch.autograd.grad((out * out).sum(), y)
            results = locals().setdefault('results', [])
            results.append((out.detach(), grad))
        for got, want in zip(*results):
            torch.testing.assert_close(got, want)
    ''')


@pytest.mark.usefixtures('needs_taichi')
def test_a_program_on_another_architecture_is_left_alone():
    done = run('''
        import taichi as ti
        try:
            ti.init(arch=ti.vulkan, enable_fallback=False)
            started = True
        except Exception:
            from unittest import mock
            from timm_shiftwise.ops.taichi import runtime
            ti.init(arch=ti.cpu)
            mock.patch.object(runtime, '_fits', lambda *args: False).start()
        program = ti.lang.impl.get_runtime().prog
        agree()
        assert ti.lang.impl.get_runtime().prog is program
        try:
            call('taichi')
        except RuntimeError as error:
            assert 'the Taichi program of this process runs on' in str(error)
        else:
            raise SystemExit('no error')
    ''')
    assert done.stderr.count('Shift-wise operators run in plain PyTorch') == 1


@pytest.mark.usefixtures('needs_taichi')
def test_a_later_init_and_a_reset_by_the_user_do_no_harm():
    run('''
        import taichi as ti
        agree('taichi')
        ti.init(arch=ti.cpu)
        field = ti.field(ti.f32, shape=8)
        field.fill(3)
        agree('taichi')
        assert field.to_numpy().tolist() == [3] * 8
        ti.reset()
        agree('taichi')
        ti.init(arch=ti.cpu, cpu_max_num_threads=1)
        agree('taichi')
    ''')


@pytest.mark.usefixtures('needs_taichi')
def test_a_gradient_tape_of_the_user_does_not_record_the_kernels():
    run('''
        import taichi as ti
        ti.init(arch=ti.cpu)
        x = ti.field(ti.f32, shape=(), needs_grad=True)
        loss = ti.field(ti.f32, shape=(), needs_grad=True)

        source = (
            "import taichi as ti\\n@ti.kernel\\ndef square(x: ti.template(), loss: ti.template()):\\n"
            "    loss[None] += x[None] ** 2\\n")
        import importlib.util, pathlib, tempfile
        path = pathlib.Path(tempfile.mkdtemp()) / 'user_code.py'
        path.write_text(source)
        spec = importlib.util.spec_from_file_location('user_code', path)
        user_code = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(user_code)

        x[None] = 3
        with ti.ad.Tape(loss):
            user_code.square(x, loss)
            agree('taichi')
        assert x.grad[None] == 6
    ''')


# -- forks, workers and threads ----------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system cannot fork')
FORK = '''
import os, signal
def in_child(function):
    pid = os.fork()
    if pid == 0:
        signal.alarm(240)  # a hang ends as a failure
        function()
        raise SystemExit(0)  # through the interpreter's whole shutdown
    assert os.waitpid(pid, 0)[1] == 0
'''


@pytest.mark.usefixtures('needs_taichi')
@needs_fork
def test_a_child_forked_after_taichi_started_falls_back_and_ends():
    done = run(FORK + '''
agree('taichi')
torch.set_num_threads(1)
in_child(agree)
def forced():
    try:
        call('taichi')
    except RuntimeError as error:
        assert 'forked' in str(error)
    else:
        raise SystemExit(1)
in_child(forced)
agree('taichi')
''')
    assert done.stderr.count('Shift-wise operators run in plain PyTorch') == 1
    assert 'before this process was forked' in done.stderr


@pytest.mark.usefixtures('needs_taichi')
@needs_fork
def test_a_child_forked_before_taichi_started_has_taichi():
    run(FORK + '''
torch.set_num_threads(1)
in_child(lambda: agree('taichi'))
in_child(lambda: agree('taichi'))
agree('taichi')
in_child(agree)
''')


@pytest.mark.usefixtures('needs_taichi')
@needs_fork
def test_a_child_of_a_program_that_the_user_started_falls_back():
    run(FORK + '''
import taichi as ti
ti.init(arch=ti.cpu)
field = ti.field(ti.f32, shape=8)
field.fill(3)
torch.set_num_threads(1)
in_child(agree)
assert field.to_numpy().tolist() == [3] * 8
''')


DATASET = '''
import torch
from timm_shiftwise.ops.shift_add import shift_add


class Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        y = torch.full([1, 4, 8, 8], float(index))
        wiring = torch.tensor([[[0, 1, 2, 3, 0, 1, 2, 3, 0]]], dtype=torch.int32)
        return torch.stack(shift_add(y, wiring, 11, 3))
'''


@pytest.mark.slow
@pytest.mark.parametrize('method, started', [
    pytest.param('fork', False, marks=needs_fork),
    pytest.param('fork', True, marks=needs_fork),
    ('spawn', True),  # a spawned worker knows nothing of its parent's program
])
def test_data_loader_workers_call_the_operator(method, started, tmp_path):
    (tmp_path / 'worker_data.py').write_text(DATASET)
    run(f'''
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from worker_data import Dataset
        if {started}:
            agree('taichi')
        loader = torch.utils.data.DataLoader(
            Dataset(), batch_size=2, num_workers=2, multiprocessing_context={method!r}, timeout=240)
        got = torch.cat(list(loader))
        want = torch.stack([Dataset()[index] for index in range(6)])
        torch.testing.assert_close(got, want)
        agree('taichi')
    ''')


@pytest.mark.usefixtures('needs_taichi')
def test_four_python_threads_at_once():
    run('''
        import threading
        errors = []

        def work(channels):
            try:
                for repeat in range(20):
                    y = torch.randn(2, 4 * channels, 10, 11, requires_grad=True)
                    wiring = torch.randint(4, (1, channels, 9))
                    branches = [shift_add(y, wiring, 11, 3, 'full', name) for name in ('taichi', 'torch')]
                    grads = [torch.autograd.grad([b * b for b in three], y, [torch.ones_like(b) for b in three])[0]
                             for three in branches]
                    torch.testing.assert_close(torch.stack(branches[0]), torch.stack(branches[1]))
                    torch.testing.assert_close(*grads)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=[n + 1]) for n in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        if errors:
            raise errors[0]
    ''')


@pytest.mark.usefixtures('needs_taichi')
@needs_fork
def test_forking_while_other_threads_launch_does_not_hang():
    run(FORK + '''
import threading
torch.set_num_threads(1)
agree('taichi')  # PyTorch's own lazy imports do not survive a fork in the middle
stop = threading.Event()
def work():
    while not stop.wait(0.001):
        call('taichi')
threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
[thread.start() for thread in threads]
for _ in range(5):
    in_child(agree)
stop.set()
[thread.join() for thread in threads]
''')

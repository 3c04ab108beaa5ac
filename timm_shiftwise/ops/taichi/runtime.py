"""The Taichi program that the kernels run in, started at first use and shared with whoever else uses Taichi here.

Taichi holds one program a process, on one architecture. So:

- Nothing of Taichi is imported or started before the first operator call that wants it, and it prints nothing then.
- A program that somebody else has started is used as it is, if its architecture fits, and never restarted: a restart
  destroys its owner's fields. After somebody's ``ti.init`` or ``ti.reset`` the kernels compile anew by themselves.
- A forked child has none of the threads of the program that it inherited, so it does not use it.
- On CUDA, Taichi only ever sees the first visible device.
- What our own program compiles is kept for the next process (:mod:`.cache`); it ends, and writes, before Python does.
- Taichi's bookkeeping in Python is not made for several threads, so one lock is held around starts and launches; fields
  are allocated in the thread that started the program.

The CUDA part was written with care but not run: no CUDA machine was at hand.
"""
import atexit
import ctypes
import importlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .cache import cache_folder, proven_cache

_logger = logging.getLogger(__name__)

DEVICE_TYPES = ('cpu', 'cuda')
LANES = 16 if torch.backends.cpu.get_cpu_capability() == 'AVX512' else 8
"""Numbers of float32 in a vector: as many as the registers of this processor hold, and no fewer than eight."""
PACKS = (8, 4, 2)
"""How many numbers of a row of a tensor may be read and written at once, the most that fits first."""
# vectors stay vectors, see the kernels; not settable through the environment unless the user does it
_OPTIONS = {'real_matrix_scalarize': False, 'force_scalarize_matrix': False, 'log_level': 'warn'}

_NO_CACHE = (OSError, NotImplementedError)  # the latter where a file system has no locks

_lock = threading.RLock()
_failures: dict[str, str] = {}  # what failed ('import' or an architecture) -> why
_own_program: Any = None
_own_cache: Path | None = None
_inherited_program: Any = None
_warned_of_slow_start = False


def import_taichi() -> Any:
    """Import Taichi without its banner.

    Returns:
        The module ``taichi``.

    Raises:
        ImportError: If it is not installed or does not load.
    """
    loaded = sys.modules.get('taichi')
    if loaded is not None and hasattr(loaded, 'init'):
        return loaded
    # both are read once, while the module loads
    quiet = {'ENABLE_TAICHI_HEADER_PRINT': 'False', 'TI_MANYLINUX2014_OK': '1'}
    with _lock, mock.patch.dict(os.environ, quiet), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return importlib.import_module('taichi')


def obstacle(device: torch.device) -> str | None:
    """Say what keeps Taichi kernels from running on tensors of a device; start Taichi if nothing does.

    Args:
        device: Where the tensors are.

    Returns:
        None if kernels can be launched now, else the reason why not, a clause for people.
    """
    if device.type not in DEVICE_TYPES:
        return f'Taichi kernels run on tensors on {" and ".join(DEVICE_TYPES)}, not on {device.type}'
    if device.type == 'cuda':
        found = _cuda_obstacle(device)
        if found is not None:
            return found
    with _lock:
        return _ensure_program(device.type)


def _cuda_obstacle(device: torch.device) -> str | None:
    if torch.version.cuda is None:
        return 'Taichi has no kernels for this build of PyTorch, which is not for CUDA'
    index = torch.cuda.current_device() if device.index is None else device.index
    if index != 0:
        return (
            f'Taichi only sees the first visible CUDA device and the tensors are on cuda:{index} (give each process '
            f'one device through CUDA_VISIBLE_DEVICES)')
    if torch.cuda.is_current_stream_capturing():
        return 'Taichi kernels cannot be captured in a CUDA graph'
    return None


def _ensure_program(device_type: str) -> str | None:
    if 'import' in _failures:
        return _failures['import']
    try:
        ti = import_taichi()
    except Exception as error:  # noqa: BLE001  (a broken installation raises more than ImportError)
        if isinstance(error, ModuleNotFoundError) and error.name == 'taichi':
            _failures['import'] = 'Taichi is not installed (it has wheels for Python 3.10 to 3.13)'
        else:
            _failures['import'] = f'Taichi cannot be imported ({type(error).__name__}: {error})'
        return _failures['import']
    runtime = ti.lang.impl.get_runtime()
    program = runtime.prog
    if program is None:
        return _start(ti, device_type)
    if program is _inherited_program:
        return 'Taichi was started before this process was forked, and its threads did not come along (spawn instead)'
    if _fits(ti, program, device_type):
        if program is not _own_program:
            _warn_of_slow_start()
        return _fields_obstacle(ti, runtime)
    if program is _own_program and device_type == 'cuda' and not _holds_fields(ti, runtime):
        return _start(ti, device_type)
    name = ti._lib.core.arch_name(program.config().arch)
    return f'the Taichi program of this process runs on {name} and the tensors are on {device_type}'


def _fits(ti: Any, program: Any, device_type: str) -> bool:
    arch = program.config().arch
    return arch == ti.cuda if device_type == 'cuda' else arch in (ti.x64, ti.arm64)


def _holds_fields(ti: Any, runtime: Any) -> bool:
    builder = ti.lang.impl._root_fb
    return bool(runtime.global_vars) or not builder.empty or bool(ti.FieldsBuilder._finalized_roots())


def _fields_obstacle(ti: Any, runtime: Any) -> str | None:
    # the first launch after a field was declared allocates it, which only the thread that started the program may do
    pending = not runtime.materialized or not ti.lang.impl._root_fb.empty
    if pending and threading.current_thread() is not threading.main_thread():
        return 'Taichi fields have been declared whose first use must come from the main thread, and this is another'
    return None


def _warn_of_slow_start() -> None:
    global _warned_of_slow_start
    if scalarizes() and not _warned_of_slow_start:
        _warned_of_slow_start = True
        _logger.warning(
            'The Taichi program of this process takes vectors apart: shift-wise operators compile for minutes at their '
            'first call. ti.init(real_matrix_scalarize=False, force_scalarize_matrix=False) makes that seconds.')


def _start(ti: Any, device_type: str) -> str | None:
    global _own_cache
    if device_type in _failures:
        return _failures[device_type]
    arch, known = os.environ.get('TI_ARCH'), list(ti._lib.core.Arch.__members__)
    if arch is not None and arch not in known:  # Taichi would abort the process
        _failures[device_type] = f'the environment variable TI_ARCH must be one of {", ".join(known)}, got {arch!r}'
        return _failures[device_type]
    if 'TI_OFFLINE_CACHE' in os.environ or 'TI_OFFLINE_CACHE_FILE_PATH' in os.environ:  # the user looks after it
        return _init(ti, device_type)
    folder = cache_folder(ti)
    try:
        with proven_cache(folder) as kernels:
            failure = _init(ti, device_type, offline_cache_file_path=str(kernels))
    except _NO_CACHE as error:
        _logger.warning('Taichi kernels are compiled anew in this process: %s cannot be used (%s).', folder, error)
        return _init(ti, device_type, offline_cache=False)
    if _own_cache is None:
        atexit.register(_save_kernels)
    _own_cache = folder
    return failure


def _init(ti: Any, device_type: str, **options: Any) -> str | None:
    global _own_program
    # an option that is also set in the environment would make Taichi print a warning; the environment wins then
    options |= {name: value for name, value in _OPTIONS.items() if f'TI_{name.upper()}' not in os.environ}
    if 'TI_CPU_MAX_NUM_THREADS' not in os.environ:
        options['cpu_max_num_threads'] = max(torch.get_num_threads(), os.cpu_count() or 1)
    misc = ti.lang.misc
    with ExitStack() as quiet:
        # Taichi prints the architecture through Python's print and asks a server for its newest version
        quiet.enter_context(mock.patch.object(misc, 'print', lambda *args, **kwargs: None, create=True))
        quiet.enter_context(mock.patch.object(misc._version_check, 'start_version_check_thread', lambda: None))
        try:
            ti.init(arch=ti.cuda if device_type == 'cuda' else ti.cpu, enable_fallback=False, **options)
        except Exception as error:  # noqa: BLE001  (whatever the driver raises)
            _failures[device_type] = f'Taichi does not start on {device_type} ({type(error).__name__}: {error})'
            return _failures[device_type]
    runtime = ti.lang.impl.get_runtime()
    runtime.materialize()  # here, because only the starting thread may
    _own_program = runtime.prog
    if not _fits(ti, _own_program, device_type):
        _failures[device_type] = (
            f'Taichi started on {ti._lib.core.arch_name(_own_program.config().arch)} instead of {device_type}')
        return _failures[device_type]
    return None


def _save_kernels() -> None:
    """End our program while its cache is held: by itself it would write there later, when nobody can note checksums."""
    ti = import_taichi()
    with _lock:
        program = ti.lang.impl.get_runtime().prog
        if _own_cache is None or program is None or program is not _own_program or program is _inherited_program:
            return
        _failures.update(dict.fromkeys(DEVICE_TYPES, 'this process is ending'))
        with suppress(*_NO_CACHE), proven_cache(_own_cache):
            ti.reset()


def setting(name: str) -> Any:
    """A setting of the running Taichi program, such as ``'real_matrix_scalarize'``."""
    return getattr(import_taichi().lang.impl.get_runtime().prog.config(), name)


def scalarizes() -> bool:
    """Whether the running Taichi program takes vectors apart into scalars, and so compiles our kernels slowly."""
    return setting('real_matrix_scalarize') or setting('force_scalarize_matrix')


def num_threads() -> int:
    """Threads a CPU kernel should use: as many as PyTorch would, as far as the Taichi program has them."""
    return max(1, min(torch.get_num_threads(), setting('cpu_max_num_threads')))


@contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """Hold everything that a kernel launch on tensors of a device needs.

    One thread launches at a time, a gradient tape of the user's own Taichi code does not record our kernels, and on
    CUDA the stream that PyTorch works on and the default stream, which Taichi works on, wait for one another.
    """
    with _lock:
        runtime = import_taichi().lang.impl.get_runtime()
        tape, runtime.target_tape = runtime.target_tape, None
        forward_mode, runtime.fwd_mode_manager = runtime.fwd_mode_manager, None
        streams = None
        if device.type == 'cuda':
            streams = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
            streams[1].wait_stream(streams[0])
        try:
            yield
        finally:
            if streams is not None:
                streams[0].wait_stream(streams[1])
            runtime.target_tape, runtime.fwd_mode_manager = tape, forward_mode


def _after_fork_in_child() -> None:
    global _lock, _inherited_program
    _lock = threading.RLock()
    impl = sys.modules.get('taichi.lang.impl')
    program = None if impl is None else impl.get_runtime().prog
    if program is not None:
        _inherited_program = program
        # its destructor would wait for threads that this process does not have: never let it run
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(program))


if hasattr(os, 'register_at_fork'):
    # held while forking, so that a child never inherits Taichi half started or a kernel half compiled
    os.register_at_fork(
        before=lambda: _lock.acquire(),
        after_in_parent=lambda: _lock.release(),
        after_in_child=_after_fork_in_child,
    )

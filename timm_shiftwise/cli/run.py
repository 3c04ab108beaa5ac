"""`timm-shiftwise run SCRIPT ARGS...`: a script as `python SCRIPT ARGS...`, with this package's models registered.

timm's train.py can import the package itself (`--device-modules timm_shiftwise`); validate.py, inference.py,
benchmark.py, onnx_export.py and others cannot, and know the models only when run from here. The models need no further
step: this module lies in the package, and importing the package registers them.

Two more things are done for the script.

- Under torchrun each process is left with one GPU, see `take_own_gpu`.
- bulk_runner.py starts a Python process for each model, which must know the models too. It starts them with the
  interpreter that the environment variable PYTHON_EXEC names, as torchrun does, so this variable is set to the
  installed command `timm-shiftwise`, which runs `-u SCRIPT ARGS...` as the interpreter would, through here
  (`stand_in`). Processes started in other ways, multiprocessing's among them, know the models once they import the
  package or unpickle one of its objects.
"""
import argparse
import builtins
import io
import logging
import os
import re
import runpy
import shutil
import sys
import sysconfig
import types
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from . import CommandError

_logger = logging.getLogger(__name__)

_TIMM_REPOSITORY = 'https://github.com/huggingface/pytorch-image-models'


def add_parser(subparsers: 'argparse._SubParsersAction[argparse.ArgumentParser]') -> None:
    """Declare the arguments; those after SCRIPT never come here, `main` hands them over in `args.script_args`."""
    parser = subparsers.add_parser(
        'run',
        help="run one of timm's scripts, or any other, with the models registered",
        usage='%(prog)s [-h] SCRIPT [ARGS ...]',
        description='Run SCRIPT as `python SCRIPT ARGS...` would, with the models of timm_shiftwise registered.',
        epilog='Under torchrun: torchrun --nproc_per_node=8 -m timm_shiftwise run SCRIPT ARGS...',
    )
    parser.add_argument('script', metavar='SCRIPT', help='path, or the name of a file in the directory $TIMM_SCRIPTS')


def run(args: argparse.Namespace) -> int:
    """Run `args.script` with `args.script_args`; whatever the script raises, SystemExit too, passes through."""
    _run_file(args.script, args.script_args)
    return 0


def stand_in(argv: Sequence[str]) -> int:
    """Do what `python -u ARGV...` would, with the models registered.

    bulk_runner.py and torchrun call the program that PYTHON_EXEC names so, with a script or with `-m MODULE`.

    Args:
        argv: what follows `-u`.

    Raises:
        CommandError: anything else follows, or there is no such script.
    """
    if not argv or (argv[0].startswith('-') and (argv[0] != '-m' or len(argv) < 2)):
        raise CommandError(f"expected SCRIPT or -m MODULE, got {' '.join(argv)!r}")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=True)
    if argv[0] == '-m':
        _prepare(argv[2:])
        sys.argv[1:] = argv[2:]
        _set_script_directory(os.getcwd())
        runpy.run_module(argv[1], run_name='__main__', alter_sys=True)
    else:
        _run_file(argv[0], argv[1:])
    return 0


def find_script(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """Find a script by its path, else in the directory that TIMM_SCRIPTS names.

    Args:
        name: path, or file name in $TIMM_SCRIPTS.
        environ: environment to read TIMM_SCRIPTS from.

    Returns:
        `name` itself, or its path in $TIMM_SCRIPTS.

    Raises:
        CommandError: no such file; the message names the places and says where timm's scripts come from.
    """
    candidates = [name]
    if environ.get('TIMM_SCRIPTS'):
        candidates.append(os.path.join(environ['TIMM_SCRIPTS'], name))
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate

    import timm
    tag = f'v{timm.__version__}' if re.fullmatch(r'\d+(\.\d+)*', timm.__version__) else 'main'
    looked_at = '\n'.join(f'  {os.path.abspath(candidate)}' for candidate in dict.fromkeys(candidates))
    unset = '' if environ.get('TIMM_SCRIPTS') else '\n  $TIMM_SCRIPTS (not set)'
    raise CommandError(
        f'no script {name!r}. Looked at\n{looked_at}{unset}\n'
        f"timm's wheel holds no scripts. Those for the installed timm {timm.__version__}:\n"
        f'  git clone --depth 1 --branch {tag} {_TIMM_REPOSITORY} timm-scripts\n'
        f'  export TIMM_SCRIPTS="$PWD/timm-scripts"'
    )


def _device(script_args: Sequence[str]) -> str:
    """Value of timm's option `--device`, which is 'cuda' where it is not given."""
    device = 'cuda'
    for argument, following in pairwise([*script_args, '']):
        if argument == '--device':
            device = following
        elif argument.startswith('--device='):
            device = argument.removeprefix('--device=')
    return device


def own_gpu(environ: Mapping[str, str], script_args: Sequence[str], count_gpus: Callable[[], int]) -> dict[str, str]:
    """The environment variables that leave a process of a torchrun job with its own GPU only.

    Args:
        environ: environment of the process.
        script_args: arguments of the script; where their `--device` is not cuda nothing is to change.
        count_gpus: number of GPUs that the process can see now.

    Returns:
        CUDA_VISIBLE_DEVICES with the one GPU, of those visible, that LOCAL_RANK stands for, and LOCAL_RANK 0, which is
        that GPU's number from now on; RANK and WORLD_SIZE stay. Empty outside a job of several processes and without
        GPUs.

    Raises:
        CommandError: there are fewer GPUs than processes on this machine.
    """
    if 'LOCAL_RANK' not in environ or int(environ.get('WORLD_SIZE', '1')) < 2:
        return {}
    if not _device(script_args).startswith('cuda'):
        return {}
    count = count_gpus()
    if count == 0:
        return {}

    listed = environ.get('CUDA_VISIBLE_DEVICES')
    # a list may be longer than the count: CUDA ignores the first entry that stands for no GPU, and all after it
    gpus = [str(index) for index in range(count)] if listed is None else [gpu.strip() for gpu in listed.split(',')]
    local_rank = int(environ['LOCAL_RANK'])
    if local_rank >= count:
        raise CommandError(
            f'the process with LOCAL_RANK={local_rank} needs a GPU of its own, but the number of GPUs is {count} '
            f'(CUDA_VISIBLE_DEVICES {"is not set" if listed is None else f"is {listed!r}"}). Start no more processes '
            f"than GPUs on this machine, or set CUDA_VISIBLE_DEVICES='' to run on the CPU"
        )
    return {'CUDA_VISIBLE_DEVICES': gpus[local_rank], 'LOCAL_RANK': '0'}


def take_own_gpu(script_args: Sequence[str]) -> None:
    """Leave this process of a torchrun job with one GPU, as number 0, which is the one that Taichi always takes.

    torch was imported with the package and has not been told of the change; it need not be: CUDA reads
    CUDA_VISIBLE_DEVICES when it starts, which is the process's first CUDA call, and importing torch, timm and this
    package makes none. Counting the GPUs makes none either where torch can ask NVML. Where it cannot, the count has
    started CUDA, the change comes too late, and this is an error.

    Raises:
        CommandError: too few GPUs, or CUDA is running already.
    """
    import torch

    if torch.version.cuda is None:
        return
    changes = own_gpu(os.environ, script_args, torch.cuda.device_count)
    if not changes:
        return
    local_rank = os.environ['LOCAL_RANK']
    os.environ.update(changes)
    if torch.cuda.device_count() != 1:
        raise CommandError(
            f'CUDA was running before GPU {changes["CUDA_VISIBLE_DEVICES"]} could be chosen for '
            f'LOCAL_RANK={local_rank}: torch cannot count the GPUs through NVML here. Start each process with '
            f'CUDA_VISIBLE_DEVICES naming its own GPU and LOCAL_RANK=0'
        )
    _logger.info('LOCAL_RANK %s uses GPU %s only', local_rank, changes['CUDA_VISIBLE_DEVICES'])


def tell_children() -> None:
    """Have Python processes that bulk_runner.py starts know the models, see `stand_in`."""
    if 'PYTHON_EXEC' in os.environ:
        return
    schemes = sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme('user')
    directories = [sysconfig.get_path('scripts', scheme) for scheme in schemes]
    command = shutil.which('timm-shiftwise', path=os.pathsep.join(directories))
    if command is None:
        _logger.warning(
            'The command timm-shiftwise is not in %s: processes that the script starts will not know the models. '
            'Install the package with pip.', ' or '.join(directories))
    else:
        os.environ['PYTHON_EXEC'] = command


def _prepare(script_args: Sequence[str]) -> None:
    take_own_gpu(script_args)
    tell_children()


def _set_script_directory(directory: str) -> None:
    """Put what the interpreter would put first on sys.path in the place of what it put there for the launcher."""
    if not getattr(sys.flags, 'safe_path', False):  # python -P, since Python 3.11, puts nothing there
        sys.path[0] = directory


def _run_file(name: str, script_args: Sequence[str]) -> None:
    """Execute a script as `__main__`.

    `runpy.run_path` does nearly this, but `__file__` stays relative where the interpreter makes it absolute, and the
    launcher becomes `__main__` again at the script's last line, while its threads and exit handlers still run.
    """
    script = find_script(name)
    _prepare(script_args)
    file = os.path.join(os.getcwd(), script)
    with io.open_code(file) as stream:
        code = compile(stream.read(), file, 'exec')
    module = types.ModuleType('__main__')
    vars(module).update(__file__=file, __builtins__=builtins)
    sys.argv = [script, *script_args]
    _set_script_directory(str(Path(file).resolve().parent))
    sys.modules['__main__'] = module
    exec(code, vars(module))

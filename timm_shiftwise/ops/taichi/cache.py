"""Taichi's cache of compiled kernels, in a folder of our own that is proven before Taichi reads it.

Taichi reads its cache unchecked, and one wrong byte can kill the process. It writes when a program ends: a process
killed meanwhile leaves half-written files, and a lock file at which Taichi gives up its cache ever after. So whoever
reads or writes here holds a lock that dies with its owner, and notes the checksums of what Taichi has written.
"""
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from filelock import FileLock

_KERNELS, _CHECKSUMS = 'kernels', 'checksums.json'
_PATIENCE = 30  # seconds; each process holds the lock for a fraction of one


def cache_folder(ti: Any) -> Path:
    """Where the cache lies: beside Taichi's own in the user's cache directory, one for each Taichi and processor."""
    processor = hashlib.sha256(_processor().encode()).hexdigest()[:12]
    version = '.'.join(map(str, ti.__version__))
    own = Path(ti.lang.impl.default_cfg().offline_cache_file_path)
    return own.parent / 'timm_shiftwise' / f'taichi-{version}-{processor}'


def _processor() -> str:
    """What machines that share a home directory may differ in, so that one cannot run what another has compiled."""
    try:
        with open('/proc/cpuinfo') as file:
            lines = list(takewhile(str.strip, file))  # of the first core
    except OSError:
        return platform.processor()
    return ''.join(line for line in lines if line.startswith(('model', 'cpu family', 'flags', 'CPU ', 'Features')))


@contextmanager
def proven_cache(folder: Path) -> Iterator[Path]:
    """Hold a cache for as long as Taichi reads its index or writes, with nothing in it but what Taichi has finished.

    Args:
        folder: The cache, see :func:`cache_folder`; it is made if it is not there.

    Yields:
        Taichi's part of it; empty if it was not as noted.

    Raises:
        OSError: If it cannot be written, or others hold it for too long.
        NotImplementedError: If the file system has no locks.
    """
    kernels, noted = folder / _KERNELS, folder / _CHECKSUMS
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / 'lock', timeout=_PATIENCE):
        kernels.mkdir(exist_ok=True)
        (kernels / 'ticache.lock').unlink(missing_ok=True)  # its owner held our lock, and is gone
        if _checksums(kernels) != _read(noted):
            shutil.rmtree(kernels)
            kernels.mkdir()
        yield kernels
        beside = folder / f'{_CHECKSUMS}.new'
        beside.write_text(json.dumps(_checksums(kernels)))
        os.replace(beside, noted)


def _checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None

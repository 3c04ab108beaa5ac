"""Letting timm know this package in one Python environment, without an import in every program.

A `.pth` file in site-packages is read at every start of the interpreter. Ours imports a small module beside it, which
waits until timm is imported and then imports this package. Both files stand in the RECORD of the installed package, so
that uninstalling it removes them.
"""
import base64
import csv
import hashlib
import io
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path

from timm_shiftwise.ops.files import replacing

DISTRIBUTION = 'timm-shiftwise'
HOOK = '_timm_shiftwise_hook.py'
START = 'timm_shiftwise.pth'

# a line of a .pth file that begins with "import" is executed; a failure must not touch the interpreter's start
_START_LINE = 'import sys; exec("try:\\n    import _timm_shiftwise_hook\\nexcept Exception:\\n    pass")\n'


class SiteError(RuntimeError):
    """The environment cannot be changed; the message says why."""


def enable() -> Path:
    """Let timm know this package's models wherever timm is imported in this environment.

    Returns:
        The folder of the environment, its site-packages.

    Raises:
        SiteError: If the package is not installed there, or the folder cannot be written.
    """
    installed = _installed()
    folder = _folder(installed)
    hook = (files(__package__) / HOOK).read_bytes()
    with _explained(folder):
        # the .pth last: without the module that it imports it would do nothing
        for name, content in ((HOOK, hook), (START, _START_LINE.encode())):
            with replacing(folder / name) as partial:
                partial.write_bytes(content)
        _record(installed, {HOOK: hook, START: _START_LINE.encode()})
    return folder


def disable() -> bool:
    """Undo :func:`enable`.

    Returns:
        Whether there was something to undo.

    Raises:
        SiteError: If the package is not installed, or the folder cannot be written.
    """
    installed = _installed()
    folder = _folder(installed)
    was = is_enabled()
    with _explained(folder):
        for name in (START, HOOK):
            (folder / name).unlink(missing_ok=True)
        _record(installed, {})
    return was


def is_enabled() -> bool:
    """Whether timm knows the package in this environment; False where it is not installed."""
    try:
        folder = _folder(_installed())
    except SiteError:
        return False
    return all((folder / name).is_file() for name in (START, HOOK))


def _installed() -> Distribution:
    try:
        return distribution(DISTRIBUTION)
    except PackageNotFoundError as error:
        raise SiteError(
            f'{DISTRIBUTION} is not installed in this environment: pip install it first, from a clone or a wheel.'
        ) from error


def _folder(installed: Distribution) -> Path:
    folder = Path(str(installed.locate_file(''))).resolve()
    if installed.read_text('RECORD') is None:
        raise SiteError(
            f'{folder} holds {DISTRIBUTION} without a RECORD, as a source folder does: pip install it first.')
    return folder


class _explained:
    """Turn a failure to write into an error that says where."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            raise SiteError(f'{self._folder} cannot be changed: {error.strerror or error}.') from error


def _record(installed: Distribution, held: dict[str, bytes]) -> None:
    """Let the RECORD of the installed package list exactly these of our files."""
    text = installed.read_text('RECORD') or ''
    rows = [row for row in csv.reader(io.StringIO(text)) if row and row[0] not in (HOOK, START)]
    for name, content in held.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b'=').decode()
        rows.append([name, f'sha256={digest}', str(len(content))])
    out = io.StringIO()
    csv.writer(out, lineterminator='\n').writerows(rows)
    own = next(file for file in installed.files or [] if file.name == 'RECORD')
    with replacing(str(installed.locate_file(own))) as partial:
        partial.write_text(out.getvalue(), encoding='utf-8', newline='')

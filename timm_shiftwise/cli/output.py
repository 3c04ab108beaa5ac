"""Files that sub-commands write."""
import os
from pathlib import Path

from . import CommandError


def check_picture(output: str) -> None:
    """Refuse what cannot be drawn before work begins.

    Raises:
        CommandError: The file is no PNG, or matplotlib is missing.
    """
    if not output.lower().endswith('.png'):
        raise CommandError(f'--output takes a file that ends in .png, got {output!r}')
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CommandError(f'drawing needs matplotlib (pip install matplotlib): {error}') from error


def write_beside(output: str | Path, content: bytes) -> None:
    """Write a file beside its place and rename it when it is whole; one that is there is replaced.

    Raises:
        CommandError: It cannot be written.
    """
    path = Path(output)
    partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise CommandError(f'{output} was not written: {error.strerror or error}') from error
    finally:
        partial.unlink(missing_ok=True)

"""What sub-commands write: pictures, pages of pictures, reports."""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import CommandError


def check_picture(output: str, ending: str = '.png') -> None:
    """Refuse what cannot be drawn before work begins.

    Raises:
        CommandError: The file's name has another ending, or matplotlib is missing.
    """
    if not output.lower().endswith(ending):
        raise CommandError(f'--output takes a file that ends in {ending}, got {output!r}')
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CommandError(f'drawing needs matplotlib (pip install matplotlib): {error}') from error


@contextmanager
def writing(output: str | Path) -> Iterator[None]:
    """Around what writes a file.

    Raises:
        CommandError: The file could not be written; the message says why.
    """
    try:
        yield
    except OSError as error:
        raise CommandError(f'{output} was not written: {error.strerror or error}') from error

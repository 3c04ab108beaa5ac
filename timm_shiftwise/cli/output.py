"""Pictures that sub-commands draw, and pages of pictures."""
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

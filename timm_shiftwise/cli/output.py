"""Pictures that sub-commands draw."""
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

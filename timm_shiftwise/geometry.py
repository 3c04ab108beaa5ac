"""Where the small convolutions of a shift-wise operator sit: groups, shifts and crops.

Source: Shift-ConvNets (arXiv 2401.12736), Section 3.1, Eq. 1-3. A large depthwise kernel of size N x M (rows x columns)
is cut into G = ceil(M / N) square pieces. Piece ``g`` runs as a small N x N convolution over the image padded by ``p``
on every side, and its output, the *map* ``y_g``, is read at a shifted place:

    out[h, w] = sum_g y_g[h + E, w - s_g],   E = p - N // 2,   s_g = M // 2 - g * N - p

with zero where the index falls outside of ``y_g``. The padding policy ``'full'`` (p = N - 1) keeps every window that
touches the image, so the sum equals the large kernel exactly; ``'same'`` (p = N // 2) drops the windows whose centre
lies outside.

Everything here is arithmetic on Python integers, written so that TorchScript can compile it too.
"""


def check_geometry(focus_length: int, kernel_size: int, padding: str) -> None:
    """Refuse what is no geometry.

    Args:
        focus_length: M, the long side of the large kernel in pixels.
        kernel_size: N, the short side of the large kernel and the side of the small ones, in pixels.
        padding: Padding policy of the small convolutions, ``'full'`` or ``'same'``.

    Raises:
        ValueError: If M or N is not an integer of at least 1, or the policy is unknown.
    """
    for name, value in (('focus_length', focus_length), ('kernel_size', kernel_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f'{name} must be an integer of at least 1, got {value!r}.')
    if padding not in ('full', 'same'):
        raise ValueError(f"padding must be 'full' or 'same', got {padding!r}.")


def num_groups(focus_length: int, kernel_size: int) -> int:
    """Number of small kernels that cover the focus length, G = ceil(M / N)."""
    return (focus_length + kernel_size - 1) // kernel_size


def small_padding(kernel_size: int, padding: str) -> int:
    """Padding p of the small convolutions on every side: N - 1 for ``'full'``, N // 2 for ``'same'``."""
    return kernel_size - 1 if padding == 'full' else kernel_size // 2


def crop(kernel_size: int, padding: str) -> int:
    """Row and column E of a map at which the image's own position 0 is read, E = p - N // 2."""
    return small_padding(kernel_size, padding) - kernel_size // 2


def shift(place: int, focus_length: int, kernel_size: int, padding: str) -> int:
    """Shift s of the map that sits at a place along the focus length, s = M // 2 - place * N - p, in pixels."""
    return focus_length // 2 - place * kernel_size - small_padding(kernel_size, padding)


def map_size(size: int, kernel_size: int, padding: str) -> int:
    """Side of the map that a small convolution makes of an image of the given side."""
    return size + 2 * small_padding(kernel_size, padding) - kernel_size + 1


def image_size(size: int, kernel_size: int, padding: str) -> int:
    """Side of the image that a map of the given side was made of; the inverse of :func:`map_size`."""
    return size - 2 * small_padding(kernel_size, padding) + kernel_size - 1


def margin(focus_length: int, kernel_size: int, padding: str) -> int:
    """Zeros to put on both ends of a map so that every shifted read of every place falls inside.

    Reads start at ``-s`` and end at ``image_size - s``; s is largest at place 0 and smallest at place G - 1.
    """
    first = shift(0, focus_length, kernel_size, padding)
    last = shift(num_groups(focus_length, kernel_size) - 1, focus_length, kernel_size, padding)
    return max(max(first, -last), 0)

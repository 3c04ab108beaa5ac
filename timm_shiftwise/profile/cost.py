"""What depthwise operators cost: the paper's arithmetic, on plain integers.

Source: Shift-ConvNets (arXiv 2401.12736), Eq. 4-8. Per channel, SLaK holds an N x M and an M x N kernel, 2 * M * N
parameters (its N x N kernel lies within the tall one once they are merged); a shift-wise operator holds its kept small
kernels of N * N, at most G = ceil(M / N) where its branches share them.
"""
from dataclasses import dataclass

from timm_shiftwise.geometry import check_geometry, map_size, num_groups


@dataclass(frozen=True)
class Cost:
    """What a network, or a part of it, holds and does for one image.

    Attributes:
        parameters: Weights it holds, to be trained or as it was merged: all paths, pruned groups, norms.
        kept_parameters: The same with the paths summed and without the pruned groups; of SLaK's three kernels, without
            the square one, which lies within the tall one.
        multiply_adds: Those of convolutions and linear layers, of kept groups only.
        additions: Those by which shifted maps are added up.
    """
    parameters: int = 0
    kept_parameters: int = 0
    multiply_adds: int = 0
    additions: int = 0

    def __add__(self, other: 'Cost') -> 'Cost':
        return Cost(
            self.parameters + other.parameters,
            self.kept_parameters + other.kept_parameters,
            self.multiply_adds + other.multiply_adds,
            self.additions + other.additions,
        )


@dataclass(frozen=True)
class Comparison:
    """A cost beside that of SLaK's operator in the same place.

    Attributes:
        ours: Cost of the network as it is.
        slak: Cost of the same network with SLaK's large kernels of the same M and N as its operators.
    """
    ours: Cost = Cost()
    slak: Cost = Cost()

    def __add__(self, other: 'Comparison') -> 'Comparison':
        return Comparison(self.ours + other.ours, self.slak + other.slak)

    @property
    def parameter_ratio(self) -> float:
        """How many times SLaK's kept parameters are ours; infinite where we have none."""
        return _ratio(self.slak.kept_parameters, self.ours.kept_parameters)

    @property
    def multiply_add_ratio(self) -> float:
        """How many times SLaK's multiply-adds are ours; infinite where we have none."""
        return _ratio(self.slak.multiply_adds, self.ours.multiply_adds)


def kernel_ratio(focus_length: int, kernel_size: int, maps: int | None = None) -> float:
    """Depthwise parameters of SLaK to those of a shift-wise operator, per channel: 2 * M * N / (K * N * N).

    Args:
        focus_length: M in pixels.
        kernel_size: N in pixels.
        maps: K, small kernels of a channel; None for G, that is branches that share theirs, none pruned.

    Returns:
        The ratio; for N = 5 and M = 51, 49, 45, 13, 5 it is 1.85, 1.96, 2.0, 1.73, 2.0, the paper's list.

    Raises:
        ValueError: If an argument is out of its range.
    """
    check_geometry(focus_length, kernel_size, 'full')
    if maps is None:
        maps = num_groups(focus_length, kernel_size)
    if maps < 1:
        raise ValueError(f'maps must be at least 1, got {maps}.')
    return 2 * focus_length / (maps * kernel_size)


def large_kernels(
        channels: int, focus_length: int, kernel_size: int, height: int, width: int, *, merged: bool = False) -> Cost:
    """SLaK's depthwise kernels: M x N, N x M, and N x N unless merged.

    Args:
        channels: C.
        focus_length: M in pixels.
        kernel_size: N in pixels.
        height: H of the map.
        width: W of the map.
        merged: Whether the square kernel was added to the tall one.
    """
    pair = channels * 2 * focus_length * kernel_size
    held = pair if merged else pair + channels * kernel_size * kernel_size
    return Cost(held, pair, held * height * width)


def small_kernels(
        channels: int, maps: int, kept: int, focus_length: int, kernel_size: int, height: int, width: int, *,
        paths: int = 1, shuffles: int = 1, padding: str = 'full') -> Cost:
    """A shift-wise operator's small kernels, and the additions of their shifted maps.

    Paths are summed before the convolution, so they cost parameters alone. The additions per channel and output pixel
    are 2 * R * G * d + R.

    Args:
        channels: C, those worked on.
        maps: K, small kernels of a channel.
        kept: Kept small kernels of all channels together, at most C * K.
        focus_length: M in pixels.
        kernel_size: N in pixels.
        height: H of the map.
        width: W of the map.
        paths: P.
        shuffles: R.
        padding: Padding policy of the small convolutions, ``'full'`` or ``'same'``.
    """
    area = kernel_size * kernel_size
    made = map_size(height, kernel_size, padding) * map_size(width, kernel_size, padding)
    groups = num_groups(focus_length, kernel_size)
    added = shuffles * (2 * groups * kept / maps + channels)  # a pixel, over all channels
    return Cost(paths * channels * maps * area, kept * area, kept * area * made, round(added * height * width))


def merged_kernels(weights: int, height: int, width: int) -> Cost:
    """A shift-wise operator merged for inference: a tall and a wide kernel, pruned groups zeros within them.

    Args:
        weights: Weights of both of all channels together.
        height: H of the map.
        width: W of the map.
    """
    return Cost(weights, weights, weights * height * width)


def _ratio(slak: int, ours: int) -> float:
    return slak / ours if ours else float('inf')

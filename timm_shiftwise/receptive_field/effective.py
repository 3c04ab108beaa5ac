"""The effective receptive field of any convolutional network, measured as RepLKNet defined it.

Source: RepLKNet (arXiv 2203.06717), Appendix on the effective receptive field, after Luo et al. (arXiv 1701.04128).
"""
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor, nn

from timm_shiftwise.models import ShiftwiseNet
from timm_shiftwise.models.calibration import evaluating

from .reach import exact_reach, pools_over_the_map

SHARES = (0.2, 0.3, 0.5, 0.99)
"""Shares of the scores whose squares are told unless others are asked for: those of RepLKNet's table."""

_ACTING = 1e-4  # layer scale from which a block changes what it gets by more than rounding


class Square(NamedTuple):
    """The smallest square around the middle of the image that holds a share of the scores.

    Attributes:
        share: That share.
        side: Its side in pixels.
        area: Its share of the image's area.
    """
    share: float
    side: int
    area: float


@dataclass(frozen=True)
class ReceptiveField:
    """How much every pixel of an image matters to the middle of a feature map.

    Attributes:
        model: What the network is called.
        scores: Contribution of every pixel, mean over images: float64 [H, W].
        map_size: Height and width of the feature map.
        stage: Which of the network's feature maps it is, from 1; None for the only one that it has.
        images: Number of images.
        seen: What they were, for people: noise, or a folder.
        weights: Where the weights are from, for people: untrained networks rank differently from trained ones.
        reach: Pixels that the kept groups let through at all, bool [H, W]; None of other networks.
        sees_all: Whether layers that pool over the whole map let every pixel through besides.
        versions: Versions of what measured it.
    """
    model: str
    scores: np.ndarray
    map_size: tuple[int, int]
    stage: int | None
    images: int
    seen: str
    weights: str
    reach: np.ndarray | None = None
    sees_all: bool = False
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def log_scores(self) -> np.ndarray:
        """What is drawn and whose shares are told: ``log10(scores + 1)``, scaled to a maximum of 1."""
        scores = np.log10(self.scores + 1)
        return scores / scores.max()

    def squares(self, shares: Sequence[float] = SHARES) -> list[Square]:
        """The smallest squares around the middle that hold given shares of :attr:`log_scores`.

        Args:
            shares: Shares above 0 and up to 1.

        Raises:
            ValueError: If a share is out of its range.
        """
        if any(not 0 < share <= 1 for share in shares):
            raise ValueError(f'shares must be above 0 and at most 1, got {tuple(shares)!r}.')
        scores = self.log_scores
        height, width = scores.shape
        summed = np.pad(scores.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        margins = np.arange(max(height, width) // 2 + 1)  # pixels from the middle one to the square's edge
        top, left = np.maximum(height // 2 - margins, 0), np.maximum(width // 2 - margins, 0)
        bottom, right = np.minimum(height // 2 + margins + 1, height), np.minimum(width // 2 + margins + 1, width)
        held = summed[bottom, right] - summed[top, right] - summed[bottom, left] + summed[top, left]
        areas = (bottom - top) * (right - left) / (height * width)
        sides = np.maximum(bottom - top, right - left)
        # the whole image is the last: rounding must not leave a share of 1 without a square
        at = np.minimum(np.searchsorted(held / held[-1], shares), len(margins) - 1)
        return [Square(share, int(sides[i]), float(areas[i])) for share, i in zip(shares, at, strict=True)]

    def to_dict(self, shares: Sequence[float] = SHARES) -> dict[str, Any]:
        """Plain names and values, without the scores of single pixels."""
        names = ('model', 'stage', 'images', 'seen', 'weights', 'sees_all', 'versions')
        return {
            **{name: getattr(self, name) for name in names},
            'input_size': list(self.scores.shape), 'map_size': list(self.map_size),
            'squares': [square._asdict() for square in self.squares(shares)],
            'reach': None if self.reach is None else dict(zip(('height', 'width'), extent(self.reach), strict=True)),
        }


def extent(pixels: np.ndarray) -> tuple[int, int]:
    """Height and width of the rectangle around the pixels that are set, of bool [H, W]."""
    rows, columns = pixels.any(1).nonzero()[0], pixels.any(0).nonzero()[0]
    return int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)


def erf(
        model: str | nn.Module, images: Iterable[Tensor] | None = None, *, size: int | tuple[int, int] | None = None,
        stage: int | None = None, samples: int = 50, pretrained: bool = False, device: str | torch.device = 'cpu',
        seed: int = 0, name: str | None = None, weights: str | None = None, seen: str | None = None,
        progress: Callable[[], object] | None = None) -> ReceptiveField:
    """Measure the effective receptive field of a network.

    The score of a pixel is the gradient of the middle of a feature map by that pixel: the values of the middle's
    channels that are above zero are summed, and of the gradient what is above zero, over the colours of the pixel; the
    mean over images is taken. Source: RepLKNet (arXiv 2203.06717).

    Args:
        model: Any network with a feature map, or its name in timm's registry. It is left as it was.
        images: Images [3, H, W] or batches [B, 3, H, W], normalised as the network expects them; None for Gaussian
            noise, which tells less about a trained network.
        size: Side of the noise in pixels, or its height and width; None for what the network was made for.
        stage: Which feature map, from 1, as ``forward_intermediates`` of timm's models counts them (a ResNet's stem is
            one); None for the last.
        samples: Images of noise, or how many of ``images`` are taken at most.
        pretrained: Whether a network that is named gets its published weights.
        device: Where to run.
        seed: Seed of the noise.
        name: What the network is called in the result; None for its class or its name.
        weights: Where the weights are from, for people; None for what can be known.
        seen: What the images are, for people; None for what can be known.
        progress: Called after every image.

    Returns:
        The scores, and what they are of.

    Raises:
        ValueError: If an argument is out of its range, or the network has no feature map that depends on the image.
        TypeError: If the images are no floating point tensors.
    """
    if samples < 1:
        raise ValueError(f'samples must be at least 1, got {samples}.')
    if isinstance(model, str):
        name, weights = name or model, weights or ('published' if pretrained else 'random')
        model = timm.create_model(model, pretrained=pretrained, **size_arguments(model, size))
    named = name or type(model).__name__
    shown = seen or ('Gaussian noise' if images is None else 'images')
    source = _noise(_shape_of(model, size), samples, seed) if images is None else _single(images)
    scores, count, map_size = None, 0, (0, 0)
    with evaluating(model), _on(model, torch.device(device)):
        for image in source:
            gradient, map_size = _gradient(model, image.to(device), stage)
            scores = gradient if scores is None else scores + _same_size(gradient, scores)
            count += 1
            if progress is not None:
                progress()
            if count == samples:
                break
    if scores is None:
        raise ValueError('images must hold at least one image, got none.')
    if not np.isfinite(scores).all() or not scores.any():
        raise ValueError(f'The middle of the feature map of {named} does not depend on the image, or is not finite.')
    versions = {package.__name__: package.__version__ for package in (torch, timm, np)}
    reach = None
    if isinstance(model, ShiftwiseNet):
        reach = exact_reach(model, int(scores.shape[0]), int(scores.shape[1]), stage)
    return ReceptiveField(
        named, scores / count, map_size, stage, count, shown, describe_weights(weights or 'as given', model),
        reach, pools_over_the_map(model),
        {'python': platform.python_version(), **versions})


def layer_scales(model: nn.Module) -> list[nn.Parameter]:
    """The layer scales of a network's blocks, by the names that timm's models and ours give them."""
    return [value for name, value in model.named_parameters() if name.rsplit('.', 1)[-1] in ('gamma', 'layer_scale')]


def describe_weights(weights: str, model: nn.Module) -> str:
    """Where weights are from, and whether the blocks of an untrained network hardly act."""
    largest = max((float(scale.detach().abs().max()) for scale in layer_scales(model)), default=1.)
    return weights if largest > _ACTING else f'{weights}, layer scale {largest:.0e}: blocks hardly act'


def size_arguments(model: str, size: int | tuple[int, int] | None) -> dict[str, Any]:
    """What makes timm build a network for another size, where its positions have one size only."""
    fixed = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    return dict(img_size=size) if size is not None and fixed is not None and fixed.fixed_input_size else {}


def _shape_of(model: nn.Module, size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    if size is None:
        size = tuple((getattr(model, 'pretrained_cfg', None) or {}).get('input_size', (3, 224, 224))[1:])
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f'size must be one or two numbers of at least 1, got {size!r}.')
    return getattr(model, 'in_chans', 3), height, width


def _noise(shape: tuple[int, int, int], samples: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples):
        yield torch.randn(1, *shape, generator=generator)


def _single(images: Iterable[Tensor]) -> Iterator[Tensor]:
    for image in images:
        if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim not in (3, 4):
            found = f'{image.dtype} {tuple(image.shape)}' if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f'images must be floating point [3, H, W] or [B, 3, H, W], got {found}.')
        yield from (image[None] if image.ndim == 3 else image).split(1)


@contextmanager
def _on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """On a device, and back to where it was."""
    first = next(model.parameters(), None)
    try:
        model.to(device)
        yield
    finally:
        if first is not None:
            model.to(first.device)


def _gradient(model: nn.Module, image: Tensor, stage: int | None) -> tuple[np.ndarray, tuple[int, int]]:
    """Scores [H, W] of one image [1, 3, H, W], and the size of the feature map."""
    weight = next(model.parameters(), image)
    image = image.detach().to(weight.dtype).requires_grad_()
    with torch.enable_grad():
        features = _feature_map(model, image, stage)
        if features.ndim != 4:
            raise ValueError(
                f'The network must hand out a feature map [B, D, H, W], {type(model).__name__} hands out '
                f'{tuple(features.shape)}.')
        height, width = features.shape[2:]
        middle = features[:, :, height // 2, width // 2].relu().sum()
        gradient, = torch.autograd.grad(middle, image, allow_unused=True)
    if gradient is None:
        raise ValueError(f'The feature map of {type(model).__name__} does not depend on the image.')
    return gradient.relu().sum((0, 1)).double().cpu().numpy(), (height, width)


def _feature_map(model: nn.Module, image: Tensor, stage: int | None) -> Tensor:
    forward_intermediates = getattr(model, 'forward_intermediates', None)
    if forward_intermediates is not None:
        maps = forward_intermediates(image, output_fmt='NCHW', intermediates_only=True)
        if stage is not None and not 1 <= stage <= len(maps):
            raise ValueError(f'stage must be 1 to {len(maps)}, the feature maps of the network, got {stage}.')
        return maps[-1 if stage is None else stage - 1]
    if stage is not None:
        raise ValueError(f'{type(model).__name__} has no forward_intermediates: its stages cannot be told apart.')
    return getattr(model, 'forward_features', model)(image)


def _same_size(gradient: np.ndarray, scores: np.ndarray) -> np.ndarray:
    if gradient.shape != scores.shape:
        raise ValueError(f'images must be of one size, got {gradient.shape} after {scores.shape}.')
    return gradient

"""What a network costs, stage by stage, beside the same network with SLaK's large kernels.

Source: Shift-ConvNets (arXiv 2401.12736), Tables 2 and 4, Eq. 4-8.
"""
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from torch import nn

from timm_shiftwise.geometry import num_groups
from timm_shiftwise.layers import MergedConv2d, MergedShiftConv2d
from timm_shiftwise.models import ShiftwiseNet

from .cost import Comparison, Cost, kernel_ratio
from .kept import Counted, Parts, check_network, stage_blocks
from .operators import block_operator, operator_cost, operator_shape
from .ways import Way, way_of


@dataclass(frozen=True)
class StageProfile(Counted):
    """Cost of one stage for one image.

    Attributes:
        stage: Number of the stage, from 1.
        blocks: Number of its blocks.
        dim: Channels, ghosts among them.
        channels: Channels that the operators work on.
        focus_length: M in pixels.
        groups: G.
        height: H of the stage's map.
        width: W of the stage's map.
        kept: Kept small kernels of all blocks together; 0 for large kernels.
        total: Small kernels, kept and pruned.
        path_kept: Small kernels that each path keeps, where that is known.
        kernel_ratio: Depthwise parameters of SLaK to ours, per channel that is worked on, no group pruned.
        depthwise: The operators' kernels alone.
        whole: The whole stage, with the downsampling before it.
        way: How the first operator is computed, and why so.
    """
    stage: int
    blocks: int
    dim: int
    channels: int
    focus_length: int
    groups: int
    height: int
    width: int
    kept: int
    total: int
    path_kept: tuple[int, ...]
    kernel_ratio: float
    depthwise: Comparison
    whole: Comparison
    way: Way


@dataclass(frozen=True)
class NetworkProfile(Parts):
    """Cost of a network for one image.

    Attributes:
        model: What the network was called.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        kernel_size: N in pixels.
        merged: Whether the network is reparameterized; SLaK's operators are then merged, too.
        sparsity: Where the share of pruned groups is from: ``'measured'``, ``'given'``, or ``'none'`` for large
            kernels.
        stem: Cost of the stem.
        stages: Cost of each stage.
        head: Cost of the head.
    """
    model: str
    height: int
    width: int
    kernel_size: int
    merged: bool
    sparsity: str
    stem: Comparison
    stages: tuple[StageProfile, ...]
    head: Comparison

    @property
    def parts(self) -> tuple[StageProfile, ...]:
        """Its stages."""
        return self.stages

    @property
    def depthwise(self) -> Comparison:
        """The operators' kernels of all stages."""
        return sum((stage.depthwise for stage in self.stages), Comparison())

    @property
    def whole(self) -> Comparison:
        """The whole network; ``whole.ours.parameters`` is the number of its weights."""
        return sum((stage.whole for stage in self.stages), self.stem + self.head)

    def to_dict(self) -> dict[str, Any]:
        """Plain names and values: what is counted, and the ratios."""
        names = ('model', 'kernel_size', 'merged', 'sparsity', 'kept', 'total', 'density', 'path_densities')
        costs = ('stem', 'head', 'depthwise', 'whole')
        return {
            **{name: getattr(self, name) for name in names}, 'input_size': [self.height, self.width],
            **{name: _plain(getattr(self, name)) for name in costs},
            'stages': [_plain_stage(stage) for stage in self.stages],
        }


def profile_model(
        model: str | nn.Module, *, sparsity: float | Sequence[float] | None = None,
        img_size: int | Sequence[int] | None = None, device: str | torch.device = 'cpu') -> NetworkProfile:
    """Count what a network of this package costs for one image, and what it would with SLaK's large kernels.

    Nothing is computed: the network may lie on the ``meta`` device, where all its groups count as kept.

    Args:
        model: A network, merged or not, or its name in timm's registry.
        sparsity: Share of the groups that is pruned in every layer, 0 up to, not including, 1, or such a share for each
            stage; every layer keeps at least one group. None counts the groups that the network keeps.
        img_size: Side of the image, or height and width, in pixels; None for what the network was made for.
        device: Where it will run, which decides how operators are computed.

    Raises:
        TypeError: If the model is no network of this package.
        ValueError: If the sparsity or the image size is out of its range.
    """
    if isinstance(model, str):
        network, name = check_network(timm.create_model(model, device='meta')), model
    else:
        network = check_network(model)
        name = str(_pretrained_cfg(network).get('architecture') or type(network).__name__)
    height, width = image_size(network, img_size)
    stages = stage_blocks(network)
    shares = _share_per_stage(sparsity, stages)

    stem, size = _resampling(network.stem, (height, width))
    profiles = []
    for i, (stage, blocks, share) in enumerate(zip(network.stages.children(), stages, shares, strict=True)):
        downsample, size = _resampling(stage.get_submodule('downsample'), size)
        if min(size) < 1:
            raise ValueError(
                f'img_size must leave a map of at least 1 x 1 in every stage, {height} x {width} leaves '
                f'{size[0]} x {size[1]} in stage {i + 1}.')
        profiles.append(_profile_stage(i + 1, blocks, downsample, size, share, torch.device(device)))
    first = block_operator(stages[0][0])
    has_groups = any(profile.total for profile in profiles)
    return NetworkProfile(
        model=name,
        height=height,
        width=width,
        kernel_size=operator_shape(first).kernel_size,
        merged=isinstance(first, (MergedConv2d, MergedShiftConv2d)),
        sparsity=('measured' if sparsity is None else 'given') if has_groups else 'none',
        stem=_both(stem),
        stages=tuple(profiles),
        head=_both(_dense_layers(network.head, pixels=1)),
    )


def image_size(network: ShiftwiseNet, img_size: int | Sequence[int] | None) -> tuple[int, int]:
    """Height and width of the image: those given, else those that the network was made for.

    Raises:
        ValueError: If a side is no integer of at least 1, or there are not one or two.
    """
    if img_size is None:
        _, height, width = _pretrained_cfg(network).get('input_size') or (3, 224, 224)
        return int(height), int(width)
    sides = (img_size,) if isinstance(img_size, int) else tuple(img_size)
    integers = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    if len(sides) not in (1, 2) or not integers:
        raise ValueError(f'img_size must be one or two integers of at least 1, got {img_size!r}.')
    return sides[0], sides[-1]


def _pretrained_cfg(network: ShiftwiseNet) -> dict[str, Any]:
    cfg = getattr(network, 'pretrained_cfg', None)
    return cfg if isinstance(cfg, dict) else {}  # a network that timm did not build has none


def _share_per_stage(sparsity: float | Sequence[float] | None, stages: list[list[nn.Module]]) -> list[float | None]:
    if sparsity is None:
        return [None] * len(stages)
    shares: list[float | None] = list(sparsity) if isinstance(sparsity, Sequence) else [sparsity]
    for share in shares:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise ValueError(f'sparsity must be at least 0 and below 1, got {share!r}.')
    if len(shares) not in (1, len(stages)):
        raise ValueError(f'sparsity must be one share or {len(stages)}, one for each stage, got {len(shares)}.')
    if operator_shape(block_operator(stages[0][0])).maps == 0 and any(shares):
        raise ValueError('sparsity is for small kernels: a network of large kernels (SLaK) has no groups to prune.')
    return [*shares] * (len(stages) if len(shares) == 1 else 1)


def _profile_stage(
        number: int, blocks: list[nn.Module], downsample: Cost, size: tuple[int, int], sparsity: float | None,
        device: torch.device) -> StageProfile:
    first = block_operator(blocks[0])
    shape = operator_shape(first)
    costs = [operator_cost(block_operator(block), *size, sparsity) for block in blocks]
    depthwise = sum((cost.kernels for cost in costs), Comparison())
    beside = sum((_beside_operator(block, size) for block in blocks), downsample)
    return StageProfile(
        stage=number,
        blocks=len(blocks),
        dim=shape.dim,
        channels=shape.channels,
        focus_length=shape.focus_length,
        groups=num_groups(shape.focus_length, shape.kernel_size),
        height=size[0],
        width=size[1],
        kept=sum(cost.kept for cost in costs),
        total=len(blocks) * shape.channels * shape.maps,
        path_kept=tuple(map(sum, zip(*(cost.path_kept for cost in costs), strict=True))),
        kernel_ratio=kernel_ratio(shape.focus_length, shape.kernel_size, shape.maps) if shape.maps else 1.,
        depthwise=depthwise,
        whole=sum((cost.rest for cost in costs), depthwise + _both(beside)),
        way=way_of(first, *size, costs[0].kept, device),
    )


def _beside_operator(block: nn.Module, size: tuple[int, int]) -> Cost:
    """Cost of a block without its operator."""
    own = sum(parameter.numel() for parameter in block.parameters(recurse=False))
    parts = [
        # squeeze-excitation works on the mean of the map
        _dense_layers(part, pixels=1 if name == 'se' else size[0] * size[1])
        for name, part in block.named_children() if name != 'conv_dw'
    ]
    return sum(parts, Cost(own, own))


def _dense_layers(module: nn.Module, pixels: int) -> Cost:
    """Cost of linear layers and 1 x 1 convolutions on a number of pixels, and of norms."""
    weights = sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Cost(parameters, parameters, weights * pixels)


def _resampling(module: nn.Module, size: tuple[int, int]) -> tuple[Cost, tuple[int, int]]:
    """Cost of the convolutions of a stem or a downsampling, one after the other, and the size of map they make."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    multiply_adds = 0
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            size = _convolved(layer, 0, size[0]), _convolved(layer, 1, size[1])
            multiply_adds += layer.weight.numel() * size[0] * size[1]
    return Cost(parameters, parameters, multiply_adds), size


def _convolved(layer: nn.Conv2d, axis: int, side: int) -> int:
    return (side + 2 * int(layer.padding[axis]) - layer.kernel_size[axis]) // layer.stride[axis] + 1


def _both(cost: Cost) -> Comparison:
    return Comparison(cost, cost)


def _plain(comparison: Comparison) -> dict[str, Any]:
    return {
        'ours': asdict(comparison.ours),
        'slak': asdict(comparison.slak),
        'parameter_ratio': _finite(comparison.parameter_ratio),
        'multiply_add_ratio': _finite(comparison.multiply_add_ratio),
    }


def _finite(ratio: float) -> float | None:
    return ratio if math.isfinite(ratio) else None  # JSON has no infinity


def _plain_stage(stage: StageProfile) -> dict[str, Any]:
    names = (
        'stage', 'blocks', 'dim', 'channels', 'focus_length', 'groups', 'kept', 'total', 'density', 'path_densities',
        'kernel_ratio')
    return {
        **{name: getattr(stage, name) for name in names}, 'map_size': [stage.height, stage.width],
        'depthwise': _plain(stage.depthwise), 'whole': _plain(stage.whole),
        'way': stage.way.name, 'way_reason': stage.way.reason,
    }

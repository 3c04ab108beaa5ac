"""Which groups a network keeps, layer by layer."""
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn

from timm_shiftwise.geometry import num_groups
from timm_shiftwise.layers import ShiftwiseConv2d
from timm_shiftwise.layers.operator import Operator
from timm_shiftwise.models import ShiftwiseNet
from timm_shiftwise.sparsity import SparsitySchedule


class Counted:
    """Something of whose ``total`` small kernels so many are ``kept`` by any path, and so many by each.

    ``path_kept`` is empty where nothing tells the paths apart, as in a merged network.
    """
    kept: Any
    total: Any
    path_kept: Any

    @property
    def density(self) -> float:
        """Share of the small kernels that is kept; 1 where there are none, as of large kernels."""
        return self.kept / self.total if self.total else 1.

    @property
    def path_densities(self) -> tuple[float, ...]:
        """Share of the small kernels that each path keeps."""
        return tuple(kept / self.total for kept in self.path_kept)

    @property
    def has_paths_apart(self) -> bool:
        """Whether a path keeps fewer small kernels than all of them together."""
        return any(kept < self.kept for kept in self.path_kept)

    @property
    def is_dense(self) -> bool:
        """Whether every small kernel is kept, by every path."""
        return self.kept == self.total and not self.has_paths_apart


class Parts(Counted):
    """Something that keeps what its ``parts`` keep."""
    parts: Any

    @property
    def kept(self) -> int:
        """Kept small kernels."""
        return sum(part.kept for part in self.parts)

    @property
    def total(self) -> int:
        """Small kernels, kept and pruned."""
        return sum(part.total for part in self.parts)

    @property
    def path_kept(self) -> tuple[int, ...]:
        """Small kernels that each path keeps."""
        return tuple(map(sum, zip(*(part.path_kept for part in self.parts), strict=True)))


@dataclass(frozen=True)
class LayerGroups(Counted):
    """Kept groups of one operator.

    Attributes:
        name: Name of the operator in the network, ``stages.0.blocks.0.conv_dw``.
        mask: Which small kernels any path keeps, boolean [C, K], on the CPU.
        path_kept: How many each path keeps.
    """
    name: str
    mask: Tensor
    path_kept: tuple[int, ...]

    @property
    def kept(self) -> int:
        """Kept small kernels."""
        return int(self.mask.sum())

    @property
    def total(self) -> int:
        """Small kernels, kept and pruned."""
        return self.mask.numel()

    @property
    def empty_channels(self) -> int:
        """Channels that lost all their small kernels."""
        return int((~self.mask.any(dim=1)).sum())


@dataclass(frozen=True)
class StageGroups(Parts):
    """Kept groups of one stage.

    Attributes:
        dim: Channels of the stage, ghosts among them.
        focus_length: M in pixels.
        groups: G.
        layers: Its operators.
    """
    dim: int
    focus_length: int
    groups: int
    layers: tuple[LayerGroups, ...]

    @property
    def channels(self) -> int:
        """Channels that are worked on."""
        return self.layers[0].mask.shape[0]

    @property
    def maps(self) -> int:
        """Small kernels of a channel: G, or 2 * G + 1 where the branches have kernels of their own."""
        return self.layers[0].mask.shape[1]

    @property
    def parts(self) -> tuple[LayerGroups, ...]:
        """Its operators."""
        return self.layers


@dataclass(frozen=True)
class NetworkGroups(Parts):
    """Kept groups of a network.

    Attributes:
        stages: Its stages.
        updates: What the schedule that came with the masks does: ``'waiting'`` for the first gradients, ``'running'``,
            ``'fixed'``; ``'none'`` in a merged network, which has no schedule.
        step: Optimiser steps that the schedule has counted.
    """
    stages: tuple[StageGroups, ...]
    updates: str
    step: int

    @property
    def parts(self) -> tuple[StageGroups, ...]:
        """Its stages."""
        return self.stages


_PHASES = ('waiting', 'running', 'fixed')  # by the value of the schedule's buffer


def network_groups(model: nn.Module) -> NetworkGroups:
    """Read which groups a network keeps: by the masks, which a merged network holds, too.

    Args:
        model: A network of this package.

    Raises:
        TypeError: If it is none.
        ValueError: If its operators are large kernels, which have no groups.
    """
    network = check_network(model)
    stages = []
    for i, blocks in enumerate(stage_blocks(network)):
        operators = [block.get_submodule('conv_dw') for block in blocks]
        first = operators[0]
        if not has_groups(first):
            raise ValueError('The network is made of large kernels (SLaK): it has no groups to keep or to prune.')
        stages.append(StageGroups(
            dim=first.dim,
            focus_length=first.focus_length,
            groups=num_groups(first.focus_length, first.kernel_size),
            layers=tuple(
                LayerGroups(f'stages.{i}.blocks.{j}.conv_dw', operator.kept_groups().cpu(), kept_by_paths(operator))
                for j, operator in enumerate(operators) if has_groups(operator)
            ),
        ))
    schedule = network.sparsity
    if isinstance(schedule, SparsitySchedule):
        return NetworkGroups(tuple(stages), _PHASES[int(schedule.phase)], int(schedule.step))
    return NetworkGroups(tuple(stages), 'none', 0)


def kept_by_paths(operator: Operator) -> tuple[int, ...]:
    """How many small kernels each path of an operator keeps; empty for a merged one."""
    return tuple(operator.group_mask.sum((1, 2)).tolist()) if isinstance(operator, ShiftwiseConv2d) else ()


def has_groups(operator: nn.Module) -> TypeGuard[Operator]:
    """Whether an operator is, or was merged from, one of small kernels."""
    return isinstance(operator, Operator) and operator.num_maps > 0


def check_network(model: nn.Module) -> ShiftwiseNet:
    """Refuse what is no network of this package.

    Raises:
        TypeError: If it is another module.
    """
    if not isinstance(model, ShiftwiseNet):
        raise TypeError(f'The model must be a network of timm_shiftwise, got a {type(model).__name__}.')
    return model


def stage_blocks(network: ShiftwiseNet) -> list[list[nn.Module]]:
    """Blocks of each stage."""
    return [list(stage.get_submodule('blocks').children()) for stage in network.stages.children()]


def percent(share: float) -> str:
    """A share for people."""
    return f'{100 * share:.1f} %'

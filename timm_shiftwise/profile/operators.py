"""What one operator costs, in whichever form it is."""
from typing import NamedTuple

from torch import nn

from timm_shiftwise.layers import LargeKernelConv2d, MergedConv2d, MergedShiftConv2d, ShiftwiseConv2d
from timm_shiftwise.sparsity.masks import uniform_counts

from .cost import Comparison, Cost, large_kernels, merged_kernels, small_kernels
from .kept import has_groups, kept_by_paths

Operator = LargeKernelConv2d | ShiftwiseConv2d | MergedConv2d | MergedShiftConv2d


class Shape(NamedTuple):
    """Size of an operator.

    Attributes:
        dim: Channels, ghosts among them.
        channels: Channels that are worked on.
        maps: K, small kernels of a channel; 0 for large kernels.
        focus_length: M in pixels.
        kernel_size: N in pixels.
    """
    dim: int
    channels: int
    maps: int
    focus_length: int
    kernel_size: int


class OperatorCost(NamedTuple):
    """Cost of an operator for one image.

    Attributes:
        kept: Kept small kernels of all channels together; 0 for large kernels.
        path_kept: How many of them each path keeps, where that is known.
        kernels: The kernels alone.
        rest: What is held beside them: norms, or what they were merged to.
    """
    kept: int
    path_kept: tuple[int, ...]
    kernels: Comparison
    rest: Comparison


def block_operator(block: nn.Module) -> Operator:
    """The operator of a block.

    Raises:
        TypeError: If it is none of this package's.
    """
    operator = block.get_submodule('conv_dw')
    if not isinstance(operator, Operator):
        raise TypeError(f'The block must have an operator of timm_shiftwise, got a {type(operator).__name__}.')
    return operator


def operator_shape(operator: Operator) -> Shape:
    """Read the size of an operator."""
    channels, maps = (operator.num_worked, operator.num_maps) if has_groups(operator) else (operator.dim, 0)
    return Shape(operator.dim, channels, maps, operator.focus_length, operator.kernel_size)


def operator_cost(operator: Operator, height: int, width: int, sparsity: float | None) -> OperatorCost:
    """Count what an operator costs on a map, and what SLaK's in its place would.

    Args:
        operator: The operator; on the ``meta`` device all its groups count as kept.
        height: H of the map.
        width: W of the map.
        sparsity: Share of the groups that is pruned; None counts those that are kept.
    """
    shape = operator_shape(operator)
    merged = isinstance(operator, (MergedConv2d, MergedShiftConv2d))
    slak = large_kernels(shape.dim, shape.focus_length, shape.kernel_size, height, width, merged=merged)
    # SLaK's three BatchNorms, of which the merge leaves a bias
    slak_rest = _held(shape.dim if merged else 3 * 2 * shape.dim)
    if isinstance(operator, LargeKernelConv2d):
        return OperatorCost(0, (), Comparison(slak, slak), Comparison(slak_rest, slak_rest))
    if isinstance(operator, MergedConv2d):
        ours = merged_kernels(operator.tall.weight.numel() + operator.wide.weight.numel(), height, width)
        if not has_groups(operator):
            return OperatorCost(0, (), Comparison(ours, ours), Comparison(slak_rest, slak_rest))
    mask = operator.kept_groups()
    path_kept: tuple[int, ...] = ()
    if sparsity is not None:
        kept = uniform_counts([mask.numel()], sparsity)[0]
    elif mask.is_meta:
        kept = mask.numel()
    else:
        kept, path_kept = int(mask.sum()), kept_by_paths(operator)
    if not isinstance(operator, MergedConv2d):
        ours = small_kernels(
            shape.channels, shape.maps, kept, shape.focus_length, shape.kernel_size, height, width,
            paths=len(operator.kernels) if isinstance(operator, ShiftwiseConv2d) else 1,
            shuffles=len(operator.wiring),
            padding=operator.padding,
        )
    rest = _held(held_weights(operator) - ours.parameters)
    return OperatorCost(kept, path_kept, Comparison(ours, slak), Comparison(rest, slak_rest))


def held_weights(module: nn.Module) -> int:
    """Number of weights of a module, those included that a merged operator holds as buffers."""
    buffers = sum(
        value.numel() for part in module.modules() if isinstance(part, MergedShiftConv2d)
        for value in part.buffers() if value.is_floating_point())
    return buffers + sum(parameter.numel() for parameter in module.parameters())


def _held(parameters: int) -> Cost:
    return Cost(parameters, parameters)

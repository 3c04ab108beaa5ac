"""What a network costs, for its model card: parameters, multiply-adds, activations, and how sparse it is."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_shiftwise.geometry import map_size
from timm_shiftwise.layers import MergedLargeKernelConv2d, MergedShiftwiseConv2d, ShiftwiseConv2d

_MERGED = (MergedShiftwiseConv2d, MergedLargeKernelConv2d)


@dataclass(frozen=True)
class Cost:
    """Cost of one image.

    Attributes:
        parameters: Number of weights.
        multiply_adds: Those of convolutions and linear layers; pruned groups cost nothing.
        activations: Number of values that these layers put out.
    """

    parameters: int
    multiply_adds: int
    activations: int


@torch.inference_mode()
def measure_cost(model: nn.Module, images: Tensor) -> Cost:
    """Count what a network costs for each image of a batch [B, in_chans, H, W]."""
    multiply_adds, activations = 0, 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal multiply_adds, activations
        multiply_adds += _multiply_adds(module, inputs[0], output)
        activations += output.numel()

    counted = (nn.Conv2d, nn.Linear, ShiftwiseConv2d, *_MERGED)
    handles = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, counted)]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return Cost(count_parameters(model), multiply_adds // len(images), activations // len(images))


def count_parameters(model: nn.Module) -> int:
    """Number of weights, those included that a merged operator holds as buffers."""
    merged = (module.state_dict().values() for module in model.modules() if isinstance(module, _MERGED))
    buffers = sum(value.numel() for values in merged for value in values if value.is_floating_point())
    return buffers + sum(parameter.numel() for parameter in model.parameters())


def sparsity_per_stage(model: nn.Module) -> list[float]:
    """Share of pruned groups of each stage; empty for a network of large kernels, which has no groups."""
    shares = []
    for stage in model.get_submodule('stages').children():
        kept = [group for module in stage.modules() if (group := kept_groups(module)) is not None]
        if kept:
            flat = torch.cat([mask.flatten() for mask in kept])
            shares.append(1 - flat.double().mean().item())
    return shares


def kept_groups(module: nn.Module) -> Tensor | None:
    """Which groups [C, K] of an operator are kept; None for any other module."""
    if isinstance(module, ShiftwiseConv2d):
        return module.get_buffer('mask')
    if isinstance(module, MergedShiftwiseConv2d):
        return (module.weight != 0).any(dim=-1).any(dim=-1)
    return None


def _multiply_adds(module: nn.Module, x: Tensor, output: Tensor) -> int:
    pixels = output.numel() // output.shape[1]
    if isinstance(module, nn.Conv2d):
        return output.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, MergedLargeKernelConv2d):
        return pixels * (module.tall.numel() + module.wide.numel())
    if isinstance(module, MergedShiftwiseConv2d) and module.padding == 'full':
        return pixels * (module.tall.numel() + module.wide.numel())
    kept = kept_groups(module)
    assert kept is not None
    size = int(module.kernel_size)  # type: ignore[arg-type]
    padding = str(module.padding)
    area = map_size(x.shape[2], size, padding) * map_size(x.shape[3], size, padding)
    return int(kept.sum()) * size * size * area * len(x)

"""Which pixels the kernels of a network of this package let through at all: the reach that its kept groups allow.

Gradients of untrained or hardly trained networks fade far from the middle; this is where they end. A set of pixels is
followed backwards through the network, from the middle of a feature map to the image.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_shiftwise.layers import LargeKernelConv2d, MergedConv2d, MergedShiftConv2d, ShiftwiseConv2d
from timm_shiftwise.models import ShiftwiseNet, ShiftwiseNetV2
from timm_shiftwise.ops.large_kernels import assemble_centred, centred


@torch.no_grad()
def exact_reach(network: ShiftwiseNet, height: int, width: int, stage: int | None = None) -> np.ndarray:
    """Pixels of an image on which the middle of a feature map can depend through convolutions.

    Squeeze-excitation and global response normalisation, which ``sw_v2_*`` have, pool over the whole map: through them
    everything depends on everything, which is left out here.

    Args:
        network: A network of this package, merged or not.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        stage: Which feature map, from 1; None for the last.

    Returns:
        bool [H, W].

    Raises:
        ValueError: If there is no such stage, or its map is empty.
    """
    stages = list(network.stages.children())
    if stage is not None and not 1 <= stage <= len(stages):
        raise ValueError(f'stage must be 1 to {len(stages)}, got {stage}.')
    stages = stages[:stage]
    resamplings = [network.stem, *(part.get_submodule('downsample') for part in stages[1:])]
    sizes = [[(height, width)]]  # of the maps that each convolution of a resampling reads, and that it leaves
    for resampling in resamplings:
        sizes.append([sizes[-1][-1]])
        for conv in _convolutions(resampling):
            sizes[-1].append(convolved_size(conv, *sizes[-1][-1]))
    rows, columns = sizes[-1][-1]
    if min(rows, columns) < 1:
        raise ValueError(f'An image of {height} x {width} leaves a map of {rows} x {columns} in stage {len(stages)}.')
    reached = torch.zeros(1, 1, rows, columns)
    reached[..., rows // 2, columns // 2] = 1
    for part, resampling, read in zip(reversed(stages), reversed(resamplings), reversed(sizes), strict=False):
        for block in reversed(list(part.get_submodule('blocks').children())):
            supports = _supports(block.get_submodule('conv_dw'))
            # a block adds its input to what its operator's branches make of it
            reached = (reached + sum(_spread(reached, support) for support in supports) > 0).float()
        for conv, size in zip(reversed(_convolutions(resampling)), reversed(read[:-1]), strict=True):
            reached = _read_by(conv, reached, size)
    return reached[0, 0].bool().numpy()


def convolved_size(conv: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    """Height and width of what a convolution makes of a map of a height and width."""
    def side(axis: int, length: int) -> int:
        return (length + 2 * int(conv.padding[axis]) - conv.kernel_size[axis]) // conv.stride[axis] + 1

    return side(0, height), side(1, width)


def pools_over_the_map(network: nn.Module) -> bool:
    """Whether a network has layers through which everything depends on everything."""
    return isinstance(network, ShiftwiseNetV2)


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d)]


def _supports(operator: nn.Module) -> list[Tensor]:
    """Where the kernels of an operator are not zero in any channel: [1, 1, rows, columns] of odd sides, centred."""
    if isinstance(operator, MergedConv2d):
        kernels = [operator.tall.weight.squeeze(1), operator.wide.weight.squeeze(1)]
    elif isinstance(operator, LargeKernelConv2d):
        convs = (operator.conv_h, operator.conv_v, operator.conv_i)
        kernels = [centred(conv.weight.squeeze(1), *(side // 2 for side in conv.kernel_size)) for conv in convs]
    else:
        assert isinstance(operator, (ShiftwiseConv2d, MergedShiftConv2d))
        # the kernels themselves may be anything: which groups are kept decides
        kept, size = operator.kept_groups().float(), operator.kernel_size
        ones = kept[:, :, None, None].expand(-1, -1, size, size)
        kernels = list(assemble_centred(ones, operator.wiring, operator.focus_length))
    return [(kernel != 0).any(0).float()[None, None].cpu() for kernel in kernels]


def _spread(reached: Tensor, support: Tensor) -> Tensor:
    """Pixels that a convolution with this support reads for the outputs that are set."""
    rows, columns = support.shape[2:]
    return F.conv_transpose2d(reached, support, padding=(rows // 2, columns // 2))


def _read_by(conv: nn.Conv2d, reached: Tensor, size: tuple[int, ...]) -> Tensor:
    """Pixels of a map of a size that a dense convolution reads for the outputs that are set."""
    ones = torch.ones(1, 1, *conv.kernel_size)
    full = F.conv_transpose2d(reached, ones, stride=conv.stride)
    top, left = (int(pad) for pad in conv.padding)
    missing = [max(side + pad - have, 0) for side, pad, have in zip(size, (top, left), full.shape[2:], strict=True)]
    full = F.pad(full, [0, missing[1], 0, missing[0]])
    return (full[..., top:top + size[0], left:left + size[1]] > 0).float()

"""The large kernels that the small ones of a trained network amount to."""
import numpy as np
import torch
from torch import Tensor, nn

from timm_shiftwise.layers import LargeKernelConv2d, MergedConv2d, MergedShiftConv2d, ShiftwiseConv2d
from timm_shiftwise.layers.shiftwise_conv import summed_paths
from timm_shiftwise.ops.large_kernels import assemble_kernels


@torch.no_grad()
def wide_and_tall(operator: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """The wide and the tall kernels of an operator, before their norms; those of a merged one have them within.

    Args:
        operator: ``conv_dw`` of a block.

    Returns:
        float [C, N, columns] and [C, rows, N].
    """
    wide: Tensor
    tall: Tensor
    if isinstance(operator, LargeKernelConv2d):
        wide, tall = operator.conv_h.weight[:, 0], operator.conv_v.weight[:, 0]
    elif isinstance(operator, MergedConv2d):
        wide, tall = (conv.weight[:operator.num_worked, 0] for conv in (operator.wide, operator.tall))
    else:
        assert isinstance(operator, (ShiftwiseConv2d, MergedShiftConv2d))
        kernels = operator.kernels
        if isinstance(operator, ShiftwiseConv2d):
            kernels = summed_paths(kernels, operator.group_mask)
        wide, tall, _ = assemble_kernels(kernels, operator.wiring)
    return wide.float().numpy(), tall.float().numpy()


def caveat(operator: nn.Module) -> str:
    """What to bear in mind of an operator's kernels; empty if they are what its branches compute before their norms."""
    if isinstance(operator, MergedConv2d):
        return (
            'The network is merged: these kernels have the norms within them, and the tall ones the square kernel and '
            'the skip, too.')
    if isinstance(operator, (ShiftwiseConv2d, MergedShiftConv2d)) and operator.padding == 'same':
        return 'With padding="same" windows over the border are dropped: there the network sees less than these show.'
    return ''

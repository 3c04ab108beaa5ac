"""SLaK's decomposed large kernel, the baseline that shift-wise operators stand in for.

Source: SLaK (arXiv 2207.03620), Section 3.
"""
from typing import Any

import torch
from timm.models import register_notrace_function
from torch import Tensor, nn
from torch.types import Device

from timm_shiftwise.geometry import check_geometry
from timm_shiftwise.ops import in_autocast_dtype

from .merged import MergedConv2d, fold_batch_norm


@register_notrace_function  # what is inside chooses by dtype and device; a name with an underscore would be traced
def in_safe_layout(x: Tensor) -> Tensor:
    """The input of a wide convolution; oneDNN never returns from some in bfloat16 whose maps are channels last."""
    if x.dtype == torch.bfloat16 and x.device.type == 'cpu':
        return x.contiguous()
    return x


class LargeKernelConv2d(nn.Module):
    """Depthwise N x M, M x N and N x N convolutions, each with its own BatchNorm, added.

    Args:
        dim: Number of channels in and out.
        focus_length: M, the long side in pixels.
        kernel_size: N, the short side in pixels.
        large_map: Whether its maps are large, see :class:`.operator.Operator`.
        device: Device of parameters and buffers.
        dtype: Floating point type of parameters and BatchNorm statistics.

    Shape:
        - Input: [B, dim, H, W]
        - Output: [B, dim, H, W]

    Raises:
        ValueError: If M or N is below 1.
    """

    def __init__(
            self, dim: int, focus_length: int, kernel_size: int = 5, *, large_map: bool = False, device: Device = None,
            dtype: torch.dtype | None = None) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        check_geometry(focus_length, kernel_size, 'full')
        self.dim = dim
        self.focus_length = focus_length
        self.kernel_size = kernel_size
        self.large_map = large_map
        self.conv_h = _depthwise(dim, kernel_size, focus_length, **dd)
        self.norm_h = nn.BatchNorm2d(dim, **dd)
        self.conv_v = _depthwise(dim, focus_length, kernel_size, **dd)
        self.norm_v = nn.BatchNorm2d(dim, **dd)
        self.conv_i = _depthwise(dim, kernel_size, kernel_size, **dd)
        self.norm_i = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Forward pass, [B, dim, H, W] in and out."""
        x = in_autocast_dtype(x)  # once, not once for each convolution
        height, width = x.shape[2], x.shape[3]
        # an even side makes one row or column more than the image has; of an odd one nothing is cut
        h = self.conv_h(in_safe_layout(x))[:, :, :height, :width]
        v = self.conv_v(x)[:, :, :height, :width]
        i = self.conv_i(x)[:, :, :height, :width]
        return self.norm_h(h) + self.norm_v(v) + self.norm_i(i)

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> MergedConv2d:
        """The operator merged for inference, same output; ``timm.utils.reparameterize_model`` calls it."""
        merged = MergedConv2d(
            self.conv_h.in_channels, self.focus_length, self.kernel_size, operator='slak', large_map=self.large_map,
            device=self.conv_h.weight.device, dtype=self.conv_h.weight.dtype)
        wide, bias_h = _folded(self.conv_h, self.norm_h)
        tall, bias_v = _folded(self.conv_v, self.norm_v)
        square, bias_i = _folded(self.conv_i, self.norm_i)
        merged.set_branches(wide, tall, square, bias_h + bias_v + bias_i)
        return merged.train(self.training)


def _depthwise(dim: int, rows: int, columns: int, **dd: Any) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, (rows, columns), padding=(rows // 2, columns // 2), groups=dim, bias=False, **dd)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernels [C, rows, columns] and bias [C] of a depthwise convolution with its BatchNorm, float64."""
    scale, bias = fold_batch_norm(norm)
    return conv.weight.double().squeeze(1) * scale[:, None, None], bias

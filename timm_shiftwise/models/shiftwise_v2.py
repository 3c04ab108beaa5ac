""" Shift-wise ConvNets of 2025

Paper: `ShiftwiseConv: Small Convolutional Kernel with Large Kernel Effect` (CVPR 2025), the later version of
https://arxiv.org/abs/2401.12736
@inproceedings{li2025shiftwiseconv,
  title     = {ShiftwiseConv: Small Convolutional Kernel with Large Kernel Effect},
  author    = {Dachong Li and Li Li and Zhuangzhuang Chen and Jianqiang Li},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2025},
}

The operator is that of ``shiftwise.py`` with kernels of 3 x 3. Squeeze-excitation, global response normalisation
(https://arxiv.org/abs/2301.00808) and the overlapping convolutions that lower the resolution are as in UniRepLKNet
(https://arxiv.org/abs/2311.15599).

The tag ``authors_in1k`` stands for the authors' own weights, translated.
"""
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from timm.layers import DropPath, GlobalResponseNormMlp, LayerNorm2d, SqueezeExcite, get_act_layer
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.types import Device

from timm_shiftwise.layers import MergedConv2d, ShiftwiseConv2d
from timm_shiftwise.layers.merged import fold_batch_norm

from .pretrained import LICENSE_OF_THE_AUTHORS, hub_id
from .shiftwise import ShiftwiseBlock, ShiftwiseNet, _cfg, create_shiftwise
from .variants import SHIFTWISE_V2

__all__ = ['ShiftwiseNetV2']  # the registry adds each entrypoint


class ShiftwiseBlockV2(nn.Module):
    """Operator -> BatchNorm -> squeeze-excitation -> Linear -> GELU -> GRN -> Linear -> BatchNorm, plus the input.

    Layer scale and drop path come before the addition.

    Args:
        dim: Number of channels in and out.
        conv_layer: Makes the operator: called with ``dim`` and keywords ``device`` and ``dtype``.
        mlp_ratio: Width of the hidden linear layer as a multiple of ``dim``.
        se_ratio: Width of the squeeze-excitation as a multiple of ``dim``.
        ls_init_value: Initial layer scale; None for no layer scale.
        act_layer: Activation between the linear layers.
        norm_layer: Normalisation of a [B, C, H, W] tensor.
        norm_eps: Accepted for the network's sake, whose LayerNorms have it; here are none.
        drop_path: Stochastic depth rate of the block.
        reparameterized: Build the form for inference, without layer scale and the norm before it, and without the one
            that the operator takes in.
        device: Device of parameters and buffers.
        dtype: Floating point type of parameters.
    """

    def __init__(
            self,
            dim: int,
            conv_layer: Callable[..., nn.Module],
            mlp_ratio: float = 4.,
            se_ratio: float = 0.25,
            ls_init_value: float | None = 1e-6,
            act_layer: str | Callable[..., nn.Module] = 'gelu',
            norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
            norm_eps: float = 1e-6,
            drop_path: float = 0.,
            reparameterized: bool = False,
            device: Device = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        if reparameterized:
            ls_init_value = None
        self.conv_dw = conv_layer(dim, **dd)
        self.norm = nn.Identity() if isinstance(self.conv_dw, MergedConv2d) else norm_layer(dim, **dd)
        self.se = SqueezeExcite(dim, rd_channels=int(dim * se_ratio), **dd)
        # the bias of the second linear layer would vanish in the norm that follows
        self.mlp = GlobalResponseNormMlp(
            dim, int(mlp_ratio * dim), act_layer=get_act_layer(act_layer), bias=(True, reparameterized), **dd)
        self.norm_mlp = nn.Identity() if reparameterized else norm_layer(dim, **dd)
        self.ls_init_value = ls_init_value
        self.gamma = nn.Parameter(ls_init_value * torch.ones(dim, **dd)) if ls_init_value is not None else None
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    reset_parameters = ShiftwiseBlock.reset_parameters

    def forward(self, x: Tensor) -> Tensor:
        """Forward pass, [B, C, H, W] in and out."""
        shortcut = x
        x = self.conv_dw(x)
        x = self.norm(x)
        x = self.se(x)
        x = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        x = self.mlp(x)
        x = x.permute(0, 3, 1, 2)  # [B, C, H, W]
        x = self.norm_mlp(x)
        if self.gamma is not None:
            x = x * self.gamma.reshape(1, -1, 1, 1)
        return self.drop_path(x) + shortcut

    @torch.jit.ignore
    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge for inference: ``timm.utils.reparameterize_model`` calls it.

        The norm behind the operator goes into its kernels, GRN's bias, the last norm and the layer scale into the
        second linear layer. Squeeze-excitation stays.
        """
        if isinstance(self.norm_mlp, nn.Identity):
            return
        self.conv_dw = merged = cast(ShiftwiseConv2d, self.conv_dw).fuse()
        if isinstance(merged, MergedConv2d):
            merged.fold_norm(cast(nn.BatchNorm2d, self.norm))
            self.norm = nn.Identity()
        fc2, grn = self.mlp.fc2, self.mlp.grn
        scale, bias = fold_batch_norm(cast(nn.BatchNorm2d, self.norm_mlp))
        bias = bias + scale * (fc2.weight.double() @ grn.bias.double())
        if self.gamma is not None:
            scale, bias = scale * self.gamma.double(), bias * self.gamma.double()
        fc2.weight.copy_(fc2.weight.double() * scale[:, None])
        fc2.bias = nn.Parameter(bias.to(fc2.weight.dtype))
        grn.bias.zero_()
        self.norm_mlp = nn.Identity()
        self.gamma = None


def overlapping_stem(in_chans: int, dim: int, norm_eps: float, **dd: Any) -> nn.Sequential:
    """Two overlapping convolutions, each with a LayerNorm: a quarter of the image's side, rounded up."""
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, kernel_size=3, stride=2, padding=1, **dd),
        LayerNorm2d(dim // 2, eps=norm_eps, **dd),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1, **dd),
        LayerNorm2d(dim, eps=norm_eps, **dd),
    )


def overlapping_downsample(in_chs: int, out_chs: int, norm_eps: float, **dd: Any) -> nn.Sequential:
    """Overlapping convolution -> LayerNorm: half of the map's side, rounded up."""
    return nn.Sequential(
        nn.Conv2d(in_chs, out_chs, kernel_size=3, stride=2, padding=1, **dd),
        LayerNorm2d(out_chs, eps=norm_eps, **dd),
    )


class ShiftwiseNetV2(ShiftwiseNet):
    """Shift-wise ConvNet of 2025: another block, stem and downsampling, arguments as :class:`ShiftwiseNet` has them.

    Paper: ShiftwiseConv: Small Convolutional Kernel with Large Kernel Effect (CVPR 2025).
    """
    stem_layer = staticmethod(overlapping_stem)
    downsample_layer = staticmethod(overlapping_downsample)
    block_layer = ShiftwiseBlockV2
    ghost_split = 'v2'


def _create_shiftwise_v2(variant: str, pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    return create_shiftwise(variant, pretrained, ShiftwiseNetV2, **dict(SHIFTWISE_V2[variant], **kwargs))


_cfg_v2 = partial(_cfg, paper_name='ShiftwiseConv: Small Convolutional Kernel with Large Kernel Effect')

default_cfgs = generate_default_cfgs({
    'sw_v2_tiny.authors_in1k': _cfg_v2(
        hf_hub_id=hub_id('sw_v2_tiny.authors_in1k'), license=LICENSE_OF_THE_AUTHORS),
    'sw_v2_tiny.in1k': _cfg_v2(hf_hub_id=hub_id('sw_v2_tiny.in1k')),
    'sw_v2_small.in1k': _cfg_v2(hf_hub_id=hub_id('sw_v2_small.in1k')),
    'sw_v2_base.in1k': _cfg_v2(hf_hub_id=hub_id('sw_v2_base.in1k')),
    'sw_v2_large.in1k': _cfg_v2(hf_hub_id=hub_id('sw_v2_large.in1k')),
})


@register_model
def sw_v2_tiny(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """Shift-wise ConvNet of 2025, tiny."""
    return _create_shiftwise_v2('sw_v2_tiny', pretrained=pretrained, **kwargs)


@register_model
def sw_v2_small(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """Shift-wise ConvNet of 2025, small."""
    return _create_shiftwise_v2('sw_v2_small', pretrained=pretrained, **kwargs)


@register_model
def sw_v2_base(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """Shift-wise ConvNet of 2025, base."""
    return _create_shiftwise_v2('sw_v2_base', pretrained=pretrained, **kwargs)


@register_model
def sw_v2_large(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """Shift-wise ConvNet of 2025, large."""
    return _create_shiftwise_v2('sw_v2_large', pretrained=pretrained, **kwargs)

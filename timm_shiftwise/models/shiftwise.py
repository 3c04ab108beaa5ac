""" Shift-wise ConvNets

Paper: `Shift-ConvNets: Small Convolutional Kernel with Large Kernel Effects` - https://arxiv.org/abs/2401.12736
@article{li2024shift,
  title   = {Shift-ConvNets: Small Convolutional Kernel with Large Kernel Effects},
  author  = {Dachong Li and Li Li and Zhuangzhuang Chen and Jianqiang Li},
  journal = {arXiv preprint arXiv:2401.12736},
  year    = {2024},
}

The networks have ConvNeXt's four stages (https://arxiv.org/abs/2201.03545). The operator that mixes pixels is one of:

* ``sw``: small kernels shared by a wide, a tall and a centre branch, shifted to their places in several
  orders, beside ghost channels (Section 3);
* ``p_sw``: the paper's ablation, shared small kernels in one order;
* ``eq_slak``: small kernels of each branch's own in natural order, equal to SLaK's large kernels (Eq. 1-3);
* ``slak``: the large kernels themselves, `SLaK` - https://arxiv.org/abs/2207.03620.

The tag ``authors_in1k`` stands for SLaK's own weights, translated; ``test_sw.digits`` was trained by this package.
"""
from collections.abc import Callable, Mapping
from functools import partial
from importlib.resources import files
from typing import Any, ClassVar, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerNorm,
    LayerNorm2d,
    Mlp,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    get_act_layer,
    trunc_normal_,
)
from timm.layers.grn import GlobalResponseNorm
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, named_apply, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.types import Device

from timm_shiftwise.layers import LargeKernelConv2d, MergedConv2d, MergedShiftConv2d, ShiftwiseConv2d
from timm_shiftwise.sparsity import SparsitySchedule, keep_masks

from .checkpoint import checkpoint_filter_fn, fitting, load_into_features, translate_within
from .layouts import CONVNEXT, layout_of, unwrap
from .pretrained import LICENSE_OF_THE_AUTHORS, explain_missing_weights, hub_id
from .variants import SHIFTWISE

__all__ = ['ShiftwiseNet']  # the registry adds each entrypoint


class ShiftwiseBlock(nn.Module):
    """Operator -> LayerNorm -> Linear -> GELU -> Linear -> layer scale -> drop path, plus the input.

    Args:
        dim: Number of channels in and out.
        conv_layer: Makes the operator: called with ``dim`` and keywords ``device`` and ``dtype``.
        mlp_ratio: Width of the hidden linear layer as a multiple of ``dim``.
        ls_init_value: Initial layer scale; None for no layer scale.
        act_layer: Activation between the linear layers.
        norm_layer: Normalisation over channels of a [B, H, W, C] tensor, called with ``eps``.
        norm_eps: Epsilon of the normalisation.
        drop_path: Stochastic depth rate of the block.
        reparameterized: Build the form for inference, without layer scale.
        device: Device of parameters and buffers.
        dtype: Floating point type of parameters.
    """

    def __init__(
            self,
            dim: int,
            conv_layer: Callable[..., nn.Module],
            mlp_ratio: float = 4.,
            ls_init_value: float | None = 1e-6,
            act_layer: str | Callable[..., nn.Module] = 'gelu',
            norm_layer: Callable[..., nn.Module] = LayerNorm,
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
        self.norm = norm_layer(dim, eps=norm_eps, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), act_layer=get_act_layer(act_layer), **dd)
        self.ls_init_value = ls_init_value
        self.gamma = nn.Parameter(ls_init_value * torch.ones(dim, **dd)) if ls_init_value is not None else None
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def reset_parameters(self) -> None:
        """Set the layer scale to its initial value."""
        if self.gamma is not None and self.ls_init_value is not None:
            nn.init.constant_(self.gamma, self.ls_init_value)

    def forward(self, x: Tensor) -> Tensor:
        """Forward pass, [B, C, H, W] in and out."""
        shortcut = x
        x = self.conv_dw(x)
        x = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        x = self.norm(x)
        x = self.mlp(x)
        x = x.permute(0, 3, 1, 2)  # [B, C, H, W]
        if self.gamma is not None:
            x = x * self.gamma.reshape(1, -1, 1, 1)
        return self.drop_path(x) + shortcut

    @torch.jit.ignore
    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the layer scale into the second linear layer; ``timm.utils.reparameterize_model`` calls it."""
        if self.gamma is not None:
            fc2 = cast(nn.Linear, self.mlp.fc2)
            fc2.weight.mul_(self.gamma[:, None])
            fc2.bias.mul_(self.gamma)
            self.gamma = None


def patch_stem(in_chans: int, dim: int, norm_eps: float, **dd: Any) -> nn.Sequential:
    """Convolution of 4 x 4 patches -> LayerNorm: a quarter of the image's side."""
    return nn.Sequential(
        nn.Conv2d(in_chans, dim, kernel_size=4, stride=4, **dd), LayerNorm2d(dim, eps=norm_eps, **dd))


def patch_downsample(in_chs: int, out_chs: int, norm_eps: float, **dd: Any) -> nn.Sequential:
    """LayerNorm -> convolution of 2 x 2 patches: half of the map's side."""
    return nn.Sequential(
        LayerNorm2d(in_chs, eps=norm_eps, **dd), nn.Conv2d(in_chs, out_chs, kernel_size=2, stride=2, **dd))


class ShiftwiseStage(nn.Module):
    """Downsampling, except in the first stage, and blocks.

    Args:
        in_chs: Channels in.
        out_chs: Channels out.
        depth: Number of blocks.
        conv_layer: See :class:`ShiftwiseBlock`.
        block_layer: Makes a block, with the arguments of :class:`ShiftwiseBlock`.
        downsample_layer: Makes what halves the map first, called with the channels in and out; None leaves the map.
        drop_path_rates: Stochastic depth rate of each block.
        ls_init_value: Initial layer scale; None for no layer scale.
        device: Device of parameters and buffers.
        dtype: Floating point type of parameters.
    """

    def __init__(
            self, in_chs: int, out_chs: int, depth: int, conv_layer: Callable[..., nn.Module],
            block_layer: Callable[..., nn.Module], downsample_layer: Callable[..., nn.Module] | None,
            drop_path_rates: list[float], ls_init_value: float | None = 1e-6,
            device: Device = None, dtype: torch.dtype | None = None) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample_layer(in_chs, out_chs, **dd) if downsample_layer else nn.Identity()
        self.blocks = nn.Sequential(*[
            block_layer(out_chs, conv_layer, ls_init_value=ls_init_value, drop_path=drop_path_rates[i], **dd)
            for i in range(depth)
        ])

    def forward(self, x: Tensor) -> Tensor:
        """Forward pass, [B, C_in, H, W] to [B, C_out, H', W']."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x


class ShiftwiseNet(nn.Module):
    """Shift-wise ConvNet, and SLaK as its baseline.

    Papers: https://arxiv.org/abs/2401.12736, https://arxiv.org/abs/2207.03620

    Args:
        in_chans: Number of input image channels.
        num_classes: Number of classes of the classification head; 0 for no classifier.
        global_pool: Global pooling type.
        depths: Number of blocks of each stage.
        dims: Channels of each stage.
        focus_lengths: M of each stage, the long side of its kernels in pixels.
        kernel_size: N, the short side, and the side of the small kernels, in pixels.
        operator: ``'sw'``, ``'p_sw'``, ``'eq_slak'`` or ``'slak'``, see the module's docstring.
        ghost_ratio: Share of channels an operator passes through untouched. Not for ``'slak'``.
        num_paths: P, parallel convolutions of an operator. Not for ``'slak'``.
        num_shuffles: R, orders of the groups that are added up. Only for ``'sw'`` and ``'p_sw'``.
        single_centre: Let all orders put one and the same small kernel of a channel into the centre branch. Only for
            ``'sw'`` and ``'p_sw'``.
        centre_norm: Whether the centre branch has a BatchNorm. Not for ``'slak'``.
        grow_init: Norm weight of the wide and the tall branch in a network that is grown from a ConvNeXt, which it
            equals with 0 only. Not for ``'slak'``.
        padding: Padding policy of the small convolutions, ``'full'`` or ``'same'``. Not for ``'slak'``.
        ls_init_value: Initial layer scale; None for no layer scale.
        act_layer: Activation between the linear layers of a block.
        norm_eps: Epsilon of the LayerNorms.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; it grows linearly from 0.
        sparsity: Share of the small kernels to prune while training, 0 up to, not including, 1; 0 trains the dense
            network, or one whose loaded masks stay. This and the next six: see
            :class:`timm_shiftwise.sparsity.SparsitySchedule`.
        prune_rate: Share of a layer's kept groups that the first update exchanges.
        prune_interval: Optimiser steps between updates.
        sparsity_init: ``'snip'``, ``'uniform'`` or ``'magnitude'``: which groups are kept at first.
        sparsity_steps: Length of the run in optimiser steps; the default is that of 300 epochs of ImageNet-1k in
            batches of 4096, 313 an epoch.
        sparsity_seed: Seed of the masks.
        mask_sharing_interval: Updates from one that gives all paths of an operator the same kept groups to the next
            that does.
        reparameterized: Build the form for inference, which the weights of a network that went through
            ``timm.utils.reparameterize_model`` fit; it cannot be trained.
        backend: What computes the operator: ``'auto'``, ``'taichi'`` or ``'torch'``; None follows the environment
            variable ``TIMM_SHIFTWISE_BACKEND``.
        device: Device of parameters and buffers.
        dtype: Floating point type of parameters.

    Shape:
        - Input: [B, in_chans, H, W]
        - Output: [B, num_classes]

    Raises:
        ValueError: If an argument is out of its range, or the per-stage ones differ in length.
    """
    # what a later generation of these networks replaces
    stem_layer: ClassVar[Callable[..., nn.Module]] = staticmethod(patch_stem)
    downsample_layer: ClassVar[Callable[..., nn.Module]] = staticmethod(patch_downsample)
    block_layer: ClassVar[Callable[..., nn.Module]] = ShiftwiseBlock
    ghost_split: ClassVar[str] = 'v1'

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            depths: tuple[int, ...] = (3, 3, 9, 3),
            dims: tuple[int, ...] = (96, 192, 384, 768),
            focus_lengths: tuple[int, ...] = (51, 49, 47, 13),
            kernel_size: int = 5,
            operator: str = 'sw',
            ghost_ratio: float = 0.,
            num_paths: int = 1,
            num_shuffles: int = 1,
            single_centre: bool = False,
            centre_norm: bool = True,
            grow_init: float = 0.,
            padding: str = 'full',
            ls_init_value: float | None = 1e-6,
            act_layer: str | Callable[..., nn.Module] = 'gelu',
            norm_eps: float = 1e-6,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            sparsity: float = 0.,
            prune_rate: float = 0.5,
            prune_interval: int = 2000,
            sparsity_init: str = 'snip',
            sparsity_steps: int = 93_900,
            sparsity_seed: int = 0,
            mask_sharing_interval: int = 1,
            reparameterized: bool = False,
            backend: str | None = None,
            device: Device = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__()
        if not len(depths) == len(dims) == len(focus_lengths) >= 1:
            raise ValueError(
                'depths, dims and focus_lengths must have one entry for each stage, '
                f'got {tuple(depths)}, {tuple(dims)} and {tuple(focus_lengths)}.')
        if operator == 'slak':
            _refuse_for_slak(
                ghost_ratio=ghost_ratio,
                num_paths=num_paths,
                num_shuffles=num_shuffles,
                single_centre=single_centre,
                centre_norm=centre_norm,
                grow_init=grow_init,
                padding=padding,
                sparsity=sparsity,
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.ghost_ratio = ghost_ratio
        conv_layer = partial(
            _conv_layer,
            operator,
            reparameterized,
            kernel_size=kernel_size,
            ghost_ratio=ghost_ratio,
            ghost_split=self.ghost_split,
            num_paths=num_paths,
            num_shuffles=num_shuffles,
            single_centre=single_centre,
            centre_norm=centre_norm,
            grow_init=grow_init,
            padding=padding,
            backend=backend,
        )
        self.drop_rate = drop_rate
        self.feature_info = []

        self.stem = self.stem_layer(in_chans, dims[0], norm_eps, **dd)
        drop_path_rates = cast(
            'list[list[float]]', calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        stages = []
        for i, (depth, dim, focus_length) in enumerate(zip(depths, dims, focus_lengths, strict=True)):
            stages.append(ShiftwiseStage(
                dims[max(i - 1, 0)],
                dim,
                depth=depth,
                conv_layer=conv_layer(focus_length=focus_length, large_map=i < _STAGES_OF_LARGE_MAPS),
                block_layer=partial(
                    self.block_layer, act_layer=act_layer, norm_eps=norm_eps, reparameterized=reparameterized),
                downsample_layer=partial(self.downsample_layer, norm_eps=norm_eps) if i > 0 else None,
                drop_path_rates=drop_path_rates[i],
                ls_init_value=ls_init_value,
                **dd,
            ))
            self.feature_info += [dict(num_chs=dim, reduction=4 * 2 ** i, module=f'stages.{i}')]
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = dims[-1]
        self.head = NormMlpClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            norm_layer=partial(LayerNorm2d, eps=norm_eps),
            **dd,
        )
        if operator == 'slak' or reparameterized:
            self.sparsity: nn.Module = nn.Identity()
        else:
            self.sparsity = SparsitySchedule(
                [[cast(ShiftwiseConv2d, block.conv_dw) for block in stage.blocks] for stage in stages],
                sparsity,
                prune_rate,
                prune_interval,
                sparsity_init,
                sparsity_steps,
                sparsity_seed,
                mask_sharing_interval,
                device=device,
            )
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw the weights anew.

        Args:
            needs_reset: Whether everything else, tables and statistics included, is set to what it is in a new network,
                too: after ``to_empty`` of a network built on the meta device.
        """
        named_apply(partial(_init_weights, needs_reset=needs_reset), self)

    def load_state_dict(
            self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> _IncompatibleKeys:
        """Load a checkpoint of our layout, version 0.1's, the authors' or a ConvNeXt's.

        See :func:`checkpoint_filter_fn`.

        Nothing is copied unless everything fits.

        Args:
            state_dict: Weights, bare or under ``model``, ``model_ema``, ``state_dict`` or ``state_dict_ema``.
            strict: Whether keys may neither be missing nor left over.
            assign: Take the tensors themselves instead of copying.

        Returns:
            The missing and the left over keys, as PyTorch names them.

        Raises:
            CheckpointError: If the checkpoint does not fit; the message says the first few reasons and what would. It
                is a ValueError and a RuntimeError.
        """
        return super().load_state_dict(fitting(state_dict, self, strict), strict, assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # what wraps the network, such as DistributedDataParallel, comes this way only
        translate_within(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay beyond those of one dimension, which have none anyway."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade computation for memory: recompute each block in the backward pass."""
        for stage in self.stages:
            cast(ShiftwiseStage, stage).grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replace the classifier.

        Args:
            num_classes: Number of classes; 0 for none.
            global_pool: Global pooling type; None leaves it.
            reset_other: Drop the norm before the classifier, too.
        """
        self.num_classes = num_classes
        like = self.stem.get_parameter('0.weight')
        if reset_other:
            self.head.norm = nn.Identity()
        with like.device:  # earlier versions of timm place the new classifier by PyTorch's defaults
            self.head.reset(num_classes, global_pool)
        self.head.to(like.dtype)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
            self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
            output_fmt: str = 'NCHW', intermediates_only: bool = False) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Forward pass that also returns the stages' outputs.

        Args:
            x: Image, [B, in_chans, H, W].
            indices: The last n stages if an int, all if None, those listed otherwise.
            norm: Accepted for timm's interface; the network's only final norm follows the pooling.
            stop_early: Run no stage beyond the last one asked for.
            output_fmt: Only ``'NCHW'``.
            intermediates_only: Return the stages' outputs alone.

        Returns:
            The list of outputs, or the final features and that list.

        Raises:
            ValueError: If the output format is another one.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[:max_index + 1]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
            self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop the stages that given intermediate outputs do not need.

        Args:
            indices: The last n stages if an int, those listed otherwise.
            prune_norm: Accepted for timm's interface; the network's only final norm goes with the head.
            prune_head: Drop the head: pooling, norm and classifier. It goes with the last stage, for which it is made,
                in any case.

        Returns:
            Indices of the stages that were asked for.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        is_shorter = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if is_shorter:
            self.num_features = self.head.in_features = self.head.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or is_shorter:
            self.reset_classifier(0, '', reset_other=True)
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map before pooling, [B, num_features, H / 32, W / 32]."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, norm and classifier; without the classifier if ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


_STAGES_OF_LARGE_MAPS = 2
"""Stages whose maps are large enough to be padded in exported graphs: 56 x 56 and 28 x 28 of 224 pixels."""


_OF_TRAINING = ('num_paths', 'single_centre', 'centre_norm', 'grow_init')
"""Arguments of an operator that its merged form does not have."""


def _conv_layer(operator: str, reparameterized: bool, **settings: Any) -> Callable[..., nn.Module]:
    """What makes the operator of a block: called with its channels and its own keywords."""
    if operator == 'slak' and not reparameterized:
        names = ('focus_length', 'kernel_size', 'large_map')
        return partial(LargeKernelConv2d, **{name: settings[name] for name in names})
    layer: Callable[..., nn.Module] = ShiftwiseConv2d
    unused: tuple[str, ...] = ()
    if reparameterized and settings['padding'] == 'full':
        layer, unused = MergedConv2d, (*_OF_TRAINING, 'num_shuffles', 'padding', 'backend')
    elif reparameterized:
        layer, unused = MergedShiftConv2d, (*_OF_TRAINING, 'padding')
    return partial(layer, operator=operator, **{name: value for name, value in settings.items() if name not in unused})


def _refuse_for_slak(**settings: Any) -> None:
    plain = dict(
        ghost_ratio=0., num_paths=1, num_shuffles=1, single_centre=False, centre_norm=True, grow_init=0.,
        padding='full', sparsity=0.)
    for name, value in settings.items():
        if value != plain[name]:
            raise ValueError(f"operator 'slak' has no {name}: it must stay {plain[name]!r}, got {value!r}.")


def _init_weights(module: nn.Module, name: str = '', needs_reset: bool = False) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif needs_reset and isinstance(module, GlobalResponseNorm):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    elif needs_reset and hasattr(module, 'reset_parameters'):
        cast(Callable[[], None], module.reset_parameters)()


def _filter_pretrained(
        state_dict: Mapping[str, Any], model: nn.Module, features_only: bool = False) -> dict[str, Tensor]:
    state = checkpoint_filter_fn(state_dict, model, features_only)
    if layout_of(unwrap(state_dict)) == CONVNEXT:
        return state  # a grown network has no masks yet
    # whoever starts from published weights fine-tunes them: their masks stay
    return keep_masks(state, model)


def create_shiftwise(
        variant: str, pretrained: bool = False, model_cls: type[ShiftwiseNet] = ShiftwiseNet,
        **kwargs: Any) -> ShiftwiseNet:
    """Build a registered network through timm, with its weights if asked for."""
    with explain_missing_weights(variant, pretrained, kwargs):
        model = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_filter_fn=partial(_filter_pretrained, features_only=bool(kwargs.get('features_only'))),
            feature_cfg=dict(out_indices=tuple(range(len(kwargs['depths']))), flatten_sequential=True),
            **kwargs,
        )
    if kwargs.get('features_only'):
        model.register_load_state_dict_pre_hook(load_into_features)
    return model


def _create_shiftwise(variant: str, pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    return create_shiftwise(variant, pretrained, **dict(SHIFTWISE[variant], **kwargs))


def _cfg(url: str = '', **kwargs: Any) -> dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.0', 'classifier': 'head.fc',
        'license': 'apache-2.0',
        'paper_ids': 'arXiv:2401.12736',
        'paper_name': 'Shift-ConvNets: Small Convolutional Kernel with Large Kernel Effects',
        'origin_url': 'https://github.com/lidc54/shift-wiseConv',
        **kwargs,
    }


_cfg_slak = partial(
    _cfg,
    paper_ids='arXiv:2207.03620',
    paper_name='More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity',
    origin_url='https://github.com/VITA-Group/SLaK',
)
_authors = partial(_cfg_slak, license=LICENSE_OF_THE_AUTHORS)

default_cfgs = generate_default_cfgs({
    'sw_tiny.in1k': _cfg(hf_hub_id=hub_id('sw_tiny.in1k')),
    'sw_small.in1k': _cfg(hf_hub_id=hub_id('sw_small.in1k')),
    'sw_base.in1k': _cfg(hf_hub_id=hub_id('sw_base.in1k')),
    'slak_tiny.authors_in1k': _authors(hf_hub_id=hub_id('slak_tiny.authors_in1k')),
    'slak_tiny.in1k': _cfg_slak(hf_hub_id=hub_id('slak_tiny.in1k')),
    'slak_small.authors_in1k': _authors(hf_hub_id=hub_id('slak_small.authors_in1k')),
    'slak_small.in1k': _cfg_slak(hf_hub_id=hub_id('slak_small.in1k')),
    'slak_base.authors_in1k': _authors(hf_hub_id=hub_id('slak_base.authors_in1k')),
    'slak_base.in1k': _cfg_slak(hf_hub_id=hub_id('slak_base.in1k')),
    'eq_slak_tiny.in1k': _cfg(hf_hub_id=hub_id('eq_slak_tiny.in1k')),
    'eq_slak_small.in1k': _cfg(hf_hub_id=hub_id('eq_slak_small.in1k')),
    'eq_slak_base.in1k': _cfg(hf_hub_id=hub_id('eq_slak_base.in1k')),
    'p_sw_tiny.in1k': _cfg(hf_hub_id=hub_id('p_sw_tiny.in1k')),
    'p2_sw_tiny.in1k': _cfg(hf_hub_id=hub_id('p2_sw_tiny.in1k')),
    'test_sw.digits': _cfg(
        file=str(files('timm_shiftwise') / 'weights' / 'test_sw.digits.safetensors'),
        num_classes=10, input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0, interpolation='bilinear',
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        origin_url=None,
    ),
})


@register_model
def sw_tiny(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """Shift-wise ConvNet, tiny."""
    return _create_shiftwise('sw_tiny', pretrained=pretrained, **kwargs)


@register_model
def sw_small(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """Shift-wise ConvNet, small."""
    return _create_shiftwise('sw_small', pretrained=pretrained, **kwargs)


@register_model
def sw_base(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """Shift-wise ConvNet, base."""
    return _create_shiftwise('sw_base', pretrained=pretrained, **kwargs)


@register_model
def slak_tiny(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """SLaK, tiny, width 1.3."""
    return _create_shiftwise('slak_tiny', pretrained=pretrained, **kwargs)


@register_model
def slak_small(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """SLaK, small, width 1.3."""
    return _create_shiftwise('slak_small', pretrained=pretrained, **kwargs)


@register_model
def slak_base(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """SLaK, base, width 1.3."""
    return _create_shiftwise('slak_base', pretrained=pretrained, **kwargs)


@register_model
def eq_slak_tiny(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """SLaK, tiny, width 1.3, its large kernels made of shifted small ones."""
    return _create_shiftwise('eq_slak_tiny', pretrained=pretrained, **kwargs)


@register_model
def eq_slak_small(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """SLaK, small, width 1.3, its large kernels made of shifted small ones."""
    return _create_shiftwise('eq_slak_small', pretrained=pretrained, **kwargs)


@register_model
def eq_slak_base(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """SLaK, base, width 1.3, its large kernels made of shifted small ones."""
    return _create_shiftwise('eq_slak_base', pretrained=pretrained, **kwargs)


@register_model
def p_sw_tiny(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """The paper's ablation p-SW: small kernels shared by the branches, every window kept (p = N - 1)."""
    return _create_shiftwise('p_sw_tiny', pretrained=pretrained, **kwargs)


@register_model
def p2_sw_tiny(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """The paper's ablation p2-SW: as p-SW, windows centred outside of the image dropped (p = N // 2)."""
    return _create_shiftwise('p2_sw_tiny', pretrained=pretrained, **kwargs)


@register_model
def test_sw(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """A shift-wise ConvNet small enough for tests and the quickstart."""
    return _create_shiftwise('test_sw', pretrained=pretrained, **kwargs)

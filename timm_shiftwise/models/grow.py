"""Shift-wise networks grown from ConvNeXts: the same function on the first day, a larger reach to be learned.

With N = 7 the depthwise kernel of a ConvNeXt (https://arxiv.org/abs/2201.03545) is one small kernel of the operator. It
goes to the centre branch, in the one group of a channel that all orders put there, less the one of the skip and divided
by the number R of orders. The BatchNorms of the wide and of the tall branch get weights of zero; these learn at once,
and the other groups, which are drawn as always, from the second step on. All other tensors keep their names.
"""
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any, cast

import timm
import torch
from timm.layers import get_act_layer
from timm.models import ConvNeXt
from timm.models._pretrained import filter_pretrained_cfg
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_shiftwise.layers import ShiftwiseConv2d
from timm_shiftwise.sparsity.schedule import WAITING

from .layouts import CheckpointError, Operator
from .variants import SHIFTWISE

_SMALLEST = 'sw_convnext_tiny'
"""What a ConvNeXt of an unregistered size is grown to, with its own depths and dims."""

_USUAL_LICENSE = 'apache-2.0'
_ORIGINAL = re.compile(r'^stages\.\d+\.\d+\.dwconv\.')
_LINEAR = re.compile(r'^stages\..+\.mlp\.fc[12]\.weight$')
_OTHERS = [(re.compile(pattern), reason) for pattern, reason in [
    (r'\.mlp\.grn\.', 'it is a ConvNeXt V2, whose global response normalisation these networks do not have'),
    (r'^stem\.[23]\.', 'its stem is made of overlapping convolutions (an _ols network)'),
    (r'^norm_pre\.', 'it normalises before it pools (an _hnf network)'),
    (r'^head\.pre_logits\.', 'its head has a hidden layer (a large_mlp network)'),
]]


def refuse_original(names: Collection[str]) -> None:
    """Refuse a ConvNeXt of its authors' code, which timm translates and we do not.

    Raises:
        CheckpointError: If the names are those of such a checkpoint.
    """
    if any(map(_ORIGINAL.match, names)):
        raise CheckpointError(
            "The checkpoint is a ConvNeXt in the layout of its authors' own code. timm translates it: "
            "timm_shiftwise.grow(timm.create_model('convnext_tiny', pretrained=True, "
            "pretrained_cfg_overlay=dict(file=FILE))), and the name of another size likewise.")


def with_linear_layers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ConvNeXt's weights, with linear layers where it has 1 x 1 convolutions.

    Args:
        state: A state dict of timm's ConvNeXt, without wrappers and prefixes.

    Raises:
        CheckpointError: If it is a ConvNeXt that none of our networks can be; the message says why.
    """
    reason = next((reason for pattern, reason in _OTHERS if any(map(pattern.search, state))), None)
    if reason is None and not any(key.endswith('.norm.bias') for key in state):
        reason = 'its norms have no bias (an _rms network)'
    sides = {tuple(value.shape[2:]) for key, value in state.items() if key.endswith('.conv_dw.weight')}
    if len(sides) > 1:
        reason = f'its depthwise kernels are of several sizes, {sorted(sides)}'
    if reason is not None:
        raise CheckpointError(
            f'The ConvNeXt cannot be grown: {reason}. convnext_tiny to convnext_xxlarge and convnext_atto to '
            'convnext_nano can.')
    return {
        key: value.flatten(1) if _LINEAR.match(key) and value.shape[2:] == (1, 1) else value
        for key, value in state.items()}


def grow_state(
        state: Mapping[str, Tensor], operators: Mapping[str, Operator],
        own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Translate a ConvNeXt's weights into those of a shift-wise network that computes the same in eval mode.

    Args:
        state: A state dict of timm's ConvNeXt, without wrappers and prefixes.
        operators: The network's operators by their names.
        own: The network's own state, by its names.

    Returns:
        A state dict in our layout, and what is wrong with operators that cannot take a ConvNeXt's kernels.

    Raises:
        CheckpointError: If it is a ConvNeXt that none of our networks can be.
    """
    out, problems = with_linear_layers(state), list[str]()
    for name, operator in operators.items():
        weight, bias = (out.pop(f'{name}.{part}', None) for part in ('weight', 'bias'))
        if weight is None or bias is None:
            problems.append(f'{name}.{"bias" if bias is None else "weight"} is missing')
            continue
        side = operator.kernel_size
        if tuple(weight.shape) != (operator.dim, 1, side, side) or tuple(bias.shape) != (operator.dim,):
            problems.append(
                f'{name} has a kernel of the shape {tuple(weight.shape)} and a bias of the shape {tuple(bias.shape)}, '
                f'the model takes {(operator.dim, 1, side, side)} and {(operator.dim,)}')
        elif not isinstance(operator, ShiftwiseConv2d):
            problems.append(
                f'{name} is merged for inference: build the network without reparameterized=True, and merge it then')
        elif operator.num_ghost > 0 or not _has_single_centre(operator):
            problems.append(
                f'{name} has no single group for a kernel of each channel: give ghost_ratio=0 and single_centre=True')
        else:
            out.update((f'{name}.{key}', value) for key, value in _grown(operator, weight, bias).items())
    # masks follow from the first step, as in a network that trains from scratch
    for key, value in (('sparsity.phase', WAITING), ('sparsity.step', 0)):
        if key in own:
            out[key] = torch.tensor(value)
    return out, problems


def _has_single_centre(operator: ShiftwiseConv2d) -> bool:
    picks = operator.released_tables()['wiring'][:, :, -1]
    return bool((picks == picks[0]).all())


def _grown(operator: ShiftwiseConv2d, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """State of an operator that computes a depthwise convolution.

    Args:
        operator: The operator, which gives the groups that the convolution does not fill.
        weight: Kernels [C, 1, N, N].
        bias: Bias [C].
    """
    tables = operator.released_tables()
    picks = tables['wiring'][:, :, -1].long()  # [R, C]
    kernels = operator.kernels.detach()
    if kernels.is_meta:
        kernels = nn.init.trunc_normal_(torch.empty_like(kernels, device='cpu'), std=.02)
    kernels = kernels.clone()  # [P, C, K, N, N]
    centre = weight.detach().squeeze(1).to(kernels.device, torch.float64, copy=True)  # [C, N, N]
    if operator.inner_skip:
        centre[:, operator.kernel_size // 2, operator.kernel_size // 2] -= 1
    channels = torch.arange(operator.dim)
    kernels[:, channels, picks[0]] = 0
    kernels[0, channels, picks[0]] = (centre / len(picks)).to(kernels)
    state = {
        'kernels': kernels,
        'group_mask': torch.ones(operator.group_mask.shape, dtype=torch.bool),
        **tables,
    }
    for branch in ('norm_h', 'norm_v', 'norm_i'):
        norm = getattr(operator, branch)
        if isinstance(norm, _BatchNorm):
            # with these statistics a BatchNorm divides by the root of 1 + eps
            scale = (1 + norm.eps) ** 0.5 if branch == 'norm_i' else operator.grow_init
            like = bias.detach().to(kernels)
            state[f'{branch}.weight'] = torch.full_like(like, scale)
            state[f'{branch}.bias'] = torch.zeros_like(like)
            state[f'{branch}.running_mean'] = torch.zeros_like(like)
            state[f'{branch}.running_var'] = torch.ones_like(like)
    last = 'norm_i' if 'norm_i.bias' in state else 'norm_h'
    state[f'{last}.bias'] = bias.detach().to(kernels)
    return state


def grow(model: str | nn.Module, **kwargs: Any) -> nn.Module:
    """Grow a shift-wise network from a ConvNeXt: the same logits, and a reach that training can widen.

    Any of timm's ConvNeXts of the first version will do that has plain LayerNorms, a stem of patches and a head without
    a hidden layer: ``convnext_tiny`` to ``convnext_xxlarge``, ``convnext_atto`` to ``convnext_nano``, DINOv3's and
    EUPE's among them.

    Args:
        model: A ConvNeXt, or the name of one, whose weights are then fetched through timm.
        kwargs: Further arguments of the shift-wise network, such as ``focus_lengths``, ``drop_path_rate`` or
            ``sparsity``.

    Returns:
        The network, on the device, with the dtype and in the mode of the ConvNeXt. Its ``pretrained_cfg`` says what the
        ConvNeXt's does of inputs and licence.

    Raises:
        ValueError: If it is no ConvNeXt, or one that cannot be grown; the message says why.
    """
    source = timm.create_model(model, pretrained=True) if isinstance(model, str) else model
    if not isinstance(source, ConvNeXt):
        raise ValueError(f"model must be one of timm's ConvNeXts or the name of one, got a {type(source).__name__}.")
    state = source.state_dict()
    with_linear_layers(state)
    reductions = [info['reduction'] for info in source.feature_info]
    if reductions != [4, 8, 16, 32]:
        raise ValueError(f'The ConvNeXt cannot be grown: it is dilated, its stages reduce the image by {reductions}.')
    epsilons = {module.eps for module in source.modules() if isinstance(module, nn.LayerNorm)}
    if len(epsilons) != 1:
        raise ValueError(f'The ConvNeXt cannot be grown: its norms differ in their epsilon, {sorted(epsilons)}.')
    depths, dims = (tuple(sizes) for sizes in (map(len, _blocks(source)), (i['num_chs'] for i in source.feature_info)))
    cfg = dict(getattr(source, 'pretrained_cfg', None) or {})
    name = next(
        (name for name, variant in SHIFTWISE.items()
         if 'sw_convnext' in name and (variant['depths'], variant['dims']) == (depths, dims)), _SMALLEST)
    block, parameter = cast(Any, _blocks(source)[0][0]), source.stem[0].weight
    act_layer = type(block.mlp.act)
    network = timm.create_model(name, **{
        'depths': depths,
        'dims': dims,
        'num_classes': source.num_classes,
        'in_chans': source.in_chans,
        'norm_eps': epsilons.pop(),
        'act_layer': next((act for act in ('gelu', 'gelu_tanh') if get_act_layer(act) is act_layer), act_layer),
        'global_pool': source.head.global_pool.pool_type,
        'drop_rate': source.drop_rate,
        'device': parameter.device,
        'dtype': parameter.dtype,
        **({'ls_init_value': None} if block.gamma is None else {}),
        **kwargs,
    })
    network.load_state_dict(state)
    told = {**filter_pretrained_cfg(cfg, remove_source=True), 'architecture': name}
    vars(network).update(pretrained_cfg=told, default_cfg=told)
    if cfg.get('license') not in (None, _USUAL_LICENSE):
        origin = '.'.join(filter(None, (cfg.get('architecture'), cfg.get('tag'))))
        warnings.warn(
            f'The weights of {origin} are under the licence {cfg["license"]!r}, and so are those grown from them.',
            stacklevel=2)
    return network.train(source.training)


def _blocks(source: ConvNeXt) -> list[nn.Sequential]:
    return [cast(Any, stage).blocks for stage in source.stages]

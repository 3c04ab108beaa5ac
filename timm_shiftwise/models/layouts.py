"""Layouts of checkpoints: what weights are wrapped in, other names translated to ours, and the order of channels.

In the authors' layout, SLaK's and that of both generations of Shift-ConvNets, ``downsample_layers.0`` is the stem and
``stages.i.j`` a block, whose ``large_kernel`` is the operator. SLaK's holds ``LoRA1`` (tall), ``LoRA2`` (wide) and
``small_conv``; a shift-wise one ``LoRAs.p`` (paths, or ``LoRA`` once they are merged), ``bn_lora1`` (horizontal),
``bn_lora2`` (vertical) and ``bn_small`` (identity). Version 0.1 of this package had other names within the operators.
timm's ConvNeXt differs from our networks in the operators alone (``grow.py``).

An operator puts out the channels it worked on, then its ghosts. Our stages keep their channels in this order, the
*stream's*; in the *released* order, that of the authors and of version 0.1, ghosts lie among the others. So a
checkpoint in the released order is permuted where a stage's channels are written or read; the operators' own tensors
and those between an operator and a block's last layer have one order in all layouts.
"""
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from timm_shiftwise.layers import LargeKernelConv2d, MergedConv2d, MergedShiftConv2d, ShiftwiseConv2d
from timm_shiftwise.layers.wiring import stream_order

OWN, VERSION_0_1, AUTHORS, CONVNEXT = 'own', 'version 0.1', 'authors', 'convnext'
"""Layouts of checkpoints."""

Operator = ShiftwiseConv2d | MergedConv2d | MergedShiftConv2d
"""Operators that can have ghosts."""

MERGED_PATHS = 'merged_paths'
"""Stands in place of an operator's ``kernels`` where its paths were merged: [1, C, G, N, N] for any paths."""

_WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
_PREFIXES = ('module.', '_orig_mod.')

# tried in order; \1 is the block
_BLOCK = [
    (r'large_kernel\.LoRA1\.conv\.', r'\1.conv_dw.conv_v.'),
    (r'large_kernel\.LoRA1\.bn\.', r'\1.conv_dw.norm_v.'),
    (r'large_kernel\.LoRA2\.conv\.', r'\1.conv_dw.conv_h.'),
    (r'large_kernel\.LoRA2\.bn\.', r'\1.conv_dw.norm_h.'),
    (r'large_kernel\.small_conv\.conv\.', r'\1.conv_dw.conv_i.'),
    (r'large_kernel\.small_conv\.bn\.', r'\1.conv_dw.norm_i.'),
    (r'large_kernel\.bn_lora1\.', r'\1.conv_dw.norm_h.'),
    (r'large_kernel\.bn_lora2\.', r'\1.conv_dw.norm_v.'),
    (r'large_kernel\.bn_small\.', r'\1.conv_dw.norm_i.'),
    (r'pwconv1\.(?:1\.)?(weight|bias)$', r'\1.mlp.fc1.\2'),
    (r'pwconv2\.(?:0\.)?(weight|bias)$', r'\1.mlp.fc2.\2'),
    (r'pwconv2\.2\.', r'\1.norm_mlp.'),
    (r'act\.1\.gamma$', r'\1.mlp.grn.weight'),
    (r'act\.1\.beta$', r'\1.mlp.grn.bias'),
    (r'se\.down\.', r'\1.se.fc1.'),
    (r'se\.up\.', r'\1.se.fc2.'),
    (r'norm\.', r'\1.norm.'),
    (r'gamma$', r'\1.gamma'),
]
_RULES = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r'^downsample_layers\.0\.(\d+)\.', r'stem.\1.'),
    (r'^downsample_layers\.(\d+)\.(\d+)\.', r'stages.\1.downsample.\2.'),
    (r'^norm\.', r'head.norm.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
    *((rf'^(stages\.\d+\.blocks\.\d+)\.{pattern}', replacement) for pattern, replacement in _BLOCK),
]]
_BLOCK_NAME = re.compile(r'^stages\.(\d+)\.(\d+)\.')
_PATH = re.compile(r'^stages\.(\d+)\.(\d+)\.large_kernel\.(?:LoRAs\.(\d+)|LoRA)\.weight$')

# tensors of an operator of version 0.1 that ours do not have by these names, trained or merged
_OF_VERSION_0_1 = re.compile(
    r'(?:^|\.)conv_dw\.(?:weight|mask|kept|ghost|horizontal|vertical|identity|geometry|scale_[hvi]|bias|tall|wide)$')
_OPERATOR_TENSOR = re.compile(r'^(.*\bconv_dw)\.(\w+)$')


def _with_one_channel(kernel: Tensor) -> Tensor | None:
    return kernel.unsqueeze(1) if kernel.ndim == 3 else None  # [C, rows, columns] -> [C, 1, rows, columns]


def _joined_wiring(horizontal: Tensor, vertical: Tensor, identity: Tensor) -> Tensor | None:
    if horizontal.ndim != 3 or horizontal.shape != vertical.shape or horizontal.shape[:2] != identity.shape:
        return None
    return torch.cat([horizontal, vertical, identity.unsqueeze(2)], dim=2)  # [R, C, 2 * G + 1]


def _joined_factors(*factors: Tensor) -> Tensor | None:
    return torch.stack(factors) if len({factor.shape for factor in factors}) == 1 else None  # [4, C]


# in this order: names of version 0.1, ours, and what makes one of the others, None if they do not go together
_JOINED: list[tuple[tuple[str, ...], str, Callable[..., Tensor | None]]] = [
    (('weight',), 'kernels', lambda weight: weight),
    (('mask',), 'group_mask', lambda mask: mask),
    (('geometry',), 'built_for', lambda geometry: geometry),
    (('horizontal', 'vertical', 'identity'), 'wiring', _joined_wiring),
    (('scale_h', 'scale_v', 'scale_i', 'bias'), 'factors', _joined_factors),
    (('tall',), 'tall.weight', _with_one_channel),
    (('wide',), 'wide.weight', _with_one_channel),
    (('bias',), 'tall.bias', lambda bias: bias),
]

# what writes or reads a stage's channels, and for each axis whose: 0 its own stage's, -1 those of the one before
_BLOCK_AND_HEAD = [
    (r'stages\.\d+\.blocks\.\d+\.(?:mlp\.fc2|norm_mlp)\.', {0: 0}),
    (r'stages\.\d+\.blocks\.\d+\.gamma$', {0: 0}),
    (r'head\.norm\.', {0: 0}),
    (r'head\.fc\.(?!bias$)', {1: 0}),
]
_PERMUTED = {
    generation: [(re.compile(pattern), axes) for pattern, axes in rows + _BLOCK_AND_HEAD]
    for generation, rows in {
        'v1': [
            (r'stem\.[01]\.', {0: 0}),
            (r'stages\.\d+\.downsample\.0\.', {0: -1}),
            (r'stages\.\d+\.downsample\.1\.', {0: 0, 1: -1}),
        ],
        'v2': [
            (r'stem\.[34]\.', {0: 0}),
            (r'stages\.\d+\.downsample\.0\.', {0: 0, 1: -1}),
            (r'stages\.\d+\.downsample\.1\.', {0: 0}),
        ],
    }.items()
}
_KNOWN_LEAVES = ('', 'weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')

_Features = TypeVar('_Features', Tensor, list[Tensor], tuple[Tensor, ...])


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint is none of these networks', or does not fit the one it is loaded into.

    It is a RuntimeError, too, as what PyTorch raises from ``load_state_dict``.
    """


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint: without what they were saved under, and without the prefixes of wrappers.

    Raises:
        CheckpointError: If something else than tensors is among them, or one that would be larger than what it was read
            from.
    """
    for key in _WRAPPERS:
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    state = {}
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f'The checkpoint is no state dict: under {key!r} it has a {type(value).__name__}.')
        if _is_inflated(value):
            raise CheckpointError(f'The checkpoint holds less than the shape of {key} says, {tuple(value.shape)}.')
        while key.startswith(_PREFIXES):
            key = key.split('.', 1)[1]
        state[key] = value
    return state


def _is_inflated(value: Tensor) -> bool:
    """Whether elements of a plain tensor share memory, or are not stored one by one."""
    if type(value) is not Tensor and type(value) is not nn.Parameter:
        return False
    if value.layout != torch.strided or value.is_quantized:
        return True
    return value.numel() * value.element_size() > value.untyped_storage().nbytes()


def layout_of(names: Collection[str]) -> str:
    """Whose layout a state dict with these names is in: a single one that only one layout has tells it."""
    if any(name.startswith('downsample_layers.') or '.large_kernel.' in name for name in names):
        return AUTHORS
    told = {name.rpartition('.')[2] for name in filter(_OF_VERSION_0_1.search, names)}
    # timm's ConvNeXt has a convolution by the name of our operators
    return CONVNEXT if told == {'weight', 'bias'} else VERSION_0_1 if told else OWN


def translate_authors_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename keys to ours, gather the paths of each operator, and recover which groups were pruned.

    Args:
        state: A state dict in the authors' layout, without wrappers and prefixes.

    Returns:
        A state dict in our layout, except that it lacks the index tables, which the authors' checkpoints do not hold,
        and has ``MERGED_PATHS`` in place of ``kernels`` where the paths were merged. Channels stay in the released
        order. What cannot be translated keeps its own name.
    """
    out: dict[str, Tensor] = {}
    paths: dict[str, dict[int | None, str]] = {}
    for key, value in state.items():
        path = _PATH.match(key)
        if path:
            operator = f'stages.{path[1]}.blocks.{path[2]}.conv_dw'
            paths.setdefault(operator, {})[int(path[3]) if path[3] else None] = key
            continue
        new = _renamed(key)
        if new.endswith(('.grn.weight', '.grn.bias')):
            value = value.flatten()  # [1, 1, 1, 4 * C] -> [4 * C]
        out[key if new in out else new] = value
    for operator, keys in paths.items():
        weight = _gathered(state, keys, out.get(f'{operator}.norm_h.weight'))
        if weight is None:
            out.update((key, state[key]) for key in keys.values())
            continue
        out[f'{operator}.{MERGED_PATHS if None in keys else "kernels"}'] = weight
        mask = kept_groups(weight)
        out[f'{operator}.group_mask'] = mask.any(0) if None in keys else mask  # of merged paths one for all
    return out


def rename_version_0_1(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of operators of version 0.1 to ours, and drop the tables of channels.

    Args:
        state: A state dict in version 0.1's layout.

    Returns:
        A state dict in our layout, channels in the released order. Merged operators are as
        :class:`timm_shiftwise.layers.MergedShiftConv2d` names them or, SLaK's, as
        :class:`timm_shiftwise.layers.MergedConv2d` does. What cannot be translated keeps its own name.
    """
    out: dict[str, Tensor] = {}
    operators: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = _OPERATOR_TENSOR.match(key)
        if match:
            operators.setdefault(match[1], {})[match[2]] = value
        else:
            out[key] = value
    for operator, held in operators.items():
        held.pop('kept', None)
        held.pop('ghost', None)
        for names, new, join in _JOINED:
            joined = join(*(held[name] for name in names)) if held.keys() >= set(names) else None
            if joined is not None:
                held = {**{name: value for name, value in held.items() if name not in names}, new: joined}
        kernels = held.get('kernels')
        if 'factors' in held and kernels is not None and kernels.ndim == 4:
            held['group_mask'] = kept_groups(kernels)
        out.update((f'{operator}.{name}', value) for name, value in held.items())
    return out


def kept_groups(weight: Tensor) -> Tensor:
    """Which small kernels are not exactly zero: [..., N, N] to bool [...]."""
    return (weight != 0).any(dim=-1).any(dim=-1)


def _renamed(key: str) -> str:
    key = _BLOCK_NAME.sub(r'stages.\1.blocks.\2.', key)
    for pattern, replacement in _RULES:
        new, count = pattern.subn(replacement, key)
        if count:
            return new
    return key


def _gathered(state: dict[str, Tensor], keys: dict[int | None, str], norm: Tensor | None) -> Tensor | None:
    """Kernels [P, C, G, N, N] of the paths [C * G, 1, N, N]; None if these do not go together."""
    numbers = [None] if None in keys else list(range(len(keys)))
    weights = [state[keys[number]] for number in numbers if number in keys]
    if norm is None or norm.ndim != 1 or len(weights) < len(keys):
        return None
    if any(weight.shape != weights[0].shape or weight.ndim != 4 for weight in weights):
        return None
    rows, one = weights[0].shape[:2]
    if one != 1 or rows == 0 or norm.shape[0] == 0 or rows % norm.shape[0]:
        return None
    return torch.stack(weights).squeeze(2).unflatten(1, (norm.shape[0], -1))


# --- the order of channels ------------------------------------------------------------------------------------------

def stream_orders(operators: Mapping[str, Operator]) -> dict[int, Tensor]:
    """The order of each stage's channels: element i is the released place of channel i.

    Args:
        operators: Operators of a network by their names in it.
    """
    return {
        _stage_of(name): stream_order(operator.dim, operator.ghost_ratio, operator.ghost_split)
        for name, operator in operators.items()
    }


def told_orders(state: Mapping[str, Tensor], operators: Mapping[str, Operator]) -> tuple[dict[int, Tensor], list[str]]:
    """The order of each stage's channels as the tables of a checkpoint of version 0.1 tell it.

    Args:
        state: The checkpoint, in version 0.1's layout.
        operators: Operators of the network by their names in it. Stages of which the checkpoint has no tables have the
            network's order.

    Returns:
        The orders, and what is wrong with the first table that is.
    """
    orders, told = stream_orders(operators), dict[int, str]()
    for name, operator in operators.items():
        tables = [state[f'{name}.{table}'] for table in ('kept', 'ghost') if f'{name}.{table}' in state]
        if not tables or any(table.is_meta for table in tables):
            continue
        both, stage = [channel for table in tables for channel in table.flatten().tolist()], _stage_of(name)
        worked = operator.dim - operator.num_ghost
        if len(tables) < 2 or len(tables[0].flatten()) != worked or not _is_permutation(both, operator.dim):
            return orders, [
                f'{name}.kept and {name}.ghost do not name each of {worked} channels to work on and '
                f'{operator.num_ghost} ghosts once']
        if stage in told and both != orders[stage].tolist():
            return orders, [f'{name}.kept names other channels than {told[stage]}.kept']
        orders[stage] = torch.tensor(both, dtype=torch.int64, device='cpu')
        told[stage] = name
    return orders, []


def is_reordered(orders: Mapping[int, Tensor]) -> bool:
    """Whether the order of any stage is another than the released one."""
    return any(order.tolist() != list(range(len(order))) for order in orders.values())


def to_stream_order(
        state: Mapping[str, Tensor], orders: Mapping[int, Tensor],
        generation: str) -> tuple[dict[str, Tensor], list[str]]:
    """Bring the tensors that write or read a stage's channels from the released order into the stream's.

    Args:
        state: Weights with our names. Those whose shape does not fit the orders are left as they are.
        orders: The order of each stage's channels.
        generation: ``'v1'`` or ``'v2'``: which stem and downsampling the network has.

    Returns:
        The weights, and which of them have names that do not tell what their axes are.
    """
    out, problems = dict(state), list[str]()
    if not is_reordered(orders):
        return out, problems
    for key, value in state.items():
        for pattern, axes in _PERMUTED[generation]:
            match = pattern.match(key)
            if match:
                if key[match.end():] not in _KNOWN_LEAVES:
                    problems.append(f'{key} may be in another order of channels, which its name does not tell')
                stage = _stage_of(key, last=max(orders))
                out[key] = _permuted(value, {axis: orders.get(stage + offset) for axis, offset in axes.items()})
    return out, problems


def holds_stream(state: Mapping[str, Any], generation: str) -> bool:
    """Whether any tensor of a network writes or reads a stage's channels."""
    return any(pattern.match(key) for key in state for pattern, _ in _PERMUTED[generation])


def released_channel_order(features: _Features, model: nn.Module) -> _Features:
    """Bring features of a network into the released order of channels.

    What was trained on the features of the authors' networks, or of version 0.1's, expects them so.

    Args:
        features: A feature map [B, D, H, W] or a pooled embedding [B, D], or a list or tuple of them.
        model: The network they are of, merged or not, or what ``features_only`` or another wrapper made of it.

    Returns:
        The same, channels in the released order.

    Raises:
        ValueError: If a feature has another shape, or no stage of the network has so many channels.
    """
    orders = _orders_by_width(model)

    def released(feature: Tensor) -> Tensor:
        if not isinstance(feature, Tensor) or feature.ndim not in (2, 4) or feature.shape[1] not in orders:
            seen = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
            raise ValueError(
                f'features must be [B, D, H, W] or [B, D] with D among {sorted(orders)}, the widths of the '
                f"network's stages, got {seen}.")
        return feature.index_select(1, orders[feature.shape[1]].argsort().to(feature.device))

    if isinstance(features, (list, tuple)):
        return type(features)(map(released, features))
    return released(features)


def _orders_by_width(model: nn.Module) -> dict[int, Tensor]:
    orders = {}
    for module in model.modules():
        if isinstance(module, Operator):
            orders[module.dim] = stream_order(module.dim, module.ghost_ratio, module.ghost_split)
        elif isinstance(module, LargeKernelConv2d):
            orders[module.conv_h.in_channels] = torch.arange(module.conv_h.in_channels)
    return orders


def _stage_of(key: str, last: int = 0) -> int:
    """The stage that a tensor belongs to: the stem to the first, the head to the last."""
    part, number = key.split('.')[:2]
    return int(number) if part == 'stages' else {'stem': 0, 'head': last}[part]


def _is_permutation(values: list[Any], count: int) -> bool:
    return not any(isinstance(value, complex) for value in values) and sorted(values) == list(range(count))


def _permuted(value: Tensor, orders: Mapping[int, Tensor | None]) -> Tensor:
    """Take the elements along each axis in the order given, where one is and the axis has as many."""
    for axis, order in orders.items():
        if order is not None and value.ndim > axis and value.shape[axis] == len(order):
            value = value.detach().index_select(axis, order.to(value.device))
    return value

"""Layouts of checkpoints: what weights are wrapped in, and the authors' names for them translated to ours.

In the authors' layout, SLaK's and that of both generations of Shift-ConvNets, ``downsample_layers.0`` is the stem and
``stages.i.j`` a block, whose ``large_kernel`` is the operator. SLaK's holds ``LoRA1`` (tall), ``LoRA2`` (wide) and
``small_conv``; a shift-wise one ``LoRAs.p`` (paths, or ``LoRA`` once they are merged), ``bn_lora1`` (horizontal),
``bn_lora2`` (vertical) and ``bn_small`` (identity).
"""
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

MERGED_PATHS = 'merged_paths'
"""Stands in place of an operator's ``weight`` where its paths were merged: kernels [1, C, G, N, N] for any paths."""

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


def is_authors_layout(state: dict[str, Tensor]) -> bool:
    """Whether any key is one that only the authors' checkpoints have."""
    return any(key.startswith('downsample_layers.') or '.large_kernel.' in key for key in state)


def translate_authors_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename keys to ours, gather the paths of each operator, and recover which groups were pruned.

    Args:
        state: A state dict in the authors' layout, without wrappers and prefixes.

    Returns:
        A state dict in our layout, except that it lacks the index tables, which the authors' checkpoints do not hold,
        and has ``MERGED_PATHS`` in place of ``weight`` where the paths were merged. What cannot be translated keeps its
        own name.
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
        out[f'{operator}.{MERGED_PATHS if None in keys else "weight"}'] = weight
        out[f'{operator}.mask'] = kept_groups(weight)
    return out


def kept_groups(weight: Tensor) -> Tensor:
    """Which groups are not exactly zero on all paths: [P, C, K, N, N] to bool [C, K]."""
    return (weight != 0).any(dim=-1).any(dim=-1).any(dim=0)


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

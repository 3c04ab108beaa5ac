"""Reading checkpoints: our own layout passes through, the authors' is translated, and what does not fit is refused.

The layout of SLaK's and the Shift-ConvNets authors' checkpoints: ``downsample_layers.0`` is the stem, ``stages.i.j`` the blocks,
``large_kernel`` the operator with ``LoRA1`` (tall), ``LoRA2`` (wide) and ``small_conv``, or with ``LoRAs.p`` (paths) and
``bn_lora1`` (horizontal), ``bn_lora2`` (vertical) and ``bn_small`` (identity).
"""
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_shiftwise.geometry import num_groups
from timm_shiftwise.layers import ShiftwiseConv2d

_WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
_PREFIXES = ('module.', '_orig_mod.')
_CLASSIFIER = 'head.fc.'
_FIRST_CONV = 'stem.0.weight'
_MAX_LISTED = 5

# what the authors call it -> what we call it; the first pattern that matches a key is used
_RENAMED = [
    (r'^downsample_layers\.0\.(\d+)\.', r'stem.\1.'),
    (r'^downsample_layers\.(\d+)\.(\d+)\.', r'stages.\1.downsample.\2.'),
    (r'^norm\.', 'head.norm.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
    (r'^(stages\.\d+)\.(\d+)\.large_kernel\.LoRA1\.conv\.', r'\1.blocks.\2.conv_dw.conv_v.'),
    (r'^(stages\.\d+)\.(\d+)\.large_kernel\.LoRA1\.bn\.', r'\1.blocks.\2.conv_dw.norm_v.'),
    (r'^(stages\.\d+)\.(\d+)\.large_kernel\.LoRA2\.conv\.', r'\1.blocks.\2.conv_dw.conv_h.'),
    (r'^(stages\.\d+)\.(\d+)\.large_kernel\.LoRA2\.bn\.', r'\1.blocks.\2.conv_dw.norm_h.'),
    (r'^(stages\.\d+)\.(\d+)\.large_kernel\.small_conv\.conv\.', r'\1.blocks.\2.conv_dw.conv_i.'),
    (r'^(stages\.\d+)\.(\d+)\.large_kernel\.small_conv\.bn\.', r'\1.blocks.\2.conv_dw.norm_i.'),
    (r'^(stages\.\d+)\.(\d+)\.large_kernel\.bn_lora1\.', r'\1.blocks.\2.conv_dw.norm_h.'),
    (r'^(stages\.\d+)\.(\d+)\.large_kernel\.bn_lora2\.', r'\1.blocks.\2.conv_dw.norm_v.'),
    (r'^(stages\.\d+)\.(\d+)\.large_kernel\.bn_small\.', r'\1.blocks.\2.conv_dw.norm_i.'),
    (r'^(stages\.\d+)\.(\d+)\.large_kernel\.LoRAs\.', r'\1.blocks.\2.conv_dw.paths.'),
    (r'^(stages\.\d+)\.(\d+)\.pwconv1\.', r'\1.blocks.\2.mlp.fc1.'),
    (r'^(stages\.\d+)\.(\d+)\.pwconv2\.', r'\1.blocks.\2.mlp.fc2.'),
    (r'^(stages\.\d+)\.(\d+)\.(gamma|norm)', r'\1.blocks.\2.\3'),
]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Translate a checkpoint to the model's own layout.

    Takes our own checkpoints (unchanged), SLaK's (into ``slak_*``, and cut into small kernels for ``eq_slak_*``) and the
    Shift-ConvNets authors' v1 (into ``sw_*``; the wiring is the model's, groups that are exactly zero on all paths are
    pruned ones).

    Args:
        state_dict: A state dict, bare or under ``model``, ``model_ema``, ``state_dict`` or ``state_dict_ema``.
        model: The model that the weights are for.

    Returns:
        A state dict for ``model.load_state_dict``. The classifier and the first convolution's input channels are left as
        they are: timm adapts both.

    Raises:
        ValueError: If keys are missing or left over, or a shape differs; the message names the first few, and the arguments
            of ``timm.create_model`` that would fit.
    """
    state = _unwrapped(state_dict)
    if any(key.startswith('downsample_layers.') for key in state):
        state = _translated(state, model)
    if any(key.endswith('.conv_dw.conv_h.weight') for key in state):
        operators = {
            name: module for name, module in model.named_modules()
            if isinstance(module, ShiftwiseConv2d) and module.operator == 'eq_slak'
        }
        if operators:
            _check_same_network(state, model)
            state = _cut_large_kernels(state, operators)
    _check_fit(state, model)
    return state


def _unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    state = {}
    for key, value in state_dict.items():
        while key.startswith(_PREFIXES):
            key = key.split('.', 1)[1]
        state[key] = value
    return state


def _translated(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the authors' keys, gather the paths, and add the buffers that their checkpoints do not hold."""
    out: dict[str, Tensor] = {}
    paths: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        for pattern, replacement in _RENAMED:
            new, count = re.subn(pattern, replacement, key)
            if count:
                break
        else:
            new = key
        path = re.fullmatch(r'(.*\.conv_dw)\.paths\.(\d+)\.weight', new)
        if path:
            paths.setdefault(path[1], {})[int(path[2])] = value
        else:
            out[new] = value
    for name, weights in paths.items():
        channels = out[f'{name}.norm_h.weight'].shape[0]
        stacked = torch.stack([weights[p] for p in sorted(weights)])  # [P, C * G, 1, N, N]
        weight = stacked.squeeze(2).unflatten(1, (channels, -1))  # [P, C, G, N, N]
        out[f'{name}.weight'] = weight
        out[f'{name}.mask'] = (weight != 0).any(dim=-1).any(dim=-1).any(dim=0)
    for name, module in model.named_modules():
        if isinstance(module, ShiftwiseConv2d):
            for buffer, value in module.named_buffers(recurse=False):
                out.setdefault(f'{name}.{buffer}', value)
    return out


def _cut_large_kernels(state: dict[str, Tensor], operators: dict[str, ShiftwiseConv2d]) -> dict[str, Tensor]:
    """Cut every wide and tall kernel into G square pieces (Shift-ConvNets, Eq. 1-3), zero past the focus length."""
    out = dict(state)
    for name, operator in operators.items():
        size = operator.kernel_size
        wide = out.pop(f'{name}.conv_h.weight').squeeze(1)  # [C, N, M]
        tall = out.pop(f'{name}.conv_v.weight').squeeze(1)  # [C, M, N]
        square = out.pop(f'{name}.conv_i.weight')  # [C, 1, N, N]
        pieces = torch.cat([
            _cut_columns(wide, size),
            _cut_columns(tall.transpose(1, 2), size).transpose(2, 3),
            square,
        ], dim=1)
        out[f'{name}.weight'] = pieces.unsqueeze(0)  # [1, C, 2 * G + 1, N, N]
        for buffer, value in operator.named_buffers(recurse=False):
            out.setdefault(f'{name}.{buffer}', value)
    return out


def _cut_columns(kernel: Tensor, size: int) -> Tensor:
    """Cut [C, N, M] into [C, G, N, N]."""
    groups = num_groups(kernel.shape[2], size)
    kernel = F.pad(kernel, (0, groups * size - kernel.shape[2]))
    return kernel.unflatten(2, (groups, size)).transpose(1, 2)


def _check_fit(state: dict[str, Tensor], model: nn.Module) -> None:
    own = model.state_dict()
    problems = []
    for key, value in own.items():
        if key.startswith(_CLASSIFIER) or key.endswith('num_batches_tracked'):
            continue
        if key not in state:
            problems.append(f'{key} is missing')
        else:
            skip = 2 if key == _FIRST_CONV else 0
            seen, wanted = list(state[key].shape), list(value.shape)
            if seen[:1] + seen[skip:] != wanted[:1] + wanted[skip:]:
                problems.append(f'{key} has the shape {tuple(seen)}, the model {tuple(wanted)}')
    problems += [
        f'{key} is left over' for key in state
        if key not in own and not key.startswith(_CLASSIFIER) and not key.endswith('num_batches_tracked')
    ]
    if problems:
        _refuse(problems, state, own)


def _check_same_network(state: dict[str, Tensor], model: nn.Module) -> None:
    """Compare a SLaK state, before it is cut, with what an ``eq_slak_*`` model stands for."""
    operators = [m for m in model.modules() if isinstance(m, ShiftwiseConv2d)]
    names = [key for key in state if key.endswith('.conv_dw.conv_h.weight')]
    problems = [f'{len(names)} large kernels, the model {len(operators)} operators'] * (len(names) != len(operators))
    for name, operator in zip(names, operators, strict=False):
        wanted = (len(operator.kept), 1, operator.kernel_size, operator.focus_length)
        if tuple(state[name].shape) != wanted:
            problems.append(f'{name} has the shape {tuple(state[name].shape)}, the model stands for {wanted}')
    if problems:
        _refuse(problems, state, model.state_dict(), tuple(o.focus_length for o in operators))


def _refuse(
        problems: list[str],
        state: dict[str, Tensor],
        own: dict[str, Tensor],
        focus_lengths: tuple[int, ...] = (),
) -> None:
    listed = '\n  '.join(problems[:_MAX_LISTED])
    more = f'\n  and {len(problems) - _MAX_LISTED} more' if len(problems) > _MAX_LISTED else ''
    seen, wanted = _describe(state), _describe(own)
    hints = [
        f'{name}={value!r} (the model has {wanted[name]!r})'
        for name, value in seen.items() if name in wanted and value != wanted[name]
    ]
    if focus_lengths and 'focus_lengths' in seen:
        hints.append(f'focus_lengths={seen["focus_lengths"]!r}')
    advice = f'\nArguments of timm.create_model that the checkpoint asks for: {"; ".join(hints)}.' if hints else ''
    raise ValueError(f'The checkpoint does not fit the model:\n  {listed}{more}{advice}')


def _describe(state: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of a network that its state's keys and shapes tell."""
    depths: dict[int, int] = {}
    for key in state:
        block = re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', key)
        if block:
            depths[int(block[1])] = max(depths.get(int(block[1]), 0), int(block[2]) + 1)
    first = [f'stages.{i}.blocks.0' for i in sorted(depths)]
    found: dict[str, Any] = {'depths': tuple(depths[i] for i in sorted(depths))}

    def shapes(suffix: str, axis: int) -> tuple[int, ...] | None:
        if all(name + suffix in state for name in first):
            return tuple(state[name + suffix].shape[axis] for name in first)
        return None

    for argument, suffix, axis in (
            ('dims', '.norm.weight', 0),
            ('focus_lengths', '.conv_dw.conv_h.weight', -1),
            ('groups of each stage', '.conv_dw.horizontal', -1),
    ):
        values = shapes(suffix, axis)
        if values is not None:
            found[argument] = values
    for argument, suffix, axis in (
            ('kernel_size', '.conv_dw.weight', -1),
            ('kernel_size', '.conv_dw.conv_i.weight', -1),
            ('num_paths', '.conv_dw.weight', 0),
            ('num_shuffles', '.conv_dw.horizontal', 0),
    ):
        values = shapes(suffix, axis)
        if values:
            found[argument] = values[0]
    if 'dims' in found and shapes('.conv_dw.norm_h.weight', 0):
        worked = shapes('.conv_dw.norm_h.weight', 0) or ()
        found['ghost_ratio'] = round(1 - worked[0] / found['dims'][0], 2)
    return found

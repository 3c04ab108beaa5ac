"""Loading checkpoints: our own layout passes through, the authors' is translated, and what does not fit is refused.

Everything is checked before anything is copied, so a checkpoint that is refused leaves the model as it was.
"""
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from timm_shiftwise.geometry import num_groups, small_padding
from timm_shiftwise.layers import ShiftwiseConv2d
from timm_shiftwise.layers.wiring import separate_wiring, shuffled_wiring, split_ghost
from timm_shiftwise.sparsity import keep_masks

from .description import describe_checkpoint
from .layouts import MERGED_PATHS, CheckpointError, is_authors_layout, kept_groups, translate_authors_layout, unwrap

__all__ = ['CheckpointError', 'checkpoint_filter_fn', 'describe_checkpoint']

_CLASSIFIER = 'head.fc.'
_FIRST_CONV = 'stem.0.weight'
_COUNTER = '.num_batches_tracked'
_TABLES = ('horizontal', 'vertical', 'identity')
_UNWRAPPED = ('stages.', 'head.', 'sparsity.')  # of which a wrapper for features may have no part
_MAX_LISTED = 5


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Translate a checkpoint to the model's own layout.

    Takes our own checkpoints (unchanged), SLaK's (into ``slak_*``, and cut into small kernels for ``eq_slak_*``) and
    the Shift-ConvNets authors' (into ``sw_*``, ``sw_v2_*`` and ``p_sw_tiny``). These hold no wiring, which follows from
    its seed; groups that are exactly zero on all paths are pruned ones, and training on leaves them pruned. Where the
    authors merged the paths, the first path gets the kernels and the others zeros.

    Args:
        state_dict: A state dict, bare or under ``model``, ``model_ema``, ``state_dict`` or ``state_dict_ema``.
        model: The model that the weights are for.

    Returns:
        A state dict for ``model.load_state_dict``. The classifier and the first convolution's input channels are left
        as they are: timm adapts both.

    Raises:
        CheckpointError: If keys are missing or left over, a shape differs, or a table holds what is no index; the
            message names the first few, and the call of ``timm.create_model`` that would fit. It is a ValueError.
    """
    raw, own = unwrap(state_dict), model.state_dict()
    state, problems = _in_own_layout(raw, model, own)
    problems += [
        problem for key, problem in _misfits(state, own, adapted=(_FIRST_CONV,)) if not key.startswith(_CLASSIFIER)]
    _refuse(problems, raw, own)
    return state


def fitting(state_dict: Mapping[str, Any], model: nn.Module, strict: bool) -> Mapping[str, Any]:
    """What a network can load without an error: the checkpoint itself if it is in the network's layout.

    Args:
        state_dict: A state dict in our layout or the authors'.
        model: The network.
        strict: Whether keys may neither be missing nor left over. In a translated checkpoint only the classifier's may.

    Returns:
        A state dict in the network's layout.

    Raises:
        CheckpointError: As :func:`checkpoint_filter_fn`, input channels and, if ``strict``, the classifier included.
    """
    raw, own = unwrap(state_dict), model.state_dict()
    state, problems = _in_own_layout(raw, model, own)
    problems += [
        problem for key, problem in _misfits(state, own)
        if strict or (key in state and key in own) or (state is not raw and not key.startswith(_CLASSIFIER))
    ]
    _refuse(problems, raw, own)
    counters = {key: value for key, value in own.items() if key.endswith(_COUNTER) and key not in state}
    if counters and strict:
        return {**state, **counters}
    return state_dict if state.keys() == state_dict.keys() and state is raw else state


def translate_within(state_dict: dict[str, Any], prefix: str, model: nn.Module) -> None:
    """Translate, in place, the part of a wrapper's state dict that is a network's, if it is in the authors' layout.

    Args:
        state_dict: State dict of a module that holds the network, such as DistributedDataParallel.
        prefix: What the network's keys begin with.
        model: The network.

    Raises:
        CheckpointError: As :func:`checkpoint_filter_fn`, input channels included.
    """
    raw = _below(state_dict, prefix)
    if not is_authors_layout(raw):
        return
    own = model.state_dict()
    state, problems = _in_own_layout(raw, model, own)
    problems += [problem for key, problem in _misfits(state, own) if not key.startswith(_CLASSIFIER)]
    _refuse(problems, raw, own)
    for key in raw:
        del state_dict[prefix + key]
    state_dict.update((prefix + key, value) for key, value in state.items())


def load_into_features(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args) -> None:
    """Hook before a load: lets timm's ``features_only`` wrapper take a checkpoint of the whole network.

    The wrapper holds the network's parts under names of its own; the head and later stages are left out.

    Args:
        module: The wrapper.
        state_dict: What is loaded; changed in place.
        prefix: What the wrapper's keys begin with.
        args: The hook's further arguments, of no use here.

    Raises:
        CheckpointError: As :func:`checkpoint_filter_fn`, input channels included.
    """
    raw = _below(state_dict, prefix)
    wrapped = module.state_dict()
    if not wrapped.keys().isdisjoint(raw):
        return
    names = {_network_name(key): key for key in wrapped}
    own = {name: wrapped[key] for name, key in names.items()}
    state, problems = _in_own_layout(raw, module, own)
    parts = {_part(name) for name in names}
    state = {
        key: value for key, value in state.items()
        if _part(key) in parts or not key.startswith(_UNWRAPPED)
    }
    problems += [problem for _, problem in _misfits(state, own)]
    _refuse(problems, raw, own)
    for key in raw:
        del state_dict[prefix + key]
    state_dict.update((prefix + names[key], value) for key, value in state.items())


def _below(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix):]: value for key, value in state_dict.items() if key.startswith(prefix)}


def _network_name(name: str) -> str:
    """A name in the network of what a ``features_only`` wrapper, or the network itself, calls by the name given."""
    return re.sub(r'^(?:model\.|body\.)?(?:(stem|stages)_(?=\d))?', lambda m: f'{m[1]}.' if m[1] else '', name)


def _part(key: str) -> str:
    """The part of the network, as wrappers take them, that a key belongs to: ``stages.0`` for all of that stage."""
    return '.'.join(key.split('.')[:2])


def _in_own_layout(
        raw: dict[str, Tensor],
        model: nn.Module,
        own: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[str]]:
    """Translate to the layout of a network, and add what another layout does not hold.

    Args:
        raw: Unwrapped weights.
        model: The network, or a ``features_only`` wrapper.
        own: The network's own state, by its names.

    Returns:
        The state, ``raw`` itself if it is in our layout and no average, and what is wrong with kernels that had to be
        cut.
    """
    operators = {
        _network_name(name): module for name, module in model.named_modules() if isinstance(module, ShiftwiseConv2d)}
    if is_authors_layout(raw):
        state = translate_authors_layout(raw)
    elif any(f'{name}.conv_h.weight' in raw for name, operator in operators.items() if operator.operator == 'eq_slak'):
        state = dict(raw)
    else:
        return _as_integers(raw, own), []
    problems = []
    for name, operator in operators.items():
        merged = state.pop(f'{name}.{MERGED_PATHS}', None)
        if merged is not None:
            state[f'{name}.weight'] = _on_first_path(merged, operator)
        elif operator.operator == 'eq_slak' and f'{name}.weight' not in state:
            problems += _cut_large_kernels(state, name, operator)
        state.update((f'{name}.{key}', table) for key, table in _released_tables(operator).items())
    # what else there is keeps its value
    kept = {
        _network_name(f'{name}.{key}' if name else key)
        for name, module in model.named_modules() if not isinstance(module, _NormBase)
        for key, _ in module.named_buffers(recurse=False)
    }
    for key, value in own.items():
        if key in kept or key.endswith(_COUNTER):
            state.setdefault(key, torch.zeros_like(value, device='cpu') if value.is_meta else value)
    return {_network_name(key): value for key, value in keep_masks(state, model).items()}, problems


def _as_integers(raw: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks, tables and counters as the network has them, where they were averaged together with the weights.

    timm's avg_checkpoints.py does so, and saves float32. A group that any of the averaged networks keeps is kept: in
    the others its weights are zero. Tables that differ average to no integers, and stay as they are.

    Args:
        raw: Weights in our layout.
        own: The network's own state.

    Returns:
        The weights, ``raw`` itself if there was nothing to do.
    """
    changed = {}
    for key, value in raw.items():
        if key in own and not own[key].is_floating_point() and value.is_floating_point() and not value.is_meta:
            up = value.ceil()
            if torch.equal(up, value) or key.rpartition('.')[2] not in (*_TABLES, 'kept', 'ghost', 'geometry'):
                changed[key] = up.to(own[key].dtype)
    return {**raw, **changed} if changed else raw


def _released_tables(operator: ShiftwiseConv2d) -> dict[str, Tensor]:
    """Index tables that follow from the released seed, and the geometry they are for."""
    dim = len(operator.kept) + operator.num_ghost
    kept, ghost = split_ghost(dim, operator.ghost_ratio, operator.ghost_split)
    size = len(kept), operator.focus_length, operator.kernel_size
    if operator.operator == 'eq_slak':
        wiring = separate_wiring(*size)
    else:
        wiring = shuffled_wiring(*size, operator.horizontal.shape[0], natural_horizontal=operator.operator == 'p_sw')
    pad = small_padding(operator.kernel_size, operator.padding)
    return dict(
        kept=kept,
        ghost=ghost,
        horizontal=wiring.horizontal,
        vertical=wiring.vertical,
        identity=wiring.identity,
        geometry=torch.tensor((operator.focus_length, operator.kernel_size, pad), dtype=torch.int32),
    )


def _on_first_path(weight: Tensor, operator: ShiftwiseConv2d) -> Tensor:
    """Merged kernels [1, C, G, N, N] as one of P paths whose others are zero."""
    return F.pad(weight, (0, 0) * 4 + (0, operator.weight.shape[0] - 1))


def _cut_large_kernels(state: dict[str, Tensor], name: str, operator: ShiftwiseConv2d) -> list[str]:
    """Cut a wide and a tall kernel into G square pieces each (Shift-ConvNets, Eq. 1-3), zero past the focus length.

    Args:
        state: Weights of a SLaK network, in our layout; changed in place.
        name: The operator's name.
        operator: The operator that stands for the kernels.

    Returns:
        What is wrong with the kernels; if anything is, the operator's own weight stands in.
    """
    length, size, channels = operator.focus_length, operator.kernel_size, len(operator.kept)
    sides = {'conv_h': (size, length), 'conv_v': (length, size), 'conv_i': (size, size)}
    kernels, problems = [], []
    for conv, (rows, columns) in sides.items():
        key, wanted = f'{name}.{conv}.weight', (channels, 1, rows, columns)
        kernel = state.pop(key, None)
        if kernel is None:
            problems.append(f'{key} is missing')
        elif tuple(kernel.shape) != wanted:
            problems.append(f'{key} has the shape {tuple(kernel.shape)}, the model stands for {wanted}')
        else:
            kernels.append(kernel.squeeze(1))
    if problems:
        state[f'{name}.weight'] = operator.weight.detach()
        return problems
    wide, tall, square = kernels
    pieces = torch.cat([_cut_columns(wide, size), _cut_columns(tall.mT, size).mT, square[:, None]], dim=1)[None]
    state[f'{name}.weight'] = _on_first_path(pieces, operator)  # [P, C, 2 * G + 1, N, N]
    state[f'{name}.mask'] = kept_groups(pieces)
    return []


def _cut_columns(kernel: Tensor, size: int) -> Tensor:
    """Cut [C, N, M] into [C, G, N, N]."""
    groups = num_groups(kernel.shape[2], size)
    kernel = F.pad(kernel, (0, groups * size - kernel.shape[2]))
    return kernel.unflatten(2, (groups, size)).transpose(1, 2)


def _misfits(
        state: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        adapted: Iterable[str] = (),
) -> list[tuple[str, str]]:
    """Keys that do not fit, each with what is wrong: first those the model has, in its order, then those left over.

    Args:
        state: Weights with the model's names.
        own: The model's own.
        adapted: Keys of weights whose second axis may differ.
    """
    found = []
    for key, wanted in own.items():
        if key not in state:
            if not key.endswith(_COUNTER):  # BatchNorm starts a counter of its own
                found.append((key, f'{key} is missing'))
            continue
        seen, model = tuple(state[key].shape), tuple(wanted.shape)
        if key in adapted and len(seen) == len(model):
            seen, model = (seen[0], *seen[2:]), (model[0], *model[2:])
        if seen != model:
            found.append((key, f'{key} has the shape {tuple(state[key].shape)}, the model {tuple(wanted.shape)}'))
        elif not state[key].is_meta:
            problem = _wrong_values(key, state, own)
            if problem:
                found.append((key, problem))
    return found + [(key, f'{key} is left over') for key in state if key not in own and not key.endswith(_COUNTER)]


def _wrong_values(key: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What is wrong with the values of a table of an operator; empty if nothing. Kernels read memory by these."""
    name, _, buffer = key.rpartition('.')
    if not name.endswith('.conv_dw'):
        return ''
    value = state[key]
    if buffer == 'geometry' and not own[key].is_meta and value.tolist() != own[key].tolist():
        return (
            f'{key}: the checkpoint was made for (focus length, kernel size, padding) {tuple(value.tolist())}, '
            f'the model is {tuple(own[key].tolist())}')
    if buffer in _TABLES:
        maps = own[f'{name}.weight'].shape[-3]
        if value.is_floating_point() or value.is_complex() or value.min() < 0 or value.max() >= maps:
            return f'{key} must hold integers of 0 to {maps - 1}, it has others'
    if buffer == 'kept' and f'{name}.ghost' in state:
        both = value.flatten().tolist() + state[f'{name}.ghost'].flatten().tolist()
        if any(isinstance(channel, complex) for channel in both) or sorted(both) != list(range(len(both))):
            return f'{key} and {name}.ghost do not name every channel once'
    return ''


def _refuse(problems: list[str], raw: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    if not problems:
        return
    listed = '\n  '.join(problems[:_MAX_LISTED])
    more = f'\n  and {len(problems) - _MAX_LISTED} more' if len(problems) > _MAX_LISTED else ''
    # what can be adapted is not at fault unless it is among the problems
    adapted = {
        name for name, key in (('num_classes', _CLASSIFIER), ('in_chans', _FIRST_CONV))
        if not any(problem.startswith(key) for problem in problems)
    }
    raise CheckpointError(f'The checkpoint does not fit the model:\n  {listed}{more}{_advice(raw, own, adapted)}')


def _advice(raw: dict[str, Tensor], own: Mapping[str, Tensor], untold: set[str]) -> str:
    """The call of ``timm.create_model`` whose network a checkpoint is for, if it is another than the model's.

    Args:
        raw: Unwrapped weights.
        own: The model's own.
        untold: Arguments that stay as the model has them.
    """
    try:
        wanted, seen = describe_checkpoint(own), describe_checkpoint(raw)
    except CheckpointError:
        return ''
    model, args = seen['model'], dict(seen['model_args'])
    if (seen['family'], wanted['family']) == ('slak', 'eq_slak'):
        model = f'eq_{model}'
    if 'head.norm.weight' not in own:
        wanted['model_args'].pop('num_classes')  # features of a network with or without a classifier
    open_lengths = ''
    untold = untold | {*seen['assumed'], *seen['unknown']}
    if any(key.endswith('.large_kernel.LoRA.weight') for key in raw):
        untold = untold | {'num_paths'}
    if 'focus_lengths' in untold and seen['groups'] != wanted['groups']:
        untold = untold - {'focus_lengths'}
        if 'focus_lengths' in seen['unknown']:
            open_lengths = f' and focus_lengths that make {seen["groups"]} groups of its kernels'
    for name in untold:
        args.pop(name, None)
    args.update((name, value) for name, value in wanted['model_args'].items() if name in untold)
    if (model, args) == (wanted['model'], wanted['model_args']):
        return ''
    call = ', '.join([repr(model), *(f'{name}={value!r}' for name, value in args.items())])
    return f'\nIts keys and shapes are those of timm.create_model({call}){open_lengths}.'

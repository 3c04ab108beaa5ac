"""Loading checkpoints: our own layout passes through, others are translated, and what does not fit is refused.

Others are the authors', that of version 0.1, and that of timm's ConvNeXts. Everything is checked before anything is
copied, so a checkpoint that is refused leaves the model as it was.
"""
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from timm_shiftwise.layers import MergedConv2d, ShiftwiseConv2d
from timm_shiftwise.layers.shiftwise_conv import of_each_path
from timm_shiftwise.sparsity import keep_masks, wrong_state

from .description import describe_checkpoint
from .grow import grow_state, refuse_original
from .layouts import (
    AUTHORS,
    CONVNEXT,
    MERGED_PATHS,
    OWN,
    VERSION_0_1,
    CheckpointError,
    Operator,
    holds_stream,
    is_reordered,
    layout_of,
    rename_version_0_1,
    stream_orders,
    to_stream_order,
    told_orders,
    translate_authors_layout,
    unwrap,
)
from .recast import cut_large_kernels, merge_small_kernels, on_first_path
from .resumed import refuse_state_of_old_order

__all__ = ['CheckpointError', 'checkpoint_filter_fn', 'describe_checkpoint']

_CLASSIFIER = 'head.fc.'
_FIRST_CONV = 'stem.0.weight'
_COUNTER = '.num_batches_tracked'
_UNWRAPPED = ('stages.', 'head.', 'sparsity.')  # of which a wrapper for features may have no part
_SAME_NETWORK = re.compile(r'(?:module\.|_orig_mod\.)*')  # prefixes of wrappers that add nothing behind the network
_MAX_LISTED = 5


class _Translation(NamedTuple):
    """A checkpoint in the network's layout.

    Attributes:
        state: The weights, by the network's names.
        problems: What is wrong with them beyond names, shapes and values of single tensors.
        is_whole: Whether nothing but a classifier may be missing or left over, whatever is asked for.
        is_reordered: Whether channels were brought into another order.
    """
    state: dict[str, Tensor]
    problems: list[str]
    is_whole: bool = False
    is_reordered: bool = False


def checkpoint_filter_fn(
        state_dict: Mapping[str, Any], model: nn.Module, features_only: bool = False) -> dict[str, Tensor]:
    """Translate a checkpoint to the model's own layout.

    Takes our own checkpoints (unchanged), those of version 0.1, SLaK's (into ``slak_*``, and cut into small kernels for
    ``eq_slak_*``), the Shift-ConvNets authors' (into ``sw_*``, ``sw_v2_*`` and ``p_sw_tiny``) and those of timm's
    ConvNeXts (into ``sw_convnext_*``, which they are grown to). The authors' hold no wiring, which follows from its
    seed; small kernels of a path that are exactly zero are pruned ones, and training on leaves them pruned. Where the
    authors merged the paths, the first path gets the kernels and the others zeros, and all keep the same groups. So
    they do where a mask is one for all paths, as in version 0.1.

    Args:
        state_dict: A state dict, bare or under ``model``, ``model_ema``, ``state_dict`` or ``state_dict_ema``.
        model: The model that the weights are for.
        features_only: Whether the model's feature maps are what it is for: a warning says so if their channels come in
            another order than the checkpoint's.

    Returns:
        A state dict for ``model.load_state_dict``. The classifier and the first convolution's input channels are left
        as they are: timm adapts both.

    Raises:
        CheckpointError: If keys are missing or left over, a shape differs, or a table holds what is no index; the
            message names the first few, and the call of ``timm.create_model`` that would fit. It is a ValueError.
    """
    raw, own = unwrap(state_dict), model.state_dict()
    found = _in_own_layout(raw, model, own)
    problems = [
        problem for key, problem in _misfits(found.state, own, _operators(model), adapted=(_FIRST_CONV,))
        if not key.startswith(_CLASSIFIER)]
    _refuse(found.problems + problems, raw, own)
    _tell_order(found, model, shows_features=features_only or _has_no_classifier(own))
    return found.state


def fitting(state_dict: Mapping[str, Any], model: nn.Module, strict: bool) -> Mapping[str, Any]:
    """What a network can load without an error: the checkpoint itself if it is in the network's layout.

    Args:
        state_dict: A state dict in our layout, version 0.1's or the authors'.
        model: The network.
        strict: Whether keys may neither be missing nor left over. In a checkpoint of the authors only the classifier's
            may.

    Returns:
        A state dict in the network's layout.

    Raises:
        CheckpointError: As :func:`checkpoint_filter_fn`, input channels and, if ``strict``, the classifier included.
    """
    raw, own = unwrap(state_dict), model.state_dict()
    found = _in_own_layout(raw, model, own)
    state = found.state
    problems = [
        problem for key, problem in _misfits(state, own, _operators(model))
        if strict or (key in state and key in own) or (found.is_whole and not key.startswith(_CLASSIFIER))
    ]
    _refuse(found.problems + problems, raw, own)
    _tell_order(found, model, shows_features=_has_no_classifier(own))
    if not strict:
        _warn_of_untold_order(raw, model)
    counters = {key: value for key, value in own.items() if key.endswith(_COUNTER) and key not in state}
    if counters and strict:
        return {**state, **counters}
    return state_dict if state.keys() == state_dict.keys() and state is raw else state


def translate_within(state_dict: dict[str, Any], prefix: str, model: nn.Module) -> None:
    """Translate, in place, the part of a wrapper's state dict that is a network's, and check what can be checked.

    Args:
        state_dict: State dict of a module that holds the network, such as DistributedDataParallel.
        prefix: What the network's keys begin with.
        model: The network.

    Raises:
        CheckpointError: As :func:`checkpoint_filter_fn`, input channels included. What is missing in a checkpoint of
            ours, or left over, is PyTorch's to say.
    """
    raw = _below(state_dict, prefix)
    # no state_dict(), whose hooks could gather what is sharded
    own: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = _in_own_layout(raw, model, own)
    problems = [
        problem for key, problem in _misfits(found.state, own, _operators(model))
        if (key in found.state and key in own) or (found.is_whole and not key.startswith(_CLASSIFIER))
    ]
    _refuse(found.problems + problems, raw, own)
    for key in raw:
        del state_dict[prefix + key]
    state_dict.update((prefix + key, value) for key, value in found.state.items())
    inside = not _SAME_NETWORK.fullmatch(prefix)
    _tell_order(found, model, shows_features=inside or _has_no_classifier(own))


def load_into_features(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Hook before a load: lets timm's ``features_only`` wrapper take a checkpoint of the whole network.

    The wrapper holds the network's parts under names of its own; the head and later stages are left out. What such a
    wrapper saved is checked, too, and translated if it is of version 0.1.

    Args:
        module: The wrapper.
        state_dict: What is loaded; changed in place.
        prefix: What the wrapper's keys begin with.
        args: The hook's further arguments, of no use here.

    Raises:
        CheckpointError: As :func:`checkpoint_filter_fn`, input channels included. What is missing in what such a
            wrapper saved, or left over, is PyTorch's to say.
    """
    held, wrapped = _below(state_dict, prefix), module.state_dict()
    raw = {_network_name(key): value for key, value in held.items()}
    is_wrappers = not wrapped.keys().isdisjoint(held)
    names = {_network_name(key): key for key in wrapped}
    own = {name: wrapped[key] for name, key in names.items()}
    found = _in_own_layout(raw, module, own)
    parts = {_part(name) for name in names}
    state = {key: value for key, value in found.state.items() if _part(key) in parts or not key.startswith(_UNWRAPPED)}
    problems = [
        problem for key, problem in _misfits(state, own, _operators(module))
        if not is_wrappers or (key in state and key in own)]
    _refuse(found.problems + problems, raw, own)
    for key in held:
        del state_dict[prefix + key]
    state_dict.update((prefix + names.get(key, key), value) for key, value in state.items())
    _tell_order(found, module, shows_features=True)


def _below(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix):]: value for key, value in state_dict.items() if key.startswith(prefix)}


def _network_name(name: str) -> str:
    """A name in the network of what a ``features_only`` wrapper, or the network itself, calls by the name given."""
    return re.sub(r'^(?:model\.|body\.)?(?:(stem|stages)_(?=\d))?', lambda m: f'{m[1]}.' if m[1] else '', name)


def _part(key: str) -> str:
    """The part of the network, as wrappers take them, that a key belongs to: ``stages.0`` for all of that stage."""
    return '.'.join(key.split('.')[:2])


def _has_no_classifier(own: Mapping[str, Tensor]) -> bool:
    return f'{_CLASSIFIER}weight' not in own


def _tell_order(found: _Translation, module: nn.Module, shows_features: bool) -> None:
    """After weights were reordered: refuse an optimiser of their old order, and warn whoever reads features."""
    if not found.is_reordered:
        return
    refuse_state_of_old_order(module)
    if shows_features:
        warnings.warn(
            "The checkpoint has its channels in the released order, the network's features have them in another: "
            'whatever was trained on such features expects timm_shiftwise.released_channel_order(features, model).',
            stacklevel=3)


def _warn_of_untold_order(raw: dict[str, Tensor], model: nn.Module) -> None:
    """Warn of weights that write or read channels, but come without an operator, whose names tell the layout."""
    operators = _operators(model)
    if any('.conv_dw.' in key for key in raw) or not is_reordered(stream_orders(operators)):
        return
    if layout_of(raw) == OWN and holds_stream(raw, _generation(operators)):
        warnings.warn(
            'The checkpoint holds a part of a network without its operators, which does not tell the order of its '
            'channels: it is taken to be of this version. A part of a network of version 0.1 or of the authors would '
            'be loaded wrongly; load the whole.',
            stacklevel=3)


def _operators(model: nn.Module) -> dict[str, Operator]:
    return {_network_name(name): module for name, module in model.named_modules() if isinstance(module, Operator)}


def _generation(operators: Mapping[str, Operator]) -> str:
    """Which stem and downsampling a network has that has these operators."""
    return next((operator.ghost_split for operator in operators.values()), 'v1')


def _in_own_layout(raw: dict[str, Tensor], model: nn.Module, own: Mapping[str, Tensor]) -> _Translation:
    """Translate to the layout of a network, and add what another layout does not hold.

    Args:
        raw: Unwrapped weights.
        model: The network, or a ``features_only`` wrapper.
        own: The network's own state, by its names.

    Returns:
        The translation; its state is ``raw`` itself if that is in our layout, no average, and has a mask for each path.
    """
    operators = _operators(model)
    found = _translated(raw, model, own, operators)
    masks = {
        f'{name}.group_mask': len(operator.group_mask) for name, operator in operators.items()
        if isinstance(operator, ShiftwiseConv2d)
    }
    shared = {key: paths for key, paths in masks.items() if key in found.state and found.state[key].ndim == 2}
    if not shared:
        return found
    state = {**found.state, **{key: of_each_path(found.state[key], paths) for key, paths in shared.items()}}
    return found._replace(state=state)


def _translated(
        raw: dict[str, Tensor], model: nn.Module, own: Mapping[str, Tensor],
        operators: Mapping[str, Operator]) -> _Translation:
    layout = layout_of(raw)
    if layout == VERSION_0_1:
        return _from_version_0_1(raw, operators, own)
    if layout == CONVNEXT:
        state, problems = grow_state(raw, operators, own)
        return _Translation(state, problems, is_whole=True)
    if layout == AUTHORS:
        refuse_original(raw)
        orders = stream_orders(operators)
        state, problems = to_stream_order(translate_authors_layout(raw), orders, _generation(operators))
        problems += _complete(state, model, own)
        return _Translation(state, problems, is_whole=True, is_reordered=is_reordered(orders))
    if any(f'{name}.conv_h.weight' in raw for name, operator in operators.items() if operator.operator == 'eq_slak'):
        state = dict(raw)
        problems = _complete(state, model, own)
        return _Translation(state, problems, is_whole=True)
    return _Translation(_as_integers(raw, own), [])


def _complete(state: dict[str, Tensor], model: nn.Module, own: Mapping[str, Tensor]) -> list[str]:
    """Add what a checkpoint of large kernels or of the authors does not hold.

    Args:
        state: Weights with our names, in our order of channels; changed in place.
        model: The network, or a ``features_only`` wrapper.
        own: The network's own state, by its names.

    Returns:
        What is wrong with kernels that had to be cut.
    """
    problems = []
    for name, operator in _operators(model).items():
        if not isinstance(operator, ShiftwiseConv2d):
            continue
        merged = state.pop(f'{name}.{MERGED_PATHS}', None)
        if merged is not None:
            state[f'{name}.kernels'] = on_first_path(merged, operator)
        elif operator.operator == 'eq_slak' and f'{name}.kernels' not in state:
            problems += cut_large_kernels(state, name, operator)
        state.update((f'{name}.{key}', table) for key, table in operator.released_tables().items())
    # what else there is keeps its value
    kept = {
        _network_name(f'{name}.{key}' if name else key)
        for name, module in model.named_modules() if not isinstance(module, _NormBase)
        for key, _ in module.named_buffers(recurse=False)
    }
    for key, value in own.items():
        if key in kept or key.endswith(_COUNTER):
            state.setdefault(key, torch.zeros_like(value, device='cpu') if value.is_meta else value)
    state.update((_network_name(key), value) for key, value in keep_masks({}, model).items())
    return problems


def _from_version_0_1(
        raw: dict[str, Tensor], operators: Mapping[str, Operator], own: Mapping[str, Tensor]) -> _Translation:
    orders, problems = told_orders(raw, operators)
    state = _as_integers(rename_version_0_1(raw), own)
    for name, operator in operators.items():
        if isinstance(operator, MergedConv2d):
            problems += merge_small_kernels(state, name, operator)
    problems += [
        f'{key} does not go together with the other tensors of its operator'
        for key in state if layout_of([key]) == VERSION_0_1]
    state, untold = to_stream_order(state, orders, _generation(operators))
    return _Translation(state, problems + untold, is_reordered=is_reordered(orders))


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
            if value.isnan().any():
                continue  # which no integer stands for
            up = value.ceil()
            if torch.equal(up, value) or key.rpartition('.')[2] not in ('wiring', 'built_for'):
                changed[key] = up.to(own[key].dtype)
    return {**raw, **changed} if changed else raw


def _misfits(
        state: Mapping[str, Tensor], own: Mapping[str, Tensor], operators: Mapping[str, Operator],
        adapted: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Keys that do not fit, each with what is wrong: first those the model has, in its order, then those left over.

    Args:
        state: Weights with the model's names.
        own: The model's own.
        operators: Its operators by their names in it.
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
            continue
        operator = operators.get(key.rpartition('.')[0])
        problem = _wrong_values(key, state[key], wanted)
        if not problem and operator:
            problem = operator.wrong_table(key, state[key])
        if problem:
            found.append((key, problem))
    return found + [(key, f'{key} is left over') for key in state if key not in own and not key.endswith(_COUNTER)]


def _wrong_values(key: str, value: Tensor, wanted: Tensor) -> str:
    """What is wrong with the values of a tensor that is no table of an operator; empty if nothing."""
    if value.is_meta:
        return ''
    if value.is_complex() and not wanted.is_complex():
        return f'{key} is complex, the model real'
    if key.startswith('sparsity.'):
        return wrong_state(key, value)
    if value.is_floating_point() and value.numel() and math.isnan(value.min()):
        return f'{key} holds NaN: the run that it is from had diverged'
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

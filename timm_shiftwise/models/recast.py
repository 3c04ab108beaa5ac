"""Operators that a checkpoint holds in another form than the network: merged paths, large kernels, small kernels."""
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_shiftwise.geometry import num_groups
from timm_shiftwise.layers import MergedConv2d, ShiftwiseConv2d
from timm_shiftwise.layers.merged import merge_shiftwise
from timm_shiftwise.layers.wiring import num_maps

from .layouts import kept_groups

_NORM = ('weight', 'bias', 'running_mean', 'running_var')


def on_first_path(weight: Tensor, operator: ShiftwiseConv2d) -> Tensor:
    """Merged kernels [1, C, G, N, N] as one of P paths whose others are zero."""
    return F.pad(weight, (0, 0) * 4 + (0, operator.kernels.shape[0] - 1))


def cut_large_kernels(state: dict[str, Tensor], name: str, operator: ShiftwiseConv2d) -> list[str]:
    """Cut a wide and a tall kernel into G square pieces each (Shift-ConvNets, Eq. 1-3), zero past the focus length.

    Args:
        state: Weights of a SLaK network, in our layout; changed in place.
        name: The operator's name.
        operator: The operator that stands for the kernels.

    Returns:
        What is wrong with the kernels; if anything is, the operator's own kernels stand in.
    """
    length, size, channels = operator.focus_length, operator.kernel_size, operator.num_worked
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
        state[f'{name}.kernels'] = operator.kernels.detach()
        return problems
    wide, tall, square = kernels
    pieces = torch.cat([_cut_columns(wide, size), _cut_columns(tall.mT, size).mT, square[:, None]], dim=1)[None]
    state[f'{name}.kernels'] = on_first_path(pieces, operator)  # [P, C, 2 * G + 1, N, N]
    state[f'{name}.group_mask'] = kept_groups(pieces[0])
    return []


def _cut_columns(kernel: Tensor, size: int) -> Tensor:
    """Cut [C, N, M] into [C, G, N, N]."""
    groups = num_groups(kernel.shape[2], size)
    kernel = F.pad(kernel, (0, groups * size - kernel.shape[2]))
    return kernel.unflatten(2, (groups, size)).transpose(1, 2)


def merge_small_kernels(state: dict[str, Tensor], name: str, operator: MergedConv2d) -> list[str]:
    """Bring a merged operator of version 0.1, which was kept as small kernels, to a tall and a wide one.

    Version 2's BatchNorm behind the operator goes into them, too.

    Args:
        state: Weights of version 0.1 with our names; changed in place.
        name: The operator's name.
        operator: The operator that they are for.

    Returns:
        What is wrong with the weights; if anything is, they are left as they are.
    """
    if operator.operator == 'slak':
        if f'{name}.tall.weight' in state:
            state[f'{name}.built_for'] = operator.built_for  # in version 0.1 the shapes alone told it
        return []
    if f'{name}.factors' not in state:
        return []  # it is no merged operator: what is missing will be told
    norm = f'{name.removesuffix("conv_dw")}norm'
    problems = _unfit_to_merge(state, name, norm, operator)
    if problems:
        return problems
    kernels, wiring = state.pop(f'{name}.kernels').double(), state.pop(f'{name}.wiring')
    wide, tall, centre, bias = state.pop(f'{name}.factors').double().unbind(0)
    merged = MergedConv2d(
        operator.dim,
        operator.focus_length,
        operator.kernel_size,
        operator=operator.operator,
        ghost_ratio=operator.ghost_ratio,
        ghost_split=operator.ghost_split,
        device=kernels.device,
        dtype=torch.float64,
    )
    merge_shiftwise(merged, kernels, wiring, (wide, tall, centre), bias)
    if operator.ghost_split == 'v2':
        behind = nn.BatchNorm2d(operator.dim, device=kernels.device, dtype=torch.float64)
        behind.load_state_dict({part: state.pop(f'{norm}.{part}') for part in _NORM}, strict=False)
        state.pop(f'{norm}.num_batches_tracked', None)
        merged.fold_norm(behind)
    for key, value in merged.named_parameters():
        state[f'{name}.{key}'] = value.detach().to(operator.get_parameter(key).dtype)
    return []


def _unfit_to_merge(state: Mapping[str, Tensor], name: str, norm: str, operator: MergedConv2d) -> list[str]:
    """What is wrong with the parts of a merged operator of version 0.1, its BatchNorm included where there is one."""
    channels, maps = operator.group_mask.shape
    size, places = operator.kernel_size, num_maps('eq_slak', operator.focus_length, operator.kernel_size)
    wiring = state.get(f'{name}.wiring')
    shuffles = 1 if wiring is None or wiring.ndim != 3 else max(len(wiring), 1)
    wanted: dict[str, tuple[int, ...]] = {
        f'{name}.kernels': (channels, maps, size, size),
        f'{name}.factors': (4, channels),
        f'{name}.wiring': (shuffles, channels, places),
    }
    if operator.ghost_split == 'v2':
        wanted.update((f'{norm}.{part}', (operator.dim,)) for part in _NORM)
    problems = []
    for key, shape in wanted.items():
        if key not in state:
            problems.append(f'{key} is missing')
        elif tuple(state[key].shape) != shape:
            problems.append(f'{key} has the shape {tuple(state[key].shape)}, the model stands for {shape}')
    return problems or list(filter(None, [wrong_wiring(f'{name}.wiring', state[f'{name}.wiring'], maps)]))


def wrong_wiring(key: str, value: Tensor, maps: int) -> str:
    """What is wrong with a table of K = ``maps`` small kernels; empty if nothing. Kernels read memory by it."""
    if value.is_meta:
        return ''
    if value.is_floating_point() or value.is_complex() or value.min() < 0 or value.max() >= maps:
        return f'{key} must hold integers of 0 to {maps - 1}, it has others'
    return ''

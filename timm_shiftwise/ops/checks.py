"""What operators check of their arguments before a kernel reads or writes anything.

Dtypes, devices and shapes are checked wherever a call is seen, by a compiler too. The values of tables, which say where
kernels read, are looked at in the operators' bodies alone: at every call, because a table can be written to between any
two and no counter of PyTorch's tells all such writes.
"""
import numpy as np
import torch
from torch import Tensor

from timm_shiftwise.geometry import check_geometry, num_groups

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_UNSIGNED = {torch.int32: np.uint32, torch.int64: np.uint64}


def check_dtype(name: str, tensor: Tensor) -> None:
    """Refuse a dtype that no kernel computes in.

    Raises:
        TypeError: If it is none of float64, float32, float16 and bfloat16.
    """
    if tensor.dtype not in _DTYPES:
        raise TypeError(f'{name} must be one of {", ".join(map(str, _DTYPES))}, got {tensor.dtype}.')


def is_empty(*sizes: int) -> bool:
    """Whether any size is below 1; looking for the smallest, a compiler would take note of which of them that is."""
    return any(size < 1 for size in sizes)


def check_together(tensors: dict[str, Tensor | None], dtypes: bool = False, shapes: bool = False) -> None:
    """Refuse tensors that are not on one device, of one dtype, of one shape, as the first of them is.

    Args:
        tensors: Tensors by their names; those that are None are left out.
        dtypes: Whether dtypes must agree.
        shapes: Whether shapes must agree.

    Raises:
        TypeError: If dtypes differ.
        ValueError: If devices or shapes differ.
    """
    (first, like), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.device != like.device:
            raise ValueError(f'{first} and {name} must be on one device, got {like.device} and {tensor.device}.')
        if dtypes and tensor.dtype != like.dtype:
            raise TypeError(f'{first} and {name} must have one dtype, got {like.dtype} and {tensor.dtype}.')
        if shapes and tensor.shape != like.shape:
            raise ValueError(
                f'{first} and {name} must have one shape, got {tuple(like.shape)} and {tuple(tensor.shape)}.')


def check_wiring(
        wiring: Tensor, focus_length: int, kernel_size: int, padding: str, channels: int | None = None) -> None:
    """Refuse what is no geometry, and a table that does not fit it, or C channels if they are given.

    Raises:
        TypeError: If it does not hold integers.
        ValueError: If its shape does not fit, or the geometry is none.
    """
    # a compiler may have put symbols in the place of the numbers
    focus_length, kernel_size = int(focus_length), int(kernel_size)
    check_geometry(focus_length, kernel_size, padding)
    if wiring.dtype not in _UNSIGNED:
        raise TypeError(f'wiring must be int32 or int64, got {wiring.dtype}.')
    groups = num_groups(focus_length, kernel_size)
    shape = tuple(wiring.shape)
    fits = len(shape) == 3 and not is_empty(*shape) and shape[2] == 2 * groups + 1 and channels in (None, shape[1])
    if not fits:
        wanted = f'[R, {"C" if channels is None else channels}, {2 * groups + 1}]'
        raise ValueError(
            f'wiring must have the shape {wanted} with R and C of at least 1 (focus length {focus_length} and kernel '
            f'size {kernel_size} make {groups} groups), got {shape}.')


def check_indices(wiring: Tensor, maps: int) -> None:
    """Refuse a table, checked by :func:`check_wiring`, that names a map or kernel that is not there.

    On CUDA nobody waits for the answer: a wrong table ends the process's work on the device by an assertion, before any
    later kernel reads.

    Args:
        wiring: Map index at every place, [R, C, 2 * G + 1].
        maps: K, maps a channel.

    Raises:
        ValueError: If an index is below 0 or above K - 1; the message says where.
    """
    if wiring.is_meta:
        return
    if wiring.device.type == 'cuda' and torch.version.cuda is not None:
        wiring.new_empty(1).expand(maps).index_select(0, wiring.flatten())  # CUDA checks what it gathers by
        return
    table = wiring.cpu().numpy()
    # as unsigned numbers negative ones are the largest of all: one reduction finds both
    if table.view(_UNSIGNED[wiring.dtype]).max() >= maps:
        raise ValueError(f'wiring must hold indices of 0 to {maps - 1}, {index_outside(table, maps)}.')


def index_outside(table: np.ndarray, count: int) -> str:
    """Where a table of integers first holds something else than 0 to ``count`` - 1, as a clause; empty if nowhere."""
    places = np.argwhere((table < 0) | (table >= count)).tolist()
    return f'got {table[tuple(places[0])]} at {places[0]}' if places else ''

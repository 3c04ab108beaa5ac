"""Tensors whose memory ends, or begins, at a page that nobody may touch."""
import ctypes
import math
import mmap
import sys

import torch
from torch import Tensor

GUARDS = (None, 'behind', 'before')


def place(values: Tensor, strides: list[int], offset: int, guard: str | None) -> Tensor:
    """The values in memory of their own, with the strides and the storage offset given, in elements.

    Args:
        values: What the tensor holds; where strides are 0, the first along that axis.
        strides: Of each axis, 0 or more.
        offset: Elements before the first.
        guard: None; or ``'behind'`` or ``'before'``, where reading past that end of the memory kills the process.
    """
    extent = 0 if values.numel() == 0 else 1 + sum(
        (size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    storage = _guarded(offset + extent, values.dtype, guard == 'behind') if guard else torch.zeros(
        offset + extent, dtype=values.dtype)
    tensor = storage.as_strided(values.shape, strides, offset)
    first = values
    for axis, stride in enumerate(strides):
        if stride == 0 and values.numel():
            first = first.narrow(axis, 0, 1)
    tensor.as_strided(first.shape, strides, offset).copy_(first)
    return tensor


def _guarded(elements: int, dtype: torch.dtype, behind: bool) -> Tensor:
    size = elements * dtype.itemsize
    if size == 0 or sys.platform == 'win32':
        return torch.zeros(elements, dtype=dtype)
    page = mmap.PAGESIZE
    pages = math.ceil(size / page) * page
    memory = mmap.mmap(-1, pages + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbidden = address + pages if behind else address
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0):
        raise OSError(ctypes.get_errno(), 'mprotect failed')
    return torch.frombuffer(memory, dtype=dtype, count=elements, offset=pages - size if behind else page)

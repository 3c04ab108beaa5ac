"""Shift-add: maps of small convolutions in, the large kernels' branches out."""
from .frontend import shift_add
from .torch_impl import shift_add_torch

__all__ = ['shift_add', 'shift_add_torch']

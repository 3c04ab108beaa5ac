"""Grouped shift-wise sparsity: which small kernels are kept, and how that changes while a network trains."""
from .schedule import SparsitySchedule

__all__ = ['SparsitySchedule']

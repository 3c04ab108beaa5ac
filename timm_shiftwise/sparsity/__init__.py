"""Grouped shift-wise sparsity: which small kernels are kept, and how that changes while a network trains."""
from .schedule import SparsitySchedule, keep_masks, wrong_state

__all__ = ['SparsitySchedule', 'keep_masks', 'wrong_state']

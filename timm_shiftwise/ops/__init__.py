"""The operators behind the networks: shift-add, and the small convolutions with their shift-add in one call."""
from .shift_add import shift_add
from .shiftwise_conv import shiftwise_conv2d

__all__ = ['shift_add', 'shiftwise_conv2d']

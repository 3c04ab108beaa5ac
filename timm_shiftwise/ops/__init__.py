"""The operators behind the networks: shift-add, and the small convolutions with their shift-add in one call."""
from .autocast import in_autocast_dtype
from .layout import contiguous_gradient
from .shift_add import shift_add
from .shiftwise_conv import shiftwise_conv2d

__all__ = ['contiguous_gradient', 'in_autocast_dtype', 'shift_add', 'shiftwise_conv2d']

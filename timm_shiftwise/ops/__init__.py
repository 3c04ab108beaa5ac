"""The operators behind the networks: shift-add, and the small convolutions with their shift-add in one call."""
from .autocast import in_autocast_dtype
from .channels import contiguous_gradient, split_channels
from .shift_add import shift_add
from .shiftwise_conv import inference_conv2d, shiftwise_conv2d

__all__ = [
    'contiguous_gradient', 'in_autocast_dtype', 'inference_conv2d', 'shift_add', 'shiftwise_conv2d', 'split_channels',
]

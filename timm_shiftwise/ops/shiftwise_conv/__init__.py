"""Small depthwise convolutions and their shift-add in one call."""
from .frontend import keep_groups, shiftwise_conv2d

__all__ = ['keep_groups', 'shiftwise_conv2d']

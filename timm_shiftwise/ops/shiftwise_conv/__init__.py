"""Small depthwise convolutions and their shift-add in one call."""
from .frontend import shiftwise_conv2d

__all__ = ['shiftwise_conv2d']

"""Small depthwise convolutions and their shift-add in one call."""
from .frontend import shiftwise_conv2d
from .inference import inference_conv2d

__all__ = ['inference_conv2d', 'shiftwise_conv2d']

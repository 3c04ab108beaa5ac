"""Depthwise convolutions with large kernels, and their gradients."""
from .frontend import large_kernel_gradients
from .toeplitz import tall_wide_conv2d
from .torch_impl import depthwise_conv2d, large_depthwise_conv2d

__all__ = ['depthwise_conv2d', 'large_depthwise_conv2d', 'large_kernel_gradients', 'tall_wide_conv2d']

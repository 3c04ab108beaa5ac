"""Layers: the shift-wise operator, its index tables, and the large kernel it stands in for."""
from .large_kernel import LargeKernelConv2d
from .merged import MergedLargeKernelConv2d, MergedShiftwiseConv2d
from .shiftwise_conv import ShiftwiseConv2d

__all__ = ['LargeKernelConv2d', 'MergedLargeKernelConv2d', 'MergedShiftwiseConv2d', 'ShiftwiseConv2d']

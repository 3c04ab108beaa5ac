"""Layers: the shift-wise operator, its wiring, the large kernel it stands in for, and what both merge to."""
from .large_kernel import LargeKernelConv2d
from .merged import MergedConv2d, MergedShiftConv2d
from .shiftwise_conv import ShiftwiseConv2d

__all__ = ['LargeKernelConv2d', 'MergedConv2d', 'MergedShiftConv2d', 'ShiftwiseConv2d']

"""How far a network sees: its effective receptive field, measured, and the reach that its kernels allow."""
from .effective import ReceptiveField, Square, erf, layer_scales, size_arguments
from .reach import convolved_size, exact_reach

__all__ = ['ReceptiveField', 'Square', 'convolved_size', 'erf', 'exact_reach', 'layer_scales', 'size_arguments']

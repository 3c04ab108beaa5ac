"""Networks, their entrypoints in timm's registry, and the reading of checkpoints."""
from .checkpoint import checkpoint_filter_fn
from .shiftwise import ShiftwiseNet

__all__ = ['ShiftwiseNet', 'checkpoint_filter_fn']

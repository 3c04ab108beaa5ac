"""Networks, their entrypoints in timm's registry, and the reading of checkpoints."""
from .checkpoint import checkpoint_filter_fn
from .shiftwise import ShiftwiseNet
from .shiftwise_v2 import ShiftwiseNetV2

__all__ = ['ShiftwiseNet', 'ShiftwiseNetV2', 'checkpoint_filter_fn']

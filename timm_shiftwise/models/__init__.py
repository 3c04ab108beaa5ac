"""Networks, their entrypoints in timm's registry, and the reading of checkpoints."""
from . import shiftwise_convnext
from .calibration import calibrate
from .checkpoint import CheckpointError, checkpoint_filter_fn, describe_checkpoint
from .grow import grow
from .layouts import released_channel_order
from .shiftwise import ShiftwiseNet
from .shiftwise_v2 import ShiftwiseNetV2

__all__ = [
    'CheckpointError', 'ShiftwiseNet', 'ShiftwiseNetV2', 'calibrate', 'checkpoint_filter_fn', 'describe_checkpoint',
    'grow', 'released_channel_order', 'shiftwise_convnext',
]

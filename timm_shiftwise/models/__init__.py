"""Networks, their entrypoints in timm's registry, and the reading of checkpoints."""
from .checkpoint import CheckpointError, checkpoint_filter_fn, describe_checkpoint
from .layouts import released_channel_order
from .shiftwise import ShiftwiseNet
from .shiftwise_v2 import ShiftwiseNetV2

__all__ = [
    'CheckpointError', 'ShiftwiseNet', 'ShiftwiseNetV2', 'checkpoint_filter_fn', 'describe_checkpoint',
    'released_channel_order',
]

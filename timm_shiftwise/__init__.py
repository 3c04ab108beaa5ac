"""Shift-wise ConvNets for timm: importing this package registers its models with timm's registry."""
from .models import ShiftwiseNet, ShiftwiseNetV2, calibrate, checkpoint_filter_fn, grow, released_channel_order
from .receptive_field import erf

__version__ = '0.2.0'

__all__ = [
    'ShiftwiseNet', 'ShiftwiseNetV2', 'calibrate', 'checkpoint_filter_fn', 'erf', 'grow', 'released_channel_order',
]

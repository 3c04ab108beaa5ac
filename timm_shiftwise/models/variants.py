"""Arguments of the registered networks: what the entrypoints build, and what an unknown checkpoint is compared with."""
from typing import Any

_TINY = dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))
_SMALL = dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768))
_BASE = dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024))
_LARGE = dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536))

_FOCUS = dict(focus_lengths=(51, 49, 47, 13))
_SW = dict(_FOCUS, kernel_size=5, operator='sw', ghost_ratio=0.23, num_paths=2, num_shuffles=4, sparsity=0.4)
_EXCHANGED_OFTEN = dict(prune_rate=0.3, prune_interval=100)  # as SLaK's small and base
_SLAK = dict(_FOCUS, kernel_size=5, operator='slak')
_EQ_SLAK = dict(_FOCUS, kernel_size=5, operator='eq_slak')
_P_SW = dict(_FOCUS, kernel_size=5, operator='p_sw')
_SW_CONVNEXT = dict(
    _FOCUS, kernel_size=7, operator='sw', num_shuffles=4, single_centre=True, centre_norm=False,
    sparsity_init='magnitude')


def _widened(size: dict[str, Any], factor: float = 1.3) -> dict[str, Any]:
    """SLaK's widening: channels times 1.3, each cut to an integer."""
    return dict(size, dims=tuple(int(dim * factor) for dim in size['dims']))


SHIFTWISE: dict[str, dict[str, Any]] = {
    'sw_tiny': dict(_SW, **_TINY),
    'sw_small': dict(_SW, **_SMALL, **_EXCHANGED_OFTEN),
    'sw_base': dict(_SW, **_BASE, **_EXCHANGED_OFTEN),
    'slak_tiny': dict(_SLAK, **_widened(_TINY)),
    'slak_small': dict(_SLAK, **_widened(_SMALL)),
    'slak_base': dict(_SLAK, **_widened(_BASE)),
    'eq_slak_tiny': dict(_EQ_SLAK, **_widened(_TINY)),
    'eq_slak_small': dict(_EQ_SLAK, **_widened(_SMALL)),
    'eq_slak_base': dict(_EQ_SLAK, **_widened(_BASE)),
    'p_sw_tiny': dict(_P_SW, **_TINY, padding='full'),
    'p2_sw_tiny': dict(_P_SW, **_TINY, padding='same'),
    'sw_convnext_tiny': dict(_SW_CONVNEXT, **_TINY),
    'sw_convnext_small': dict(_SW_CONVNEXT, **_SMALL),
    'sw_convnext_base': dict(_SW_CONVNEXT, **_BASE),
    'sw_convnext_large': dict(_SW_CONVNEXT, **_LARGE),
    'test_sw': dict(_SW, depths=(1, 1, 2, 1), dims=(12, 24, 36, 48), focus_lengths=(15, 13, 11, 7)),
    'test_sw_convnext': dict(
        _SW_CONVNEXT, depths=(1, 2, 4, 2), dims=(24, 32, 48, 64), focus_lengths=(23, 21, 19, 13), norm_eps=1e-5,
        act_layer='gelu_tanh'),
}
"""Networks of ``shiftwise.py`` and ``shiftwise_convnext.py``."""

_SW_V2 = dict(_SW, **_EXCHANGED_OFTEN, kernel_size=3, sparsity=0.3, mask_sharing_interval=131)

SHIFTWISE_V2: dict[str, dict[str, Any]] = {
    'sw_v2_tiny': dict(_SW_V2, depths=(3, 3, 18, 3), dims=(80, 160, 320, 640)),
    'sw_v2_small': dict(_SW_V2, **_SMALL),
    'sw_v2_base': dict(_SW_V2, **_BASE),
    'sw_v2_large': dict(_SW_V2, **_LARGE),
}
"""Networks of ``shiftwise_v2.py``."""

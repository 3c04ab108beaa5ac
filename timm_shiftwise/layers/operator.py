"""What all forms of an operator have in common: its geometry, its ghosts, and which groups it keeps."""
from typing import Any

import torch
from torch import Tensor, nn

from timm_shiftwise.geometry import check_geometry, small_padding

from .wiring import OPERATORS, num_maps, split_ghost


class Operator(nn.Module):
    """Depthwise operator with the reach of an M x N, an N x M and an N x N kernel.

    Args:
        dim: Number of channels in and out. The last ``num_ghost`` of them, the ghosts, pass through.
        focus_length: M, the long side of the large kernel in pixels.
        kernel_size: N, its short side and the side of the small kernels in pixels.
        operator: ``'sw'`` (branches share their small kernels, orders shuffled per channel, skip inside), ``'p_sw'``
            (shared, wide branch in natural order, no skip), ``'eq_slak'`` (kernels of their own, natural order, no
            skip) or ``'slak'`` (large kernels, no small ones).
        ghost_ratio: Share of channels that pass through.
        ghost_split: Rounding rule of that share, ``'v1'`` or ``'v2'``.
        padding: Padding policy of the small convolutions, ``'full'`` (N - 1, exact) or ``'same'`` (N // 2).
        large_map: Whether its maps are large. In an exported graph a merged operator's wide convolution then reads a
            padded map, which takes ONNX Runtime half the time: it is slow where a kernel reaches over the border.
        device: Device of the buffers.

    Raises:
        ValueError: If an argument is out of its range.
    """
    group_mask: Tensor
    built_for: Tensor

    def __init__(
            self, dim: int, focus_length: int, kernel_size: int, *, operator: str = 'sw', ghost_ratio: float = 0.,
            ghost_split: str = 'v1', padding: str = 'full', large_map: bool = False, device=None) -> None:
        super().__init__()
        check_geometry(focus_length, kernel_size, padding)
        if operator not in OPERATORS:
            raise ValueError(f'operator must be one of {OPERATORS}, got {operator!r}.')
        self.dim = dim
        self.focus_length = focus_length
        self.kernel_size = kernel_size
        self.operator = operator
        self.ghost_ratio = ghost_ratio
        self.ghost_split = ghost_split
        self.padding = padding
        self.large_map = large_map
        self.num_ghost = len(split_ghost(dim, ghost_ratio, ghost_split)[1])
        self.num_worked = dim - self.num_ghost
        self.num_maps = num_maps(operator, focus_length, kernel_size)
        if self.num_maps > 0:
            kept = torch.ones(self.num_worked, self.num_maps, dtype=torch.bool, device=device)
            self.register_buffer('group_mask', kept)  # bool [C, K]; [P, C, K] where the paths are apart
        # shapes alone do not tell M: a checkpoint says for which geometry its kernels were made
        self.register_buffer('built_for', self.geometry(device))

    def geometry(self, device=None) -> Tensor:
        """M, N and p, int32."""
        pad = small_padding(self.kernel_size, self.padding)
        return torch.tensor((self.focus_length, self.kernel_size, pad), dtype=torch.int32, device=device)

    def kept_groups(self) -> Tensor:
        """Small kernels of each channel that any path keeps, bool [C, K]: those that cost something."""
        return self.group_mask

    def settings(self) -> dict[str, Any]:
        """Arguments that build another form of the operator."""
        names = ('dim', 'focus_length', 'kernel_size', 'operator', 'ghost_ratio', 'ghost_split', 'large_map')
        return {name: getattr(self, name) for name in names}

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        errors, own = args[-1], self.built_for
        held = state_dict.get(f'{prefix}built_for')
        if held is not None and not held.is_meta and not own.is_meta and held.tolist() != own.tolist():
            errors.append(
                f'{prefix}built_for: the checkpoint was made for (focus length, kernel size, padding) '
                f'{tuple(held.tolist())}, the layer is {tuple(own.tolist())}.')
        if f'{prefix}geometry' in state_dict:
            errors.append(
                f'{prefix}geometry: an operator of version 0.1 expects another order of channels: load the whole '
                'network, which is translated.')
        super()._load_from_state_dict(state_dict, prefix, *args)

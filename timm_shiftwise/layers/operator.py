"""What all forms of an operator have in common: its geometry, its ghosts, and which groups it keeps."""
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from timm_shiftwise.geometry import check_geometry, small_padding

from .wiring import OPERATORS, num_maps, split_ghost, wrong_wiring


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
            ghost_split: str = 'v1', padding: str = 'full', large_map: bool = False, device: Device = None) -> None:
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

    def geometry(self, device: Device = None) -> Tensor:
        """M, N and p, int32."""
        pad = small_padding(self.kernel_size, self.padding)
        return torch.tensor((self.focus_length, self.kernel_size, pad), dtype=torch.int32, device=device)

    def kept_groups(self) -> Tensor:
        """Small kernels of each channel that any path keeps, bool [C, K]: those that cost something."""
        return self.group_mask

    def reset_parameters(self) -> None:
        """Set the tables to what they are in a new operator, and draw or clear what else it holds itself."""
        self.built_for.copy_(self.geometry('cpu'))
        if self.num_maps > 0:
            self.group_mask.fill_(True)

    def settings(self) -> dict[str, Any]:
        """Arguments that build another form of the operator."""
        names = ('dim', 'focus_length', 'kernel_size', 'operator', 'ghost_ratio', 'ghost_split', 'large_map')
        return {name: getattr(self, name) for name in names}

    def wrong_table(self, key: str, value: Any) -> str:
        """What is wrong with a table from elsewhere; empty if nothing.

        Args:
            key: What it is called: a name that ends with that of the operator's own table.
            value: The table; any other tensor is right.
        """
        name = key.rpartition('.')[2]
        own = self._buffers.get(name)
        if own is None:
            return ''
        if not isinstance(value, Tensor):
            return f'{key} must be a tensor, it is a {type(value).__name__}'
        if name == 'wiring':
            return wrong_wiring(key, value, tuple(own.shape), self.num_maps)
        if name == 'group_mask' and (value.dtype != torch.bool or value.shape != own.shape):
            return (
                f'{key} must be bool and have the shape {tuple(own.shape)}, it is {value.dtype} and has '
                f'{tuple(value.shape)}')
        geometry = self.geometry('cpu').tolist()
        if name == 'built_for' and not value.is_meta and value.tolist() != geometry:
            return (
                f'{key}: the checkpoint was made for (focus length, kernel size, padding) {value.tolist()}, the model '
                f'is {geometry}')
        return ''

    def wrong_tables(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """What is wrong with the tables that a state dict holds for the operator.

        Args:
            state_dict: Tensors of the operator, and maybe of others.
            prefix: What the operator's names begin with.
        """
        keys = [key for name in self._buffers if (key := f'{prefix}{name}') in state_dict]
        return list(filter(None, (self.wrong_table(key, state_dict[key]) for key in keys)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # whatever wraps the operator comes this way; raised, not noted, so that nothing of it is changed
        problems = self.wrong_tables(state_dict, prefix)
        if f'{prefix}geometry' in state_dict:
            problems.append(
                f'{prefix}geometry: an operator of version 0.1 expects another order of channels: load the whole '
                'network, which is translated')
        if problems:
            raise RuntimeError('\n'.join(f'{problem}.' for problem in problems))
        super()._load_from_state_dict(state_dict, prefix, *args)

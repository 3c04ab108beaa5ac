"""The shift-wise operator: small depthwise convolutions whose outputs are shifted and added.

Source: Shift-ConvNets (arXiv 2401.12736), Section 3.
"""
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import register_notrace_function
from torch import Tensor, nn
from torch.types import Device

from timm_shiftwise.ops import contiguous_gradient, in_autocast_dtype, shiftwise_conv2d

from .merged import MergedConv2d, MergedShiftConv2d, fold_batch_norm, merge_shiftwise
from .operator import Operator
from .wiring import released_wiring

# fx sees one node; what is inside chooses by device, backend and autocast
register_notrace_function(contiguous_gradient)
register_notrace_function(in_autocast_dtype)
register_notrace_function(shiftwise_conv2d)


class ShiftwiseConv2d(Operator):
    """Depthwise operator with the reach of an M x N, an N x M and an N x N kernel, made of N x N ones.

    Of the input's channels some (*ghosts*) pass through untouched; the others are convolved by P parallel *paths* of G
    small kernels, summed before anything non-linear, whose maps are shifted and added into a wide, a tall and
    a centre branch, each normalised by its own BatchNorm. The ghosts are the last channels, in and out. Each path keeps
    groups of its own, bool ``group_mask`` [P, C, K]; the others count as zero and get no gradient.

    Args:
        dim: Number of channels in and out.
        focus_length: M, the long side of the large kernel in pixels.
        kernel_size: N, the side of the small kernels in pixels.
        num_paths: P, parallel convolutions whose weights add up.
        num_shuffles: R, orders that are added up (1 for operator ``'eq_slak'``).
        single_centre: Let all orders put one and the same small kernel of a channel into the centre branch.
        centre_norm: Whether the centre branch has a BatchNorm.
        grow_init: What the BatchNorms of the wide and the tall branch are multiplied by where a depthwise convolution
            is grown to this operator; nothing in between.
        backend: ``'auto'``, ``'taichi'``, ``'torch'`` or None, see :func:`timm_shiftwise.ops.shift_add`.
        device: Device of parameters and buffers.
        dtype: Floating point type of parameters and BatchNorm statistics.
        settings: Further keywords of :class:`Operator`.

    Shape:
        - Input: [B, dim, H, W]
        - Output: [B, dim, H, W]

    Raises:
        ValueError: If an argument is out of its range.
    """
    wiring: Tensor

    def __init__(
            self, dim: int, focus_length: int, kernel_size: int = 5, *, num_paths: int = 1, num_shuffles: int = 1,
            single_centre: bool = False, centre_norm: bool = True, grow_init: float = 0., backend: str | None = None,
            device: Device = None, dtype: torch.dtype | None = None, **settings: Any) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__(dim, focus_length, kernel_size, device=device, **settings)
        if num_paths < 1:
            raise ValueError(f'num_paths must be at least 1, got {num_paths}.')
        self.backend = backend
        self.single_centre = single_centre
        self.grow_init = grow_init
        self.inner_skip = self.operator == 'sw'
        channels = self.num_worked
        wiring = released_wiring(
            self.operator, channels, focus_length, kernel_size, num_shuffles, single_centre)
        self.kernels = nn.Parameter(torch.empty(num_paths, channels, self.num_maps, kernel_size, kernel_size, **dd))
        self.group_mask = self.group_mask.repeat(num_paths, 1, 1)  # [P, C, K]
        self.norm_h = nn.BatchNorm2d(channels, **dd)
        self.norm_v = nn.BatchNorm2d(channels, **dd)
        self.norm_i = nn.BatchNorm2d(channels, **dd) if centre_norm else nn.Identity()
        self.register_buffer('wiring', torch.empty(wiring.shape, dtype=wiring.dtype, device=device))
        self.reset_parameters()

    def released_tables(self) -> dict[str, Tensor]:
        """What the released checkpoints do not hold because it follows from their seed, and the geometry it is for."""
        wiring = released_wiring(
            self.operator, self.num_worked, self.focus_length, self.kernel_size, self.wiring.shape[0],
            self.single_centre)
        return {'wiring': wiring, 'built_for': self.geometry('cpu')}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'ShiftwiseConv2d':
        # model.to(memory_format=torch.channels_last) would convert the five axes of the kernels, too, and fail
        return super()._apply(lambda t: fn(t[None])[0] if t.ndim == 5 else fn(t), recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f'{prefix}group_mask'
        if key in state_dict:
            state_dict[key] = of_each_path(state_dict[key], len(self.group_mask))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def kept_groups(self) -> Tensor:
        """See :meth:`.Operator.kept_groups`."""
        return self.group_mask.any(0)

    def reset_parameters(self) -> None:
        """Draw the small kernels anew: truncated normal, standard deviation 0.02. Tables are as in a new operator."""
        super().reset_parameters()
        trunc_normal_(self.kernels, std=.02)
        self.wiring.copy_(self.released_tables()['wiring'])

    def forward(self, x: Tensor) -> Tensor:
        """Forward pass, [B, dim, H, W] in and out."""
        x = in_autocast_dtype(x)  # or the skip and the ghosts would make the output float32
        worked, ghosts = x, x
        if self.num_ghost > 0:
            worked, ghosts = x.split([self.num_worked, self.num_ghost], dim=1)
        worked = worked.contiguous()
        h, v, i = shiftwise_conv2d(
            worked,
            summed_paths(self.kernels, self.group_mask),
            self.wiring,
            self.focus_length,
            self.padding,
            self.kept_groups(),
            self.backend,
        )
        out = self.norm_h(h) + self.norm_v(v)
        out += self.norm_i(i)
        if self.inner_skip:
            out += worked
        out = contiguous_gradient(out)
        if self.num_ghost > 0:
            out = torch.cat([out, ghosts], dim=1)
        return out

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> MergedConv2d | MergedShiftConv2d:
        """The operator merged for inference, same output; ``timm.utils.reparameterize_model`` calls it."""
        dd: dict[str, Any] = {'device': self.kernels.device, 'dtype': self.kernels.dtype}
        merged: MergedConv2d | MergedShiftConv2d
        if self.padding == 'full':
            merged = MergedConv2d(**self.settings(), **dd)
        else:
            merged = MergedShiftConv2d(
                **self.settings(), num_shuffles=self.wiring.shape[0], backend=self.backend, **dd)
        norms = (self.norm_h, self.norm_v, self.norm_i)
        folded = [fold_batch_norm(norm) for norm in norms if not isinstance(norm, nn.Identity)]
        if len(folded) < len(norms):  # the centre branch has none
            folded.append((torch.ones_like(folded[0][0]), torch.zeros_like(folded[0][1])))
        scales, biases = zip(*folded, strict=True)
        summed = summed_paths(self.kernels.double(), self.group_mask)
        merge_shiftwise(merged, summed, self.wiring, scales, sum(biases))
        merged.group_mask.copy_(self.kept_groups())
        return merged.train(self.training)

    def extra_repr(self) -> str:
        """What the operator's own line in a printed model says."""
        return (
            f'{self.dim}, operator={self.operator!r}, focus_length={self.focus_length}, '
            f'kernel_size={self.kernel_size}, paths={len(self.kernels)}, maps={self.num_maps}, '
            f'shuffles={len(self.wiring)}, ghosts={self.num_ghost}, padding={self.padding!r}'
        )


def summed_paths(kernels: Tensor, mask: Tensor) -> Tensor:
    """The one set of small kernels that all paths amount to.

    Args:
        kernels: Small kernels of the paths [P, C, K, N, N].
        mask: Which of them are kept, bool [P, C, K]; whatever the others hold counts as zero.

    Returns:
        Their sum, [C, K, N, N].
    """
    # what autograd keeps is the new tensor ~mask: masks may change before a second derivative is taken
    return kernels.masked_fill(~mask[:, :, :, None, None], 0).sum(0)


def of_each_path(mask: Tensor, paths: int) -> Tensor:
    """A mask [C, K] for all paths alike as [P, C, K]; one of another number of axes as it is."""
    return mask.repeat(paths, 1, 1) if mask.ndim == 2 else mask

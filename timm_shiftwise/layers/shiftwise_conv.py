"""The shift-wise operator: small depthwise convolutions whose outputs are shifted and added.

Source: Shift-ConvNets (arXiv 2401.12736), Section 3.
"""
import torch
from timm.layers import trunc_normal_
from timm.models import register_notrace_function
from torch import Tensor, nn

from timm_shiftwise.geometry import check_geometry, small_padding
from timm_shiftwise.ops import (
    contiguous_gradient,
    in_autocast_dtype,
    inference_conv2d,
    shiftwise_conv2d,
    split_channels,
)

from .merged import MergedShiftwiseConv2d, fold_batch_norm, refuse_other_geometry
from .wiring import separate_wiring, shuffled_wiring, split_ghost

# fx sees one node; what is inside chooses by device, backend and autocast
register_notrace_function(contiguous_gradient)
register_notrace_function(in_autocast_dtype)
register_notrace_function(shiftwise_conv2d)
register_notrace_function(inference_conv2d)
register_notrace_function(split_channels)

OPERATORS = ('sw', 'p_sw', 'eq_slak')


class ShiftwiseConv2d(nn.Module):
    """Depthwise operator with the reach of an M x N, an N x M and an N x N kernel, made of N x N ones.

    Of the input's channels some (*ghosts*) pass through untouched; the others are convolved by P parallel *paths* of G
    small kernels, summed before anything non-linear, whose maps are shifted and added into a horizontal, a vertical and
    an identity branch, each normalised by its own BatchNorm. The output holds the worked-on channels, then the ghosts,
    both in ascending order of index: the pointwise layer that follows learns that order.

    Args:
        dim: Number of channels in and out.
        focus_length: M, the long side of the large kernel in pixels.
        kernel_size: N, the side of the small kernels in pixels.
        operator: ``'sw'`` (branches share their kernels, orders shuffled per channel, skip inside), ``'p_sw'`` (shared,
            wide branch in natural order, no skip) or ``'eq_slak'`` (kernels of their own, natural order, no skip).
        num_paths: P, parallel convolutions whose weights add up.
        num_shuffles: R, orders that are added up (1 for ``'eq_slak'``).
        ghost_ratio: Share of channels that pass through.
        ghost_split: Rounding rule of that share, ``'v1'`` or ``'v2'``.
        padding: Padding policy of the small convolutions, ``'full'`` (N - 1, exact) or ``'same'`` (N // 2).
        backend: ``'auto'``, ``'taichi'``, ``'torch'`` or None, see :func:`timm_shiftwise.ops.shift_add`.
        device: Device of parameters and buffers.
        dtype: Floating point type of parameters and BatchNorm statistics.

    Shape:
        - Input: [B, dim, H, W]
        - Output: [B, dim, H, W]

    Raises:
        ValueError: If an argument is out of its range.
    """

    kept: Tensor
    ghost: Tensor
    horizontal: Tensor
    vertical: Tensor
    identity: Tensor
    mask: Tensor
    geometry: Tensor

    def __init__(
            self,
            dim: int,
            focus_length: int,
            kernel_size: int = 5,
            *,
            operator: str = 'sw',
            num_paths: int = 1,
            num_shuffles: int = 1,
            ghost_ratio: float = 0.,
            ghost_split: str = 'v1',
            padding: str = 'full',
            backend: str | None = None,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        check_geometry(focus_length, kernel_size, padding)
        if operator not in OPERATORS:
            raise ValueError(f'operator must be one of {OPERATORS}, got {operator!r}.')
        if num_paths < 1:
            raise ValueError(f'num_paths must be at least 1, got {num_paths}.')
        if operator == 'eq_slak' and num_shuffles != 1:
            raise ValueError(f"num_shuffles must be 1 for operator 'eq_slak', got {num_shuffles}.")
        self.focus_length = focus_length
        self.kernel_size = kernel_size
        self.operator = operator
        self.ghost_ratio = ghost_ratio
        self.ghost_split = ghost_split
        self.padding = padding
        self.backend = backend

        kept, ghost = split_ghost(dim, ghost_ratio, ghost_split)
        channels = len(kept)
        self.num_ghost = len(ghost)
        self.inner_skip = operator == 'sw'
        if operator == 'eq_slak':
            wiring = separate_wiring(channels, focus_length, kernel_size)
        else:
            wiring = shuffled_wiring(
                channels, focus_length, kernel_size, num_shuffles, natural_horizontal=operator == 'p_sw')

        self.weight = nn.Parameter(torch.empty(num_paths, channels, wiring.maps, kernel_size, kernel_size, **dd))
        self.norm_h = nn.BatchNorm2d(channels, **dd)
        self.norm_v = nn.BatchNorm2d(channels, **dd)
        self.norm_i = nn.BatchNorm2d(channels, **dd)
        self.register_buffer('kept', _own(kept, device))
        self.register_buffer('ghost', _own(ghost, device))
        self.register_buffer('horizontal', _own(wiring.horizontal, device))
        self.register_buffer('vertical', _own(wiring.vertical, device))
        self.register_buffer('identity', _own(wiring.identity, device))
        self.register_buffer('mask', torch.ones(channels, wiring.maps, dtype=torch.bool, device=device))
        # shapes alone do not tell M: a checkpoint says for which geometry its kernels were made
        self.register_buffer('geometry', torch.tensor(self._geometry(), dtype=torch.int32, device=device))
        self.reset_parameters()

    def _geometry(self) -> tuple[int, int, int]:
        return self.focus_length, self.kernel_size, small_padding(self.kernel_size, self.padding)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        refuse_other_geometry(state_dict, prefix, self._geometry(), args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn, recurse: bool = True):
        # model.to(memory_format=torch.channels_last) converts whatever has five axes, too, and fails: show it six
        return super()._apply(lambda t: fn(t[None])[0] if t.ndim == 5 else fn(t), recurse)

    def reset_parameters(self) -> None:
        """Draw the small kernels anew: truncated normal, standard deviation 0.02."""
        trunc_normal_(self.weight, std=.02)

    def summed_weight(self) -> Tensor:
        """The one kernel set that all paths amount to, pruned groups zero: [C, K, N, N]."""
        return self.weight.sum(0) * self.mask[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Forward pass, [B, dim, H, W] in and out."""
        x = in_autocast_dtype(x)  # or the skip and the ghosts would make the output float32
        worked, ghosts = x, x
        if self.num_ghost > 0:
            worked, ghosts = split_channels(x, self.kept, self.ghost)
        h, v, i = shiftwise_conv2d(
            worked,
            self.weight.sum(0),  # the paths amount to one: [C, K, N, N]
            self.horizontal,
            self.vertical,
            self.identity,
            self.focus_length,
            self.padding,
            self.mask,
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
    def fuse(self) -> MergedShiftwiseConv2d:
        """The operator in its form for inference, same output; ``timm.utils.reparameterize_model`` calls it."""
        merged = MergedShiftwiseConv2d(
            len(self.kept) + self.num_ghost,
            self.focus_length,
            self.kernel_size,
            operator=self.operator,
            num_shuffles=self.horizontal.shape[0],
            ghost_ratio=self.ghost_ratio,
            ghost_split=self.ghost_split,
            padding=self.padding,
            backend=self.backend,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        scale_h, bias_h = fold_batch_norm(self.norm_h)
        scale_v, bias_v = fold_batch_norm(self.norm_v)
        scale_i, bias_i = fold_batch_norm(self.norm_i)
        held = {
            'weight': self.weight.double().sum(0) * self.mask[:, :, None, None],
            'scale_h': scale_h, 'scale_v': scale_v, 'scale_i': scale_i, 'bias': bias_h + bias_v + bias_i,
        }
        held.update((name, getattr(self, name)) for name in (
            'kept', 'ghost', 'horizontal', 'vertical', 'identity', 'geometry'))
        merged.load_state_dict(held)
        return merged.train(self.training)

    def extra_repr(self) -> str:
        """What the operator's own line in a printed model says."""
        paths, channels, maps = self.weight.shape[:3]
        return (
            f'{channels + self.num_ghost}, operator={self.operator!r}, focus_length={self.focus_length}, '
            f'kernel_size={self.kernel_size}, paths={paths}, maps={maps}, shuffles={self.horizontal.shape[0]}, '
            f'ghosts={self.num_ghost}, padding={self.padding!r}'
        )


def _own(table: Tensor, device) -> Tensor:
    # tables are cached and shared between layers; a buffer must be the layer's own
    return table.to(device=torch.get_default_device() if device is None else device, copy=True)

"""Operators in their form for inference: paths summed, BatchNorms folded, shuffles and repeats collapsed.

Source: Shift-ConvNets (arXiv 2401.12736), Section 3 (re-parameterisation; Eq. 1-3 read backwards).
"""
import torch
from torch import Tensor, nn

from timm_shiftwise.geometry import check_geometry, num_groups, small_padding
from timm_shiftwise.ops import in_autocast_dtype, inference_conv2d
from timm_shiftwise.ops.shiftwise_conv.merged import (
    add_centred,
    assemble_kernels,
    centred,
    large_kernel_conv2d,
    trimmed,
)

from .wiring import split_ghost


class MergedLargeKernelConv2d(nn.Module):
    """SLaK's operator for inference: one tall and one wide depthwise convolution.

    The square kernel lies within the tall one and is added there.

    Args:
        dim: Number of channels in and out.
        focus_length: M in pixels.
        kernel_size: N in pixels.
        device: Device of the buffers.
        dtype: Floating point type of the buffers.

    Shape:
        - Input: [B, dim, H, W]
        - Output: [B, dim, H, W]
    """

    tall: Tensor
    wide: Tensor
    bias: Tensor

    def __init__(self, dim: int, focus_length: int, kernel_size: int = 5, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        check_geometry(focus_length, kernel_size, 'full')
        tall, wide = merge_large_kernels(
            torch.zeros(dim, kernel_size, focus_length, **dd),
            torch.zeros(dim, focus_length, kernel_size, **dd),
            torch.zeros(dim, kernel_size, kernel_size, **dd),
            focus_length,
        )
        self.register_buffer('tall', tall)
        self.register_buffer('wide', wide)
        self.register_buffer('bias', torch.zeros(dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """Forward pass, [B, dim, H, W] in and out."""
        refuse_training(self.training)
        return large_kernel_conv2d(x, self.tall, self.wide, self.bias)


class MergedShiftwiseConv2d(nn.Module):
    """The shift-wise operator for inference.

    It holds one small kernel set (paths summed, pruned groups zero) and what the three BatchNorms amount to: a scale
    for each branch and a bias. With ``padding='full'`` one tall and one wide kernel follow from these, as exact as the
    operator itself; they are assembled whenever weights are loaded, and columns that no kept group touches are left
    out. With ``padding='same'``, and where few groups are kept, the maps are still shifted and added.

    Args:
        dim: Number of channels in and out.
        focus_length: M in pixels.
        kernel_size: N in pixels.
        operator: ``'sw'``, ``'p_sw'`` or ``'eq_slak'``, see :class:`ShiftwiseConv2d`.
        num_paths: P of the operator this stands for; they are one here.
        num_shuffles: R.
        ghost_ratio: Share of channels that pass through.
        ghost_split: Rounding rule of that share.
        padding: ``'full'`` or ``'same'``.
        backend: See :func:`timm_shiftwise.ops.shift_add`.
        device: Device of the buffers.
        dtype: Floating point type of the buffers.

    Shape:
        - Input: [B, dim, H, W]
        - Output: [B, dim, H, W]
    """

    weight: Tensor
    scale_h: Tensor
    scale_v: Tensor
    scale_i: Tensor
    bias: Tensor
    kept: Tensor
    ghost: Tensor
    horizontal: Tensor
    vertical: Tensor
    identity: Tensor
    tall: Tensor
    wide: Tensor
    spread_tall: Tensor
    spread_wide: Tensor
    spread_bias: Tensor
    order: Tensor
    factors: Tensor

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
        self.focus_length = focus_length
        self.kernel_size = kernel_size
        self.padding = padding
        self.backend = backend
        self.inner_skip = operator == 'sw'
        self.density = 1.
        kept, ghost = split_ghost(dim, ghost_ratio, ghost_split)
        channels, groups = len(kept), num_groups(focus_length, kernel_size)
        maps = 2 * groups + 1 if operator == 'eq_slak' else groups
        self.num_ghost = len(ghost)
        table = {'dtype': torch.int32, 'device': device}
        self.register_buffer('weight', torch.zeros(channels, maps, kernel_size, kernel_size, **dd))
        for name in ('scale_h', 'scale_v', 'scale_i', 'bias'):
            self.register_buffer(name, torch.zeros(channels, **dd))
        self.register_buffer('kept', torch.zeros(channels, dtype=torch.int64, device=device))
        self.register_buffer('ghost', torch.zeros(self.num_ghost, dtype=torch.int64, device=device))
        self.register_buffer('horizontal', torch.zeros(num_shuffles, channels, groups, **table))
        self.register_buffer('vertical', torch.zeros(num_shuffles, channels, groups, **table))
        self.register_buffer('identity', torch.zeros(num_shuffles, channels, **table))
        geometry = (focus_length, kernel_size, small_padding(kernel_size, padding))
        self.register_buffer('geometry', torch.tensor(geometry, **table))
        self.register_buffer('tall', torch.zeros(channels, 0, 0, **dd), persistent=False)
        self.register_buffer('wide', torch.zeros(channels, 0, 0, **dd), persistent=False)
        # the same for all channels as they come, of which ghosts are convolved with a single one
        self.register_buffer('spread_tall', torch.zeros(dim, 0, 0, **dd), persistent=False)
        self.register_buffer('spread_wide', torch.zeros(dim, 0, 0, **dd), persistent=False)
        self.register_buffer('spread_bias', torch.zeros(dim, **dd), persistent=False)
        # put together once for all calls
        self.register_buffer('order', torch.cat([self.kept, self.ghost]), persistent=False)
        self.register_buffer('factors', torch.zeros(4, channels, **dd), persistent=False)
        self.assemble()

    def assemble(self) -> None:
        """Make the tall and the wide kernel of what the operator holds, and count what it keeps."""
        self.order = torch.cat([self.kept, self.ghost])
        self.factors = torch.stack([self.scale_h, self.scale_v, self.scale_i, self.bias])
        if not self.weight.is_meta:
            self.density = float((self.weight != 0).flatten(2).any(2).float().mean())
        if self.padding != 'full':
            return
        wide, tall, square = assemble_kernels(self.weight, self.horizontal, self.vertical, self.identity)
        square = square * self.scale_i[:, None, None]
        if self.inner_skip:
            # reading the input at the output's own position is a kernel with a single one
            square[:, self.kernel_size // 2, self.kernel_size // 2] += 1
        tall, wide = merge_large_kernels(
            wide * self.scale_h[:, None, None], tall * self.scale_v[:, None, None], square, self.focus_length)
        if not self.weight.is_meta:
            tall, wide = trimmed(tall), trimmed(wide)
        self.tall, self.wide = tall.contiguous(), wide.contiguous()
        self.spread_tall, self.spread_wide = self._spread(self.tall), self._spread(self.wide)
        self.spread_bias = self._spread(self.bias)
        self.spread_tall[self.ghost, tall.shape[1] // 2, tall.shape[2] // 2] = 1

    def _spread(self, values: Tensor) -> Tensor:
        spread = values.new_zeros([len(self.kept) + self.num_ghost, *values.shape[1:]])
        spread[self.kept] = values
        return spread

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        geometry = (self.focus_length, self.kernel_size, small_padding(self.kernel_size, self.padding))
        refuse_other_geometry(state_dict, prefix, geometry, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.assemble()

    def forward(self, x: Tensor) -> Tensor:
        """Forward pass, [B, dim, H, W] in and out."""
        refuse_training(self.training)
        return inference_conv2d(
            in_autocast_dtype(x),  # or the skip and the ghosts would make the output float32
            self.kept,
            self.ghost,
            self.tall,
            self.wide,
            self.weight,
            self.horizontal,
            self.vertical,
            self.identity,
            self.factors,
            self.focus_length,
            self.padding,
            self.inner_skip,
            self.density,
            (self.spread_tall, self.spread_wide, self.spread_bias, self.order),
            self.backend,
        )


def merge_large_kernels(wide: Tensor, tall: Tensor, square: Tensor, focus_length: int) -> tuple[Tensor, Tensor]:
    """Put the square kernel into the tall one and centre both, so that symmetric padding serves.

    Args:
        wide: Kernels [C, N, L] whose column M // 2 lies over the output's own position.
        tall: Kernels [C, L, N], likewise.
        square: Kernels [C, N, N].
        focus_length: M in pixels.

    Returns:
        The tall and the wide kernels, of odd sides.
    """
    size = square.shape[1]
    tall = centred(tall, focus_length // 2, size // 2)
    wide = centred(wide, size // 2, focus_length // 2)
    return add_centred(tall, centred(square, size // 2, size // 2)), wide


def fold_batch_norm(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a BatchNorm amounts to at inference: a scale and a bias, both float64 [C]."""
    mean, variance = norm.get_buffer('running_mean').double(), norm.get_buffer('running_var').double()
    scale = norm.weight.detach().double() / (variance + norm.eps).sqrt()
    return scale, norm.bias.detach().double() - mean * scale


def refuse_other_geometry(
        state_dict: dict[str, Tensor],
        prefix: str,
        geometry: tuple[int, int, int],
        errors: list[str],
) -> None:
    """Add an error to a loading's list if the kernels were made for another (M, N, p); shapes alone do not tell M."""
    held = state_dict.get(prefix + 'geometry')
    if held is not None and not held.is_meta and tuple(held.tolist()) != geometry:
        errors.append(
            f'{prefix}geometry: the checkpoint was made for (focus length, kernel size, padding) '
            f'{tuple(held.tolist())}, the layer is {geometry}.')


def refuse_training(training: bool) -> None:
    """Stop a training step through an operator whose BatchNorms and paths are gone.

    Raises:
        RuntimeError: If gradients are recorded in training mode.
    """
    if training and torch.is_grad_enabled():
        raise RuntimeError(
            'This network is reparameterized: its form for inference cannot be trained. Call eval() before running it, '
            'or build the network without reparameterized=True and train that.')

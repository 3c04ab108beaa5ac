"""The shift-wise operator at inference: branches, BatchNorms, skip and ghosts in one call.

Source: Shift-ConvNets (arXiv 2401.12736), Section 3 (re-parameterisation).
"""
import torch
from torch import Tensor

from timm_shiftwise.ops.channels import split_channels
from timm_shiftwise.ops.tracing import graph_leaves_python

from .frontend import shiftwise_conv2d
from .merged import depthwise_conv2d, large_kernel_conv2d, large_kernel_conv2d_terms, within_reach
from .ways import choose_inference_way


def inference_conv2d(
        x: Tensor,
        kept: Tensor,
        ghost: Tensor,
        tall: Tensor,
        wide: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        factors: Tensor,
        focus_length: int,
        padding: str,
        skip: bool,
        density: float,
        spread: tuple[Tensor, Tensor, Tensor, Tensor],
        backend: str | None = None,
) -> Tensor:
    """Run the operator in its form for inference.

    Where few groups are kept, and where windows dropped at the border cannot be merged, one Taichi kernel does it all;
    elsewhere, in graphs and where a gradient of the input is wanted it is a tall and a wide convolution, or, for
    windows dropped, the three branches.

    Args:
        x: Input [B, dim, H, W].
        kept: Channels that are worked on, [C].
        ghost: Channels that pass through, [dim - C].
        tall: The tall kernel that all amounts to with ``padding='full'``, [C, rows, columns].
        wide: The wide one, [C, rows, columns].
        weight: Small kernels [C, K, N, N], pruned ones zero.
        horizontal: Kernel index at every place of the wide branch; integer [R, C, G].
        vertical: The same for the tall branch; integer [R, C, G].
        identity: Kernel index of the centre branch; integer [R, C].
        factors: What the horizontal, the vertical and the identity branch are multiplied by, and a bias; [4, C].
        focus_length: M in pixels.
        padding: ``'full'`` or ``'same'``.
        skip: Whether the input itself is added.
        density: Share of the small kernels that are not zero.
        spread: ``tall``, ``wide`` and the bias for all channels in the order of ``x``, [dim, ...], of which those of
            ghosts leave them as they are; and ``kept`` and ``ghost`` one after the other, [dim].
        backend: ``'auto'``, ``'taichi'``, ``'torch'`` or None, see :func:`timm_shiftwise.ops.shift_add`.

    Returns:
        The channels worked on, then the ghosts: [B, dim, H, W].
    """
    if not torch.jit.is_scripting():
        plain = graph_leaves_python() or torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())
        if not plain:
            way = choose_inference_way(x, weight.shape[2], density, padding, backend).way
            if way == 'fused':
                return torch.ops.timm_shiftwise.folded_conv2d(
                    x, kept, ghost, weight, horizontal, vertical, identity, factors, focus_length, padding, skip)
            if way == 'merged':
                if _fast_channels_last(x):
                    out = _merged_channels_last(x, *spread[:3])
                    return _in_order(out, spread[3]) if len(ghost) > 0 else out
                return _merged(x, kept, ghost, tall, wide, factors[3])
    has_ghosts = ghost.shape[0] > 0
    worked, ghosts = x, x
    if has_ghosts:
        worked, ghosts = split_channels(x, kept, ghost)
    if padding == 'full':
        out = large_kernel_conv2d(worked, tall, wide, factors[3])
    else:
        h, v, i = shiftwise_conv2d(
            worked, weight, horizontal, vertical, identity, focus_length, padding, None, backend)
        # under autocast the factors are of a higher precision than the branches
        scale_h, scale_v, scale_i, bias = factors.to(h.dtype)[:, :, None, None].unbind(0)
        out = h * scale_h + v * scale_v + i * scale_i + bias
        if skip:
            out = out + worked
    if has_ghosts:
        out = torch.cat([out, ghosts], dim=1)
    return out


def _fast_channels_last(x: Tensor) -> bool:
    """Whether a map has its channels last in memory and is one that oneDNN takes so at its best.

    That is in float32, by whole vectors of channels, on processors with AVX-512: a merged sw_tiny takes 4 to 6 % less
    so. With AVX2 it would take up to twice as long.
    """
    return (
        x.device.type == 'cpu' and x.dtype == torch.float32 and x.shape[1] % 16 == 0 and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
        and torch.backends.cpu.get_cpu_capability() == 'AVX512')


def _merged_channels_last(x: Tensor, tall: Tensor, wide: Tensor, bias: Tensor) -> Tensor:
    """A tall and a wide convolution of all channels, ghosts too: no copies."""
    height, width = x.shape[2], x.shape[3]
    out = depthwise_conv2d(x, within_reach(tall, height, width), bias)
    return out.add_(depthwise_conv2d(x, within_reach(wide, height, width)))


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """Put the channels of a map that has them last in memory into an order; index_select takes twice as long."""
    rows = x.permute(0, 2, 3, 1)  # [B, H, W, dim]
    return rows.gather(3, order.expand(rows.shape)).permute(0, 3, 1, 2)


def _merged(x: Tensor, kept: Tensor, ghost: Tensor, tall: Tensor, wide: Tensor, bias: Tensor) -> Tensor:
    """A tall and a wide convolution whose sum and ghosts go straight to their places, in the layout of the input."""
    contiguous = x.contiguous()
    worked = contiguous.index_select(1, kept) if len(ghost) > 0 else contiguous
    height, width = x.shape[2], x.shape[3]
    if x.device.type == 'cpu' and height == width and tall.shape == wide.mT.shape:
        first, second = _both(worked, within_reach(tall, height, width), within_reach(wide, height, width), bias)
    else:
        first, second = large_kernel_conv2d_terms(worked, tall, wide, bias)
    out = torch.empty_like(x, dtype=first.dtype)
    torch.add(first, second, out=out[:, :len(kept)])
    out[:, len(kept):] = contiguous.index_select(1, ghost)
    return out


def _both(x: Tensor, tall: Tensor, wide: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The two convolutions as one, of the map beside its transposed self: more channels are shared out more evenly."""
    channels = len(tall)
    pair = torch.cat([x, x.mT], dim=1)
    out = depthwise_conv2d(pair, torch.cat([tall, wide.mT]), torch.cat([bias, torch.zeros_like(bias)]))
    return out[:, :channels], out[:, channels:].mT


@torch.library.custom_op('timm_shiftwise::folded_conv2d', mutates_args=())
def _folded_conv2d(
        x: Tensor,
        kept: Tensor,
        ghost: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        factors: Tensor,
        focus_length: int,
        padding: str,
        skip: bool,
) -> Tensor:
    from .taichi_impl import folded_conv2d_taichi
    return folded_conv2d_taichi(
        x, weight, horizontal, vertical, identity, focus_length, padding, factors, skip, kept, ghost)


@_folded_conv2d.register_fake
def _(x, kept, ghost, weight, horizontal, vertical, identity, factors, focus_length, padding, skip):
    return x.new_empty(x.shape)

"""Operators in their form for inference: everything merged into a tall and a wide depthwise convolution.

Paths are summed, shuffles and repeats lie where they belong in the large kernels, the skip and the ghosts are kernels
with a single one, BatchNorms are factors of kernels and a bias.

Source: Shift-ConvNets (arXiv 2401.12736), Section 3 (re-parameterisation; Eq. 1-3 read backwards).
"""
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.types import Device

from timm_shiftwise.ops import in_autocast_dtype, shiftwise_conv2d
from timm_shiftwise.ops.checks import check_indices
from timm_shiftwise.ops.depthwise import tall_wide_conv2d
from timm_shiftwise.ops.large_kernels import assemble_kernels, centred, grown, merged_sides, within_reach
from timm_shiftwise.ops.measured import CHOICES, layer_of, may_measure
from timm_shiftwise.ops.tracing import graph_leaves_python

from .operator import Operator
from .wiring import num_maps


class MergedConv2d(Operator):
    """A tall and a wide depthwise convolution, added: what every operator with full padding merges to.

    Both run over all channels; a ghost's kernels are zero but for a single element. The square kernel lies within the
    tall one. Their sides follow from M and N alone.

    Args:
        dim: Number of channels in and out.
        focus_length: M in pixels.
        kernel_size: N in pixels.
        device: Device of parameters and buffers.
        dtype: Floating point type of parameters.
        settings: Further keywords of :class:`Operator`, of the operator that this stands for.

    Shape:
        - Input: [B, dim, H, W]
        - Output: [B, dim, H, W]
    """

    def __init__(
            self, dim: int, focus_length: int, kernel_size: int = 5, *, device: Device = None,
            dtype: torch.dtype | None = None, **settings: Any) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__(dim, focus_length, kernel_size, device=device, **settings)
        long, short = merged_sides(focus_length, kernel_size, assembled=self.operator != 'slak')
        self.tall = nn.Conv2d(dim, dim, (long, short), padding=(long // 2, short // 2), groups=dim, **dd)
        self.wide = nn.Conv2d(dim, dim, (short, long), padding=(short // 2, long // 2), groups=dim, bias=False, **dd)

    @torch.no_grad()
    def set_branches(self, wide: Tensor, tall: Tensor, square: Tensor, bias: Tensor) -> None:
        """Set the kernels from those of the three branches, BatchNorms and skip included; ghosts pass through.

        Args:
            wide: Kernels [C, N, columns] whose column M // 2 lies over the output's own position.
            tall: Kernels [C, rows, N], likewise.
            square: Kernels [C, N, N].
            bias: Bias [C].
        """
        assert self.tall.bias is not None
        row, middle = self.kernel_size // 2, self.focus_length // 2
        tall_weight, wide_weight, worked = self.tall.weight, self.wide.weight, slice(self.num_worked)
        for parameter in self.parameters():
            parameter.zero_()
        long, short = tall_weight.shape[2:]
        tall = grown(centred(tall, middle, row), long, short) + grown(centred(square, row, row), long, short)
        tall_weight[worked, 0] = tall.to(tall_weight.dtype)
        wide_weight[worked, 0] = grown(centred(wide, row, middle), short, long).to(wide_weight.dtype)
        self.tall.bias[worked] = bias.to(tall_weight.dtype)
        tall_weight[self.num_worked:, 0, long // 2, short // 2] = 1

    @torch.no_grad()
    def fold_norm(self, norm: _BatchNorm) -> None:
        """Take a BatchNorm that follows into the kernels and the bias."""
        assert self.tall.bias is not None
        scale, bias = fold_batch_norm(norm)
        for conv in (self.tall, self.wide):
            conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])
        self.tall.bias.copy_(self.tall.bias.double() * scale + bias)

    def forward(self, x: Tensor) -> Tensor:
        """Forward pass, [B, dim, H, W] in and out."""
        refuse_training(self.training)
        return merged_forward(
            x, self.tall.weight, self.tall.bias, self.wide.weight, self.num_worked, self.large_map)


@register_notrace_function  # fx sees one node; what is inside chooses by layout and device
def merged_forward(
        x: Tensor, tall: Tensor, bias: Tensor | None, wide: Tensor, num_worked: int, large_map: bool) -> Tensor:
    """A tall and a wide depthwise convolution, added, in whichever equal form is the fastest where it runs.

    Args:
        x: Input [B, dim, H, W].
        tall: Kernels [dim, 1, rows, columns] of odd sides.
        bias: Bias [dim].
        wide: Kernels [dim, 1, rows, columns] of odd sides.
        num_worked: C; the channels behind them have kernels with a single element in the middle of the tall one.
        large_map: See :class:`.operator.Operator`.

    Returns:
        Output [B, dim, H, W].
    """
    if torch.jit.is_scripting():
        return _two_convolutions(x, tall, bias, wide, large_map)
    else:
        if graph_leaves_python():
            return _two_convolutions(x, tall, bias, wide, large_map)
        assert bias is not None  # which TorchScript cannot know of a convolution
        differentiated = torch.is_grad_enabled() and any(each.requires_grad for each in (x, tall, bias, wide))
        # on the meta device nothing runs, and whoever counts there knows convolutions
        if x.device.type not in ('cpu', 'meta') and not differentiated:
            x = in_autocast_dtype(x)
            form = _fastest_form(x, tall, bias, wide, num_worked) if may_measure(x) else _as_products
            return form(x, tall, bias, wide, num_worked)
        if torch.compiler.is_compiling() or x.device.type != 'cpu':
            return _two_convolutions(x, tall, bias, wide, False)
        x = in_autocast_dtype(x)
        tall, wide = _cut_to(x, tall), _cut_to(x, wide)
        if _is_fast_channels_last(x):
            return _with_channels_last(x, tall, bias, wide)
        return _on_planes(x, tall, bias, wide, num_worked)


def _depthwise(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(
        x, kernel, bias, padding=[kernel.shape[2] // 2, kernel.shape[3] // 2], groups=kernel.shape[0])


def _cut_to(x: Tensor, kernel: Tensor) -> Tensor:
    """A kernel without what only meets zeros, where that is much: oneDNN passes over it, but at the cost of a copy."""
    height, width = x.shape[2], x.shape[3]
    much = kernel.shape[2] > 3 * height or kernel.shape[3] > 3 * width
    return within_reach(kernel, height, width) if much else kernel


def _two_convolutions(x: Tensor, tall: Tensor, bias: Tensor | None, wide: Tensor, padded: bool) -> Tensor:
    out = _depthwise(x, tall, bias)
    if padded:  # with a value that vanishes in the sum: exporters and runtimes move a padding by 0 into the convolution
        reach = wide.shape[3] // 2
        x = F.pad(x, [reach, reach], value=1e-30)
        return out + F.conv2d(x, wide, padding=[wide.shape[2] // 2, 0], groups=wide.shape[0])
    return out + _depthwise(x, wide)


def _is_fast_channels_last(x: Tensor) -> bool:
    """Whether a map has its channels last in memory and is one that oneDNN takes so at its best.

    That is in float32, by whole vectors of channels, on processors with AVX-512. With AVX2 it would take up to twice as
    long, and in bfloat16 oneDNN never returns from some wide kernels.
    """
    return (
        x.dtype == torch.float32 and x.shape[1] % 16 == 0 and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
        and torch.backends.cpu.get_cpu_capability() == 'AVX512')


_TURNED_FROM = 500
"""Pixels of a map from which oneDNN's wide kernels gain more on its tall ones than turning the map costs: 3 to 12 %."""


def _with_channels_last(x: Tensor, tall: Tensor, bias: Tensor, wide: Tensor) -> Tensor:
    """The same with channels last in memory; on large maps the tall kernel runs as a wide one of the transposed map."""
    out = _depthwise(x, wide, bias)
    if x.shape[2] * x.shape[3] >= _TURNED_FROM:
        other = _depthwise(x.mT.contiguous(memory_format=torch.channels_last), tall.mT).mT
    else:
        other = _depthwise(x, tall)
    return out + other if torch.is_grad_enabled() else out.add_(other)


def _on_planes(x: Tensor, tall: Tensor, bias: Tensor, wide: Tensor, num_worked: int) -> Tensor:
    """The same on contiguous planes, ghosts by a product, in the layout of the input.

    A wide kernel runs on the transposed map: PyTorch's kernels for contiguous maps are made for tall ones. On square
    maps the two are one convolution of twice the channels, which threads share out more evenly.
    """
    worked = x[:, :num_worked].contiguous()
    first, second, shift = tall[:num_worked], wide[:num_worked].mT.contiguous(), bias[:num_worked]
    if x.shape[2] == x.shape[3]:
        pair = _depthwise(
            torch.cat([worked, worked.mT], dim=1), torch.cat([first, second]),
            torch.cat([shift, torch.zeros_like(shift)]))
        upright, turned = pair[:, :num_worked], pair[:, num_worked:].mT
    else:
        upright, turned = _depthwise(worked, first, shift), _depthwise(worked.mT.contiguous(), second).mT
    ghosts = _ghosts(x, tall, bias, num_worked)
    if torch.is_grad_enabled():
        return torch.cat([upright + turned, ghosts], dim=1)
    out = torch.empty_like(x)
    torch.add(upright, turned, out=out[:, :num_worked])
    out[:, num_worked:] = ghosts
    return out


def _as_products(x: Tensor, tall: Tensor, bias: Tensor, wide: Tensor, num_worked: int) -> Tensor:
    """The same as matrix products, ghosts by a product of their own, without derivatives."""
    kernels = (each[:num_worked, 0].to(x.dtype) for each in (tall, wide))
    worked = tall_wide_conv2d(x[:, :num_worked], *kernels) + bias[:num_worked, None, None].to(x.dtype)
    return torch.cat([worked, _ghosts(x, tall, bias, num_worked)], dim=1) if num_worked < x.shape[1] else worked


def _on_contiguous(x: Tensor, tall: Tensor, bias: Tensor, wide: Tensor, num_worked: int) -> Tensor:
    return _two_convolutions(x.contiguous(), tall, bias, wide, False)


def _on_channels_last(x: Tensor, tall: Tensor, bias: Tensor, wide: Tensor, num_worked: int) -> Tensor:
    return _two_convolutions(x.contiguous(memory_format=torch.channels_last), tall, bias, wide, False)


_FORMS = {'toeplitz': _as_products, 'merged': _on_contiguous, 'channels_last': _on_channels_last}
"""Forms that are timed on devices other than CPUs, named as the ways that are like them."""


def _fastest_form(
        x: Tensor, tall: Tensor, bias: Tensor, wide: Tensor, num_worked: int) -> Callable[..., Tensor]:
    """The fastest of :data:`_FORMS`, see :mod:`timm_shiftwise.ops.measured`."""
    layer, size = layer_of(x, 'merged', 'full', *tall.shape[2:])
    answer = CHOICES.fastest(layer, size, x.device, lambda: {
        name: partial(form, x, tall, bias, wide, num_worked) for name, form in _FORMS.items()})
    if answer is None:
        return _as_products
    if answer.name not in _FORMS:
        raise answer.refused(f'the forms that are timed are {", ".join(_FORMS)}')
    return _FORMS[answer.name]


def _ghosts(x: Tensor, tall: Tensor, bias: Tensor, num_worked: int) -> Tensor:
    scale = tall[num_worked:, 0, tall.shape[2] // 2, tall.shape[3] // 2].to(x.dtype)
    return torch.addcmul(bias[num_worked:, None, None].to(x.dtype), x[:, num_worked:], scale[:, None, None])


class MergedShiftConv2d(Operator):
    """What an operator with ``padding='same'`` merges to: windows dropped at the border leave the shift in place.

    It holds one set of small kernels (paths summed, pruned groups zero) and what the three BatchNorms amount to.

    Args:
        dim: Number of channels in and out.
        focus_length: M in pixels.
        kernel_size: N in pixels.
        num_shuffles: R.
        backend: See :func:`timm_shiftwise.ops.shift_add`.
        device: Device of the buffers.
        dtype: Floating point type of the buffers.
        settings: Further keywords of :class:`Operator`, of the operator that this stands for.

    Shape:
        - Input: [B, dim, H, W]
        - Output: [B, dim, H, W]
    """
    kernels: Tensor
    factors: Tensor
    wiring: Tensor

    def __init__(
            self, dim: int, focus_length: int, kernel_size: int = 5, *, num_shuffles: int = 1,
            backend: str | None = None, device: Device = None, dtype: torch.dtype | None = None,
            **settings: Any) -> None:
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__(dim, focus_length, kernel_size, padding='same', device=device, **settings)
        self.backend = backend
        self.inner_skip = self.operator == 'sw'
        channels, places = self.num_worked, num_maps('eq_slak', focus_length, kernel_size)
        self.register_buffer('kernels', torch.zeros(channels, self.num_maps, kernel_size, kernel_size, **dd))
        self.register_buffer('factors', torch.zeros(4, channels, **dd))  # of the three branches, and a bias
        self.register_buffer('wiring', torch.zeros(num_shuffles, channels, places, dtype=torch.int32, device=device))

    def reset_parameters(self) -> None:
        """See :meth:`.Operator.reset_parameters`."""
        super().reset_parameters()
        for buffer in (self.kernels, self.factors, self.wiring):
            buffer.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Forward pass, [B, dim, H, W] in and out."""
        refuse_training(self.training)
        x = in_autocast_dtype(x)
        worked, ghosts = x.split([self.num_worked, self.num_ghost], dim=1)
        worked = worked.contiguous()
        h, v, i = shiftwise_conv2d(
            worked, self.kernels, self.wiring, self.focus_length, 'same', self.group_mask, self.backend)
        # under autocast the factors are of a higher precision than the branches
        scale_h, scale_v, scale_i, bias = self.factors.to(h.dtype)[:, :, None, None].unbind(0)
        out = torch.addcmul(bias, h, scale_h)
        out = torch.addcmul(torch.addcmul(out, v, scale_v), i, scale_i)
        if self.inner_skip:
            out = out + worked
        return torch.cat([out, ghosts], dim=1) if self.num_ghost > 0 else out


@torch.no_grad()
def merge_shiftwise(
        merged: MergedConv2d | MergedShiftConv2d, kernels: Tensor, wiring: Tensor,
        scales: tuple[Tensor, Tensor, Tensor], bias: Tensor) -> None:
    """Set an operator in its form for inference to what an operator of small kernels computes.

    Args:
        merged: The operator to set, of the same geometry.
        kernels: Small kernels [C, K, N, N], paths summed, pruned groups zero.
        wiring: Kernel index at every place, integer [R, C, 2 * G + 1].
        scales: What the wide, the tall and the centre branch are multiplied by, each [C].
        bias: What is added, [C].

    Raises:
        ValueError: If the wiring names a kernel that is not there.
    """
    check_indices(wiring, kernels.shape[1])
    if isinstance(merged, MergedShiftConv2d):
        merged.kernels.copy_(kernels)
        merged.wiring.copy_(wiring)
        merged.factors.copy_(torch.stack([*scales, bias]))
        return
    wide, tall, square = (
        kernel * scale[:, None, None] for kernel, scale in zip(assemble_kernels(kernels, wiring), scales, strict=True))
    if merged.operator == 'sw':
        # the skip, which reads the input at the output's own position, is a kernel with a single one
        middle = merged.kernel_size // 2
        square[:, middle, middle] += 1
    merged.set_branches(wide, tall, square, bias)


def fold_batch_norm(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """What a BatchNorm, synchronised or frozen ones too, amounts to at inference: scale and bias, both float64 [C]."""
    mean, variance = norm.get_buffer('running_mean').double(), norm.get_buffer('running_var').double()
    scale = norm.weight.detach().double() / (variance + norm.eps).sqrt()
    return scale, norm.bias.detach().double() - mean * scale


def refuse_training(training: bool) -> None:
    """Stop a training step through an operator whose BatchNorms and paths are gone.

    Raises:
        RuntimeError: If gradients are recorded in training mode.
    """
    if training and torch.is_grad_enabled():
        raise RuntimeError(
            'This network is reparameterized: its form for inference cannot be trained. Call eval() before running it, '
            'or build the network without reparameterized=True and train that.')

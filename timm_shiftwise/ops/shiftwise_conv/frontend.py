"""Front of the shift-wise convolution: small depthwise convolutions whose maps are shifted and added.

``torch.ops.timm_shiftwise.shiftwise_conv2d`` and ``torch.ops.timm_shiftwise.shiftwise_conv2d_backward`` choose at every
call which of the equal ways computes them (:mod:`.ways`), so that to a compiler a layer is one operator whatever its
masks and its map are. The operator is linear in its input and in its kernels: the second derivative is made of the same
two.
"""
from typing import Any

import torch
from torch import Tensor

from timm_shiftwise.geometry import check_geometry
from timm_shiftwise.ops.autocast import in_autocast_dtype
from timm_shiftwise.ops.checks import check_dtype, check_indices, check_together, check_wiring, is_empty
from timm_shiftwise.ops.tracing import graph_leaves_python

from .call import Branches, Call
from .merged import plain_merged_conv2d
from .shift import reference_conv2d
from .ways import choose_way


def shiftwise_conv2d(
        x: Tensor, weight: Tensor, wiring: Tensor, focus_length: int, padding: str = 'full', mask: Tensor | None = None,
        backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Run K small convolutions on every channel, shift their maps to their places and add them up.

    Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3. With ``padding='full'`` and tables in natural order this equals
    one wide N x (G * N), one tall (G * N) x N and one square N x N depthwise convolution. Which of the ways that are
    equal computes it is chosen by :func:`timm_shiftwise.ops.shiftwise_conv.ways.choose_way`.

    A NaN or an infinity in ``x`` reaches every output that a kept kernel makes of it. Ways that multiply by the zeros
    of pruned or assembled kernels let it reach more: ``fused`` fewest, ``merged`` most.

    Args:
        x: Input [B, C, H, W].
        weight: Small kernels [C, K, N, N].
        wiring: Kernel index, 0 to K - 1, at every place of the wide branch, then of the tall branch, then of the centre
            branch; integer [R, C, 2 * G + 1].
        focus_length: M in pixels.
        padding: ``'full'`` or ``'same'``.
        mask: Kept groups, bool [C, K]; the others count as zero and get no gradient. None keeps all.
        backend: ``'auto'``, ``'taichi'``, ``'torch'`` or None, see :func:`timm_shiftwise.ops.shift_add`.

    Returns:
        The wide, the tall and the centre branch, each [B, C, H, W].

    Raises:
        TypeError: If a dtype is not supported.
        ValueError: If a shape, a setting or an index does not fit.
        RuntimeError: If the backend asked for cannot run.
    """
    if torch.jit.is_scripting():
        return _plain(x, keep_groups(weight, mask), wiring, focus_length, padding)
    else:
        check_geometry(focus_length, 1, padding)  # the kernel size is that of the weight
        x, weight = in_autocast_dtype(x), in_autocast_dtype(weight)
        if graph_leaves_python():
            _check(Call(x, weight, wiring, mask, focus_length, padding))
            return _plain(x, keep_groups(weight, mask), wiring, focus_length, padding)
        return torch.ops.timm_shiftwise.shiftwise_conv2d(x, weight, wiring, mask, focus_length, padding, backend)


def keep_groups(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Small kernels [..., C, K, N, N] with those of groups that a mask [..., C, K] does not keep set to zero.

    They are chosen, not multiplied: a NaN or an infinity among what was pruned is gone, too.
    """
    if mask is None:
        return weight
    return torch.where(mask[..., None, None], weight, 0.)


def _check(call: Call) -> None:
    x, weight, wiring, mask, focus_length, padding, _ = call
    if torch.jit.is_tracing():  # sizes are tensors then
        return
    check_dtype('x', x)
    check_together({'x': x, 'weight': weight}, dtypes=True)
    check_together({'x': x, 'wiring': wiring, 'mask': mask})
    if x.ndim != 4 or is_empty(*x.shape[1:]):
        raise ValueError(f'x must have the shape [B, C, H, W] with C, H and W of at least 1, got {tuple(x.shape)}.')
    channels = x.shape[1]
    if (weight.ndim != 4 or weight.shape[0] != channels or weight.shape[2] != weight.shape[3]
            or is_empty(*weight.shape[1:])):
        raise ValueError(
            f'weight must have the shape [C = {channels}, K, N, N] with K and N of at least 1, got '
            f'{tuple(weight.shape)}.')
    _, maps, size, _ = weight.shape
    check_wiring(wiring, focus_length, size, padding, channels)
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (channels, maps)):
        raise ValueError(
            f'mask must be bool and have the shape {(channels, maps)}, got {mask.dtype} and {tuple(mask.shape)}.')


def _check_gradients(grad_h: Tensor, grad_v: Tensor, grad_i: Tensor, x: Tensor) -> None:
    check_together({'x': x, 'grad_h': grad_h, 'grad_v': grad_v, 'grad_i': grad_i}, dtypes=True, shapes=True)


def _ready(call: Call) -> Call:
    """A call as every way takes it: checked, pruned kernels zero."""
    _check(call)
    check_indices(call.wiring, call.weight.shape[1])
    return call._replace(weight=keep_groups(call.weight, call.mask))


def _plain(x: Tensor, weight: Tensor, wiring: Tensor, focus_length: int, padding: str) -> Branches:
    """PyTorch's own operators only, for graphs that leave Python."""
    if padding == 'full':
        return plain_merged_conv2d(x, weight, wiring, focus_length)
    return reference_conv2d(x, weight, wiring, focus_length, padding)


@torch.library.custom_op('timm_shiftwise::shiftwise_conv2d', mutates_args=())
def _shiftwise_conv2d(
        x: Tensor, weight: Tensor, wiring: Tensor, mask: Tensor | None, focus_length: int, padding: str,
        backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    call = _ready(Call(x, weight, wiring, mask, focus_length, padding, backend))
    h, v, i = choose_way(call).way.forward(call)
    return h.contiguous(), v.contiguous(), i.contiguous()


@_shiftwise_conv2d.register_fake
def _(x, weight, wiring, mask, focus_length, padding, backend):
    _check(Call(x, weight, wiring, mask, focus_length, padding))
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op('timm_shiftwise::shiftwise_conv2d_backward', mutates_args=())
def _shiftwise_conv2d_backward(
        grad_h: Tensor, grad_v: Tensor, grad_i: Tensor, x: Tensor, weight: Tensor, wiring: Tensor, mask: Tensor | None,
        focus_length: int, padding: str, backend: str | None, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    call = _ready(Call(x, weight, wiring, mask, focus_length, padding, backend))
    _check_gradients(grad_h, grad_v, grad_i, x)
    grad_x, grad_weight = choose_way(call, backward=True).way.backward(
        (grad_h, grad_v, grad_i), call, need_x, need_weight)
    # an operator returns tensors: one that was not wanted is empty
    return (
        x.new_empty(0) if grad_x is None else grad_x.contiguous(),
        weight.new_empty(0) if grad_weight is None else keep_groups(grad_weight, mask).contiguous(),
    )


@_shiftwise_conv2d_backward.register_fake
def _(grad_h, grad_v, grad_i, x, weight, wiring, mask, focus_length, padding, backend, need_x, need_weight):
    _check(Call(x, weight, wiring, mask, focus_length, padding))
    _check_gradients(grad_h, grad_v, grad_i, x)
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, focus_length, padding, backend = inputs
    ctx.settings = (focus_length, padding, backend)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = torch.ops.timm_shiftwise.shiftwise_conv2d_backward(
        *grads, *ctx.saved_tensors, *ctx.settings, need_x, need_weight)
    return grad_x if need_x else None, grad_weight if need_weight else None, *[None] * 5


def _setup_backward(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, focus_length, padding, backend, ctx.need_x, ctx.need_weight = inputs
    ctx.settings = (focus_length, padding, backend)
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, over_x: Tensor | None, over_weight: Tensor | None) -> tuple[Tensor | None, ...]:
    """Derivative of the gradients by what they are made of; either gradient may not have been wanted."""
    *grads, x, weight, wiring, mask = ctx.saved_tensors
    rest = (wiring, mask, *ctx.settings)
    conv = torch.ops.timm_shiftwise.shiftwise_conv2d
    backward = torch.ops.timm_shiftwise.shiftwise_conv2d_backward
    out: list[Tensor | None] = [None] * 5
    terms = []
    if ctx.need_x:
        terms.append(conv(over_x, weight, *rest))
        out[4] = backward(*grads, over_x, weight, *rest, False, True)[1]
    if ctx.need_weight:
        terms.append(conv(x, over_weight, *rest))
        out[3] = backward(*grads, x, over_weight, *rest, True, False)[0]
    out[:3] = [sum(branch) for branch in zip(*terms, strict=True)]
    return *out, *[None] * 7


_shiftwise_conv2d.register_autograd(_backward, setup_context=_setup)
_shiftwise_conv2d_backward.register_autograd(_double_backward, setup_context=_setup_backward)

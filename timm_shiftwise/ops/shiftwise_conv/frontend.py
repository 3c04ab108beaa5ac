"""Front of the shift-wise convolution: small depthwise convolutions whose maps are shifted and added.

``torch.ops.timm_shiftwise.shiftwise_conv2d`` and ``torch.ops.timm_shiftwise.shiftwise_conv2d_backward`` choose at every
call which of the equal ways computes them (:mod:`.ways`), so that to a compiler a layer is one operator whatever its
masks and its map are. The operator is linear in its input and in its kernels: the second derivative is made of the same
two.
"""
import torch
from torch import Tensor

from timm_shiftwise.ops.autocast import in_autocast_dtype
from timm_shiftwise.ops.tracing import graph_leaves_python

from . import merged, small
from .small import check
from .ways import choose_way


def shiftwise_conv2d(
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        padding: str = 'full',
        mask: Tensor | None = None,
        backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run K small convolutions on every channel, shift their maps to their places and add them up.

    Source: Shift-ConvNets (arXiv 2401.12736), Eq. 1-3. With ``padding='full'`` and tables in natural order this equals
    one wide N x (G * N), one tall (G * N) x N and one square N x N depthwise convolution. Which of the ways that are
    equal computes it is chosen by :func:`timm_shiftwise.ops.shiftwise_conv.ways.choose_way`.

    Args:
        x: Input [B, C, H, W].
        weight: Small kernels [C, K, N, N].
        horizontal: Kernel index, 0 to K - 1, at every place of the wide branch; integer [R, C, G].
        vertical: The same for the tall branch; integer [R, C, G].
        identity: Kernel index of the centre branch; integer [R, C].
        focus_length: M in pixels.
        padding: ``'full'`` or ``'same'``.
        mask: Kept groups, bool [C, K]; the others count as zero and get no gradient. None keeps all.
        backend: ``'auto'``, ``'taichi'``, ``'torch'`` or None, see :func:`timm_shiftwise.ops.shift_add`.

    Returns:
        The horizontal, vertical and identity branches, each [B, C, H, W].

    Raises:
        TypeError: If a dtype is not supported.
        ValueError: If a shape or a setting does not fit.
        RuntimeError: If the backend asked for cannot run.
    """
    if not torch.jit.is_scripting():
        check(x, weight, horizontal, vertical, identity, focus_length, padding, mask)
    if mask is not None:
        weight = weight * mask[:, :, None, None]
    if torch.jit.is_scripting():
        return _plain(x, weight, horizontal, vertical, identity, focus_length, padding)
    else:
        x, weight = in_autocast_dtype(x), in_autocast_dtype(weight)
        if x.dtype != weight.dtype:
            raise TypeError(f'x and weight must have one dtype, got {x.dtype} and {weight.dtype}.')
        if graph_leaves_python():
            return _plain(x, weight, horizontal, vertical, identity, focus_length, padding)
        return torch.ops.timm_shiftwise.shiftwise_conv2d(
            x, weight, horizontal, vertical, identity, mask, focus_length, padding, backend)


def _plain(
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        focus_length: int,
        padding: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own operators only, for graphs that leave Python."""
    if padding == 'full':
        return merged.merged_conv2d(x, weight, horizontal, vertical, identity, focus_length)
    return small.reference_conv2d(x, weight, horizontal, vertical, identity, focus_length, padding)


@torch.library.custom_op('timm_shiftwise::shiftwise_conv2d', mutates_args=())
def _shiftwise_conv2d(
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        mask: Tensor | None,
        focus_length: int,
        padding: str,
        backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    tables = (horizontal, vertical, identity)
    way = choose_way(x, weight, padding, backend, mask).way
    if way == 'fused':
        from .taichi_impl import fused_conv2d_taichi
        return fused_conv2d_taichi(x, weight, *tables, focus_length, padding, mask)
    if way in ('merged', 'large'):
        h, v, i = merged.merged_conv2d(x, weight, *tables, focus_length)
        return h.contiguous(), v.contiguous(), i.contiguous()
    return small.small_shift_conv2d(x, weight, *tables, focus_length, padding, backend)


@_shiftwise_conv2d.register_fake
def _(x, weight, horizontal, vertical, identity, mask, focus_length, padding, backend):
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op('timm_shiftwise::shiftwise_conv2d_backward', mutates_args=())
def _shiftwise_conv2d_backward(
        grad_h: Tensor,
        grad_v: Tensor,
        grad_i: Tensor,
        x: Tensor,
        weight: Tensor,
        horizontal: Tensor,
        vertical: Tensor,
        identity: Tensor,
        mask: Tensor | None,
        focus_length: int,
        padding: str,
        backend: str | None,
        need_x: bool,
        need_weight: bool,
) -> tuple[Tensor, Tensor]:
    grads, tables = (grad_h, grad_v, grad_i), (horizontal, vertical, identity)
    way = choose_way(x, weight, padding, backend, mask, backward=True).way
    if way == 'fused':
        from .taichi_impl import fused_conv2d_backward_taichi
        grad_x, grad_weight = fused_conv2d_backward_taichi(
            *grads, x, weight, *tables, focus_length, padding, mask, need_x, need_weight)
    elif way in ('merged', 'large'):
        grad_x, grad_weight = merged.merged_conv2d_backward(
            *grads, x, weight, *tables, focus_length, need_x, need_weight, in_taichi=way == 'large')
    else:
        grad_x, grad_weight = small.small_shift_conv2d_backward(
            *grads, x, weight, *tables, focus_length, padding, backend, need_x, need_weight)
    # an operator returns tensors: one that was not wanted is empty
    return (
        x.new_empty(0) if grad_x is None else grad_x.contiguous(),
        weight.new_empty(0) if grad_weight is None else grad_weight.contiguous(),
    )


@_shiftwise_conv2d_backward.register_fake
def _(
        grad_h, grad_v, grad_i, x, weight, horizontal, vertical, identity, mask, focus_length, padding, backend, need_x,
        need_weight):
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup(ctx, inputs, output):
    x, weight, horizontal, vertical, identity, mask, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, horizontal, vertical, identity, mask)


def _backward(ctx, *grads):
    need_x, need_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = torch.ops.timm_shiftwise.shiftwise_conv2d_backward(
        *grads, *ctx.saved_tensors, *ctx.settings, need_x, need_weight)
    return grad_x if need_x else None, grad_weight if need_weight else None, *[None] * 7


def _setup_backward(ctx, inputs, output):
    *tensors, focus_length, padding, backend, ctx.need_x, ctx.need_weight = inputs
    ctx.settings = (focus_length, padding, backend)
    ctx.save_for_backward(*tensors)


def _double_backward(ctx, over_x, over_weight):
    """Derivative of the gradients by what they are made of; either gradient may not have been wanted."""
    *grads, x, weight, horizontal, vertical, identity, mask = ctx.saved_tensors
    rest = (horizontal, vertical, identity, mask, *ctx.settings)
    conv = torch.ops.timm_shiftwise.shiftwise_conv2d
    backward = torch.ops.timm_shiftwise.shiftwise_conv2d_backward
    out: list[Tensor | None] = [None] * 5
    terms = []
    if ctx.need_x:
        terms.append(conv(over_x, weight, *rest))
        out[4] = backward(*grads, over_x, weight, *rest, False, True)[1]
    if ctx.need_weight:
        if mask is not None:
            over_weight = over_weight * mask[:, :, None, None]
        terms.append(conv(x, over_weight, *rest))
        out[3] = backward(*grads, x, over_weight, *rest, True, False)[0]
    out[:3] = [sum(branch) for branch in zip(*terms, strict=True)]
    return *out, *[None] * 9


_shiftwise_conv2d.register_autograd(_backward, setup_context=_setup)
_shiftwise_conv2d_backward.register_autograd(_double_backward, setup_context=_setup_backward)

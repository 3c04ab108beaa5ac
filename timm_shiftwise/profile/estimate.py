"""What a network takes on a GPU that is not at hand, estimated from what its calls of PyTorch compute and move.

Nothing is computed: the network, or an operator alone, runs on tensors without values while every call is noted. A call
lasts as long as the slower of its arithmetic and its memory traffic, and a launch besides (a roofline). Depthwise
convolutions are taken for PyTorch's own kernels, whose threads do the multiply-adds that meet the map, one by one.

The rates are public figures of the device and a share of them that such kernels reach. The shares, and so all times,
are assumptions: no network was timed for them.
"""
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from timm_shiftwise.layers import MergedConv2d, MergedShiftConv2d, ShiftwiseConv2d
from timm_shiftwise.ops.shiftwise_conv.ways import WAYS, Way, choose_way

from .kept import check_network, stage_blocks
from .network import StageProfile, profile_model
from .operators import block_operator
from .ways import call_of

BASELINE = 'convnext_tiny'
"""The network that every estimate is set beside."""
DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'float32': torch.float32}
STREAMED, PERMUTED = .8, .5
"""Shares of the memory's bandwidth that are reached in order, and by copies that change the order."""
SINGLE = .7
"""Share of the arithmetic in float32 that matrix products reach."""
LAUNCH = 4e-6
"""Seconds that a launch takes."""
_NO_FIGURES = 'channels_last'
"""A way of whose convolutions, cuDNN's own for large depthwise kernels, no rate is known."""


class Accelerator(NamedTuple):
    """A GPU: public figures, and what is assumed to be reached of them.

    Attributes:
        name: What it is called.
        bandwidth: Of its memory, TB/s.
        half: Matrix products in float16 and bfloat16, dense, summed in float32, TFLOP/s.
        matrix: Of these reached by the small ones among them, TFLOP/s; assumed.
        single: Arithmetic in float32 without TF32, TFLOP/s.
        depthwise: Multiply-adds of depthwise convolutions, 10**12/s; assumed, and for all but the first two scaled
            from the A100 by the number of multiprocessors and their clock.
    """
    name: str
    bandwidth: float
    half: float
    matrix: float
    single: float
    depthwise: float

    def seconds(self, work: 'Work') -> float:
        """Time of a call."""
        products = self.matrix if work.half else SINGLE * self.single
        arithmetic = 2 * work.products / products + work.depthwise / self.depthwise
        traffic = (work.streamed / STREAMED + work.permuted / PERMUTED) / self.bandwidth
        return max(arithmetic, traffic) / 1e12 + LAUNCH

    def assumptions(self) -> str:
        """The figures in a sentence, for people."""
        return (
            f'{self.bandwidth:g} TB/s, of which {STREAMED:.0%} are reached in order and {PERMUTED:.0%} by copies that '
            f'permute; matrix products in half precision at {self.matrix:g} of {self.half:g} TFLOP/s, in float32 '
            f'(no TF32) at {SINGLE * self.single:.3g} of {self.single:g}; {self.depthwise:g} T multiply-adds/s in '
            f'depthwise convolutions; {1e6 * LAUNCH:g} microseconds a launch')


ACCELERATORS = {
    'a100': Accelerator('NVIDIA A100 SXM, 80 GB', 2.04, 312, 140, 19.5, 1.),
    'h100': Accelerator('NVIDIA H100 SXM', 3.35, 989, 320, 66.9, 1.5),
    'h200': Accelerator('NVIDIA H200 SXM', 4.8, 989, 320, 66.9, 1.5),
    'a10': Accelerator('NVIDIA A10', .6, 125, 56, 31.2, .8),
    'l4': Accelerator('NVIDIA L4', .3, 121, 54, 30.3, .78),
    'rtx3090': Accelerator('NVIDIA GeForce RTX 3090', .936, 71, 32, 35.6, .91),
    'rtx4090': Accelerator('NVIDIA GeForce RTX 4090', 1.008, 165, 74, 82.6, 2.1),
}


class Work(NamedTuple):
    """What one call of PyTorch does.

    Attributes:
        products: Multiply-adds of matrix products, and of convolutions that run as such.
        depthwise: Multiply-adds of depthwise convolutions that meet the map.
        streamed: Bytes that are read and written in order.
        permuted: Bytes of a copy that changes the order.
        half: Whether the result is in half precision.
    """
    products: int
    depthwise: int
    streamed: int
    permuted: int
    half: bool


class WorkCounter(TorchDispatchMode):
    """Notes the work of every call that launches a kernel, in ``works``; looks inside this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []

    def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == 'prim':  # a question for a tensor's device
            return NotImplemented
        with self:
            if func.namespace == 'timm_shiftwise':
                return OPDEFS[func.name().partition('.')[0]]._init_fn(*args, **kwargs)
            parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if not func.is_view and func.overloadpacket.__name__ not in _LAUNCH_NOTHING and _tensors(out):
            self.works.append(_work(func.overloadpacket, args, kwargs, out))
        return out


_LAUNCH_NOTHING = {
    'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', 'as_strided_', '_unsafe_view'}


def _work(packet: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Work:
    name, outs = packet.__name__, _tensors(out)
    # a norm goes over its input once for the statistics, or the gradients' sums, and once more to apply them
    read, written = (sum(map(_bytes, tensors)) for tensors in (_tensors((args, kwargs)), outs))
    moved = written + (2 if '_norm' in name else 1) * read
    products = depthwise = permuted = 0
    if name in ('clone', 'copy_', '_to_copy'):
        source, target = (args[1], args[0]) if name == 'copy_' else (args[0], outs[0])
        if _innermost(source) != _innermost(target):
            permuted, moved = moved, 0
    if name == 'convolution' and args[8] > 1:
        depthwise = outs[0][:, :, 0, 0].numel() * _meeting(args[0], args[1], args[4])
    elif name == 'convolution_backward' and args[9] > 1:
        depthwise = sum(args[10][:2]) * args[0][:, :, 0, 0].numel() * _meeting(args[1], args[2], args[5])
    elif packet in flop_registry:
        products = flop_registry[packet](*args, **kwargs, out_val=out) // 2
    return Work(products, depthwise, moved, permuted, outs[0].element_size() == 2)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """What a tensor fills: elements that a view repeats, as the windows of an unfolded map are, come from caches."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return min(tensor.numel(), reach) * tensor.element_size()


def _innermost(tensor: Tensor) -> int:
    """Axis along which neighbours lie side by side in memory."""
    strides = [(stride, -axis) for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
               if size > 1 and stride > 0]
    return -min(strides, default=(0, 0))[1]


def _meeting(x: Tensor, kernel: Tensor, padding: Sequence[int]) -> int:
    """Elements of a kernel that lie over the map, summed over all positions of an output plane."""
    count = 1
    for side, length, pad in zip(x.shape[2:], kernel.shape[2:], padding, strict=True):
        positions = range(-pad, side + pad - length + 1)
        count *= sum(min(side, at + length) - max(0, at) for at in positions)
    return count


@dataclass(frozen=True)
class Times:
    """Estimated times of a network.

    Attributes:
        step_ms: Forward and backward of a batch in milliseconds, without the optimiser; None of a merged network.
        image_ms: Inference in milliseconds an image, merged.
    """
    step_ms: float | None
    image_ms: float


@dataclass(frozen=True)
class StageEstimate:
    """Estimated times of a stage's operators, all layers together.

    Attributes:
        stage: Number of the stage, from 1.
        layers: Operators that it has.
        way: The way that is taken.
        ways_ms: Forward and backward of a batch in milliseconds, by the ways that there are.
    """
    stage: int
    layers: int
    way: str
    ways_ms: dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """Estimated times of a network on a GPU, beside those of :data:`BASELINE`.

    Attributes:
        on: The GPU.
        assumptions: What was assumed of it, for people.
        batch_size: Images in a batch.
        dtype: Of weights and maps.
        stages: The operators in training; none of a merged network or one of large kernels.
        ours: The whole network.
        baseline: The network that it is set beside, on images of the same size.
        baseline_model: Its name.
    """
    on: str
    assumptions: str
    batch_size: int
    dtype: str
    stages: tuple[StageEstimate, ...]
    ours: Times
    baseline: Times
    baseline_model: str = BASELINE


def estimate_model(
        model: nn.Module, on: str, *, batch_size: int = 128, dtype: str = 'bfloat16',
        img_size: int | Sequence[int] | None = None) -> Estimate:
    """Estimate what a training step and inference take on a GPU that need not be there.

    The ways are those that are taken where nothing is measured; which groups are kept does not matter to them.

    Args:
        model: A network of this package, on any device; it stays as it is.
        on: One of :data:`ACCELERATORS`.
        batch_size: Images in a batch.
        dtype: One of :data:`DTYPES`, of the whole network: autocast, which keeps some maps in float32, moves more.
        img_size: Side of the image, or height and width, in pixels; None for what the network was made for.

    Raises:
        TypeError: If the model is no network of this package.
        ValueError: If an argument is out of its range.
    """
    network = check_network(model)
    for name, value, allowed in (('on', on, ACCELERATORS), ('dtype', dtype, DTYPES)):
        if value not in allowed:
            raise ValueError(f'{name} must be one of {", ".join(allowed)}, got {value!r}.')
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, got {batch_size}.')
    accelerator, network = ACCELERATORS[on], copy.deepcopy(network).to('meta')
    profile = profile_model(network, img_size=img_size)
    channels = next(layer.in_channels for layer in network.stem.modules() if isinstance(layer, nn.Conv2d))
    images = torch.empty(batch_size, channels, profile.height, profile.width, dtype=DTYPES[dtype], device='meta')
    baseline = timm.create_model(BASELINE, in_chans=channels, num_classes=network.num_classes, device='meta')
    stages = [
        _stage(blocks, stage, accelerator, images)
        for blocks, stage in zip(stage_blocks(network), profile.stages, strict=True)
        if isinstance(block_operator(blocks[0]), ShiftwiseConv2d)]
    return Estimate(
        accelerator.name, accelerator.assumptions(), batch_size, dtype, tuple(stages),
        _times(network, accelerator, images), _times(baseline, accelerator, images))


def _stage(
        blocks: list[nn.Module], stage: StageProfile, accelerator: Accelerator, images: Tensor) -> StageEstimate:
    operator = block_operator(blocks[0])
    assert isinstance(operator, ShiftwiseConv2d)
    call = call_of(operator, images.new_empty(len(images), stage.channels, stage.height, stage.width))

    def computed_by(way: Way) -> None:
        way.forward(call)
        way.backward((call.x, call.x, call.x), call, True, True)

    ways_ms = {
        name: stage.blocks * _milliseconds(partial(computed_by, way), accelerator)
        for name, way in WAYS.items() if name != _NO_FIGURES and way.obstacle(call) is None}
    return StageEstimate(stage.stage, stage.blocks, choose_way(call).way.name, ways_ms)


def _times(network: nn.Module, accelerator: Accelerator, images: Tensor) -> Times:
    network = network.to(images.dtype)
    merged = any(isinstance(module, (MergedConv2d, MergedShiftConv2d)) for module in network.modules())
    step = None if merged else _milliseconds(lambda: network.train()(images).sum().backward(), accelerator)
    network = reparameterize_model(network.eval())
    # fake tensors on a GPU know no derivatives, but what looks at the device takes them for real
    with FakeTensorMode(), torch.inference_mode():
        held = {name: _on_a_gpu(value) for name, value in (*network.named_parameters(), *network.named_buffers())}
        call = partial(functional_call, network, held, _on_a_gpu(images))
        return Times(step, _milliseconds(call, accelerator) / len(images))


def _on_a_gpu(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device='cuda')


def _milliseconds(function: Callable[[], Any], accelerator: Accelerator) -> float:
    with WorkCounter() as counter:
        function()
    return 1e3 * sum(map(accelerator.seconds, counter.works))

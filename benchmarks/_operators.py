"""Operators that more than one benchmark times, and their definition, which they are checked against."""
import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from _common import check_close, definition
from torch import Tensor, nn

from timm_shiftwise.layers import LargeKernelConv2d, MergedConv2d, ShiftwiseConv2d
from timm_shiftwise.ops import shiftwise_conv2d
from timm_shiftwise.sparsity.masks import random_mask

GHOST_RATIO = 0.23
SHUFFLES = 4
PATHS = 2
_CHECKED_CHANNELS = 8


def noise(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    """Normal noise that is the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


class Call:
    """Something to time, forward alone or with its gradients.

    Args:
        function: Gives the outputs.
        leaves: The tensors whose gradients are taken.
    """

    def __init__(self, function: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor]) -> None:
        self.function = function
        self.leaves = [leaf.requires_grad_() for leaf in leaves]
        self.grads = [  # in the memory format of the outputs, as the layer after would hand them back
            torch.empty_like(out).copy_(noise(*out.shape, device=out.device, seed=1 + i))
            for i, out in enumerate(self.forward())
        ]

    @torch.no_grad()
    def forward(self) -> Sequence[Tensor]:
        """The outputs."""
        return self.function()

    def training(self) -> Sequence[Tensor]:
        """The outputs and the gradients of the leaves."""
        outputs = self.function()
        return *outputs, *torch.autograd.grad(outputs, self.leaves, self.grads)


def shiftwise_layer(
        dim: int,
        focus_length: int,
        kernel_size: int,
        density: float,
        device: torch.device,
        ghost_ratio: float = GHOST_RATIO,
) -> ShiftwiseConv2d:
    """The layer of sw_tiny, part of its groups kept, with weights and statistics unlike the initial ones."""
    layer = ShiftwiseConv2d(
        dim, focus_length, kernel_size, num_paths=PATHS, num_shuffles=SHUFFLES, ghost_ratio=ghost_ratio)
    channels, maps = layer.kept_groups().shape
    layer.group_mask.copy_(random_mask((channels, maps), round(density * channels * maps), seed=0, step=0, layer=0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.kernels.copy_(torch.randn(layer.kernels.shape, generator=generator) * .1)
        for norm in (layer.norm_h, layer.norm_v, layer.norm_i):
            for values, low in ((norm.weight, .5), (norm.bias, -.5), (norm.running_mean, -.5), (norm.running_var, .5)):
                values.copy_(torch.rand(channels, generator=generator) + low)
    return layer.to(device)


class Operator:
    """The operator of a layer in the form that trains: three branches, no norms.

    Args:
        layer: Says which groups, and where.
        batch: Images.
        side: H and W of the map.
    """

    def __init__(self, layer: ShiftwiseConv2d, batch: int, side: int) -> None:
        self.x = noise(batch, layer.num_worked, side, side, device=layer.kernels.device)
        self.weight = layer.kernels.detach().sum(0)
        self.mask = layer.kept_groups()
        self.wiring = layer.wiring
        self.focus_length = layer.focus_length
        self.call = Call(self.run, [self.x, self.weight])

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three branches."""
        return shiftwise_conv2d(self.x, self.weight, self.wiring, self.focus_length, 'full', self.mask)

    def check(self, what: str) -> None:
        """Compare branches and gradients, as they come now, with the definition in float64, in some of the channels.

        Raises:
            AssertionError: If they differ.
        """
        chosen = torch.linspace(0, self.x.shape[1] - 1, _CHECKED_CHANNELS, device=self.x.device).long()
        *branches, grad_x, grad_weight = self.call.training()
        x, weight = (self.x.detach()[:, chosen], self.weight.detach()[chosen])
        x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
        with definition():
            wanted = shiftwise_conv2d(
                x, weight, self.wiring[:, chosen].contiguous(), self.focus_length, 'full', self.mask[chosen])
            grads = torch.autograd.grad(wanted, [x, weight], [grad[:, chosen].double() for grad in self.call.grads])
        seen = *(branch.detach()[:, chosen] for branch in branches), grad_x[:, chosen], grad_weight[chosen]
        check_close(seen, [*wanted, *grads], what)


def merged_layer(layer: ShiftwiseConv2d) -> MergedConv2d:
    """A layer merged for inference."""
    return copy.deepcopy(layer).eval().fuse()


@torch.no_grad()
def check_layer(seen: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, what: str) -> None:
    """Compare a function of the first image with a layer's output for it by its definition in float64.

    Raises:
        AssertionError: If they differ.
    """
    out, double = seen(x[:1]), copy.deepcopy(layer).double()
    with definition():
        wanted = double(x[:1].double())
    check_close([out], [wanted], what)


class SlakPair:
    """SLaK's N x M and M x N depthwise convolutions as PyTorch runs them, two maps, neither norms nor their sum.

    Args:
        layer: SLaK's layer.
        x: Input [B, C, H, W].
    """

    def __init__(self, layer: LargeKernelConv2d, x: Tensor) -> None:
        self.layer, self.x = layer, x
        self.call = Call(lambda: (layer.conv_h(x), layer.conv_v(x)), [x, layer.conv_h.weight, layer.conv_v.weight])

    @torch.no_grad()
    def check(self) -> None:
        """Compare with the definition of the shift-wise convolution, the large kernels cut into small ones (Eq. 1-3).

        Raises:
            AssertionError: If they differ.
        """
        kernel_size, focus_length = self.layer.kernel_size, self.layer.focus_length
        cut = ShiftwiseConv2d(_CHECKED_CHANNELS, focus_length, kernel_size, operator='eq_slak', device=self.x.device)
        kernels = [conv.weight[:_CHECKED_CHANNELS, 0].double() for conv in (self.layer.conv_h, self.layer.conv_v)]
        wide, tall = (F.pad(kernel, [0, -focus_length % kernel_size]) for kernel in (kernels[0], kernels[1].mT))
        wide, tall = (kernel.unflatten(2, (-1, kernel_size)).transpose(1, 2) for kernel in (wide, tall))
        square = self.layer.conv_i.weight[:_CHECKED_CHANNELS].double()
        with definition():
            wanted = shiftwise_conv2d(
                self.x[:, :_CHECKED_CHANNELS].double(), torch.cat([wide, tall.mT, square], dim=1).contiguous(),
                cut.wiring, focus_length)
        check_close([out[:, :_CHECKED_CHANNELS] for out in self.call.forward()], wanted[:2], "SLaK's pair")


def seven(x: Tensor) -> Call:
    """ConvNeXt's 7 x 7 depthwise convolution, with its bias."""
    conv = nn.Conv2d(x.shape[1], x.shape[1], 7, padding=3, groups=x.shape[1], device=x.device)
    return Call(lambda: (conv(x),), [x, *conv.parameters()])

"""Every family of networks, small enough for tests, with no weight or statistic at its initial value."""
import copy
import re
from collections.abc import Sequence

import pytest
import timm
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.utils import reparameterize_model
from torch import Tensor, nn

from timm_shiftwise.layers import ShiftwiseConv2d
from timm_shiftwise.ops.shiftwise_conv.ways import WAYS

FAMILIES = {
    'sw': 'sw_tiny',
    'sw_v2': 'sw_v2_tiny',
    'p_sw': 'p_sw_tiny',
    'p2_sw': 'p2_sw_tiny',
    'eq_slak': 'eq_slak_tiny',
    'slak': 'slak_tiny',
}
"""A registered name of each family."""

TWO_STAGES = dict(depths=(1, 1), dims=(8, 12), focus_lengths=(15, 7), num_classes=10)
"""An image is at least 8 pixels high and wide, and its last map an eighth of it."""

FOUR_STAGES = dict(depths=(1, 1, 2, 1), dims=(8, 12, 16, 20), focus_lengths=(15, 13, 11, 7), num_classes=10)

WAYS_ON_CPUS = [way for way in WAYS if way != 'triton']
"""Names of the ways that can be taken without a GPU."""

each_family = pytest.mark.parametrize('family', FAMILIES)


def family_of(name: str) -> str:
    """The family that a registered name belongs to."""
    # grown networks are of family sw: they differ from its others in arguments alone
    return re.sub('_(tiny|small|base|large)$', '', name.removeprefix('test_').replace('_convnext', ''))


def registered_families() -> set[str]:
    """Families of all names that this package has registered."""
    modules = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    return {family_of(name) for name, module in modules.items() if module.startswith('timm_shiftwise.')}


def make(family: str, **kwargs) -> nn.Module:
    """A small network of a family, in training mode, about 40 % of its small kernels pruned."""
    return unsettle(timm.create_model(FAMILIES[family], **{**TWO_STAGES, **kwargs}))


def merged(model: nn.Module) -> nn.Module:
    """The network in its form for inference."""
    return reparameterize_model(copy.deepcopy(model).eval())


def assert_all_close(seen: Sequence[Tensor], wanted: Sequence[Tensor], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Compare two lists of tensors."""
    for a, b in zip(seen, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def image(*shape: int, seed: int = 0, **kwargs) -> Tensor:
    """Noise [B, C, H, W] that is the same in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


@torch.no_grad()
def unsettle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw weights that keep the signal's size, and affine parameters, statistics and masks unlike the initial ones.

    Takes a network or one operator, and returns it.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, ShiftwiseConv2d):
            uniform(module.kernels, -0.3, 0.3)
            module.group_mask.copy_(torch.rand(module.group_mask.shape, generator=generator) < 0.6)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = (3 / module.weight[0].numel()) ** 0.5
            uniform(module.weight, -bound, bound)
            if module.bias is not None:
                uniform(module.bias, -0.2, 0.2)
        elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, GlobalResponseNorm)):
            uniform(module.weight, 0.5, 1.5)
            uniform(module.bias, -0.2, 0.2)
        if isinstance(module, nn.BatchNorm2d):
            uniform(module.running_mean, -0.2, 0.2)
            uniform(module.running_var, 0.5, 1.5)
        if isinstance(getattr(module, 'gamma', None), nn.Parameter):
            uniform(module.gamma, 0.3, 0.8)
    return model

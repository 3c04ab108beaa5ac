"""Short sparse training runs of a small network."""
import timm
import torch
from torch import Tensor, nn

from timm_shiftwise.layers import ShiftwiseConv2d


def make_model(**kwargs) -> nn.Module:
    """A small network whose groups are exchanged at every second step."""
    settings = dict(prune_interval=2, sparsity_steps=20, backend='torch', num_classes=5)
    return timm.create_model('test_sw', **dict(settings, **kwargs))


def backward(model: nn.Module, generator: torch.Generator) -> None:
    """Gradients of the loss of a batch of noise."""
    x = torch.randn(4, 3, 32, 32, generator=generator)
    target = torch.randint(0, 5, (4,), generator=generator)
    nn.functional.cross_entropy(model(x), target).backward()


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    """Train on noise that is the same in every call."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, generator)
        optimizer.step()


def masks_of(model: nn.Module) -> list[Tensor]:
    """Copies of the masks [P, C, K] of all layers."""
    return [layer.group_mask.clone() for layer in model.modules() if isinstance(layer, ShiftwiseConv2d)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two lists hold equal tensors."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def pruned_weights(layer: ShiftwiseConv2d) -> Tensor:
    """Which weights belong to pruned groups, boolean [P, C, K, N, N]."""
    return ~layer.group_mask[..., None, None].expand_as(layer.kernels)

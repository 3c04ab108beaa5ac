"""Giving the BatchNorms of a network's operators the statistics of its data, without a change of what it computes.

A network grown from a ConvNeXt has BatchNorms where the ConvNeXt has none. What they would see is not known when it is
grown, so that they compute something else in training than in evaluation.
"""
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_shiftwise.layers import ShiftwiseConv2d


class _Statistics:
    """Mean and variance of each channel of what a module is given, gathered in float64; a forward pre-hook."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())  # sum of squared distances from the mean

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().transpose(0, 1).flatten(1).double()  # [C, B * H * W]
        count, mean = x.shape[1], x.mean(1)
        distance, share = mean - self.mean, count / (self.count + count)
        # the first batch stands alone, the others are added to it (Chan et al., 1979)
        self.squares = self.squares + (x - mean[:, None]).square().sum(1) + distance.square() * self.count * share
        self.mean = self.mean + distance * share
        self.count += count

    @property
    def variance(self) -> Tensor:
        """Variance without a correction for its degrees of freedom, as training mode normalises by."""
        return self.squares / self.count


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to what every module was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def calibrate(model: nn.Module, loader: Iterable[Any], batches: int | None = None) -> nn.Module:
    """Let the BatchNorms of all shift-wise operators know the statistics of images.

    Running statistics become those of the images, and weights and biases change so that every norm computes in
    evaluation mode what it did before. In training mode it then does so in expectation. Call it before the optimiser is
    made, on images prepared as in training.

    Args:
        model: A network of ours, not merged, or what holds one.
        loader: Batches of images [B, in_chans, H, W], alone or first in a tuple or list.
        batches: How many batches to take; None for all.

    Returns:
        The network, in the mode in which it came.

    Raises:
        ValueError: If the network has no such norm, the number of batches is below 1, or what the norms see is empty or
            not finite. The network is then as it was.
    """
    if batches is not None and batches < 1:
        raise ValueError(f'batches must be at least 1, got {batches!r}.')
    norms = [
        norm for layer in model.modules() if isinstance(layer, ShiftwiseConv2d)
        for norm in layer.children() if isinstance(norm, _BatchNorm)]
    if not norms:
        raise ValueError('The network has no BatchNorm in a shift-wise operator: is it merged for inference?')
    seen = [_Statistics() for _ in norms]
    hooks = [norm.register_forward_pre_hook(statistics) for norm, statistics in zip(norms, seen, strict=True)]
    parameter = next(model.parameters())
    try:
        with evaluating(model):
            for batch in islice(loader, batches):
                images = batch[0] if isinstance(batch, (tuple, list)) else batch
                model(images.to(parameter.device, parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    if not all(statistics.count and statistics.squares.isfinite().all() for statistics in seen):
        raise ValueError('The norms saw no images, or values that are not finite: nothing was set.')
    for norm, statistics in zip(norms, seen, strict=True):
        _keep_function(norm, statistics.mean, statistics.variance)
    return model


def _keep_function(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Give a norm other running statistics, and the weight and bias with which it computes the same."""
    old_mean, old_variance = norm.get_buffer('running_mean'), norm.get_buffer('running_var')
    scale = norm.weight.double() / (old_variance.double() + norm.eps).sqrt()
    norm.bias.copy_(norm.bias.double() + scale * (mean - old_mean.double()))
    norm.weight.copy_(scale * (variance + norm.eps).sqrt())
    old_mean.copy_(mean)
    old_variance.copy_(variance)

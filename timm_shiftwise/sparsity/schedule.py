"""The schedule of grouped shift-wise sparsity, carried by the model through any training script.

Source: Shift-ConvNets (arXiv 2401.12736), Section 3.3; SLaK (arXiv 2207.03620), Section 4.
"""
import logging
from itertools import islice
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from timm_shiftwise.layers import ShiftwiseConv2d

from .follow import follow
from .masks import (
    first_masks,
    largest_masks,
    prune_and_regrow,
    prune_rate_at,
    snip_counts,
    snip_saliency,
    uniform_counts,
)
from .sharding import multiply, whole

_logger = logging.getLogger(__name__)

INITIALISATIONS = ('snip', 'uniform', 'magnitude')

# values of the buffer `phase`
WAITING = 0
"""No masks drawn yet: they follow from the gradients of the first optimiser step."""
RUNNING = 1
"""Masks drawn; groups are pruned and regrown at every interval."""
FIXED = 2
"""Masks stay as they are: weights that are fine-tuned keep theirs."""


class SparsitySchedule(nn.Module):
    """Prunes and regrows the groups of a network's shift-wise operators while it trains.

    At the first optimiser step SNIP saliency, under one threshold over all layers, says how many groups each path of
    each layer keeps; which ones is drawn at random. Then, every ``prune_interval`` steps, each loses its kept groups of
    smallest magnitude and grows as many drawn at random, from zero. Every ``mask_sharing_interval``-th time the paths
    of a layer get one mask, otherwise each exchanges groups of its own. The share removed decays by a cosine to 0.005
    over ``sparsity_steps``, after which the masks stay. `docs/training.md` compares this with the authors' release.

    The state (masks in the layers, phase and step here) lives in buffers: a resumed run goes on where it stopped, and
    EMA copies and ranks stay in step. Weights loaded through ``pretrained=True``, and weights that meet a new
    optimiser, keep their masks.

    Args:
        stages: The operators of each stage.
        sparsity: Share of all groups to prune, 0 up to, not including, 1; 0 leaves every mask as it is.
        prune_rate: Share of a layer's kept groups that the first update exchanges, 0 to 1.
        prune_interval: Optimiser steps between updates.
        sparsity_init: ``'snip'``, ``'uniform'`` (the same share in every layer) or ``'magnitude'``: the groups of
            largest magnitude under one threshold over all layers, drawn by nothing. It spares what was learned: groups
            that only branches of norm weight zero read go first, all but one of each channel in a network just grown.
        sparsity_steps: Length of the run in optimiser steps.
        sparsity_seed: Seed of the draws.
        mask_sharing_interval: Updates from one that gives the paths of a layer one mask to the next that does; 1 for
            every update.
        device: Device of the buffers.

    Raises:
        ValueError: If a setting is out of its range.
    """
    phase: Tensor
    step: Tensor

    def __init__(
            self, stages: list[list[ShiftwiseConv2d]], sparsity: float, prune_rate: float, prune_interval: int,
            sparsity_init: str = 'snip', sparsity_steps: int = 93_600, sparsity_seed: int = 0,
            mask_sharing_interval: int = 1, device=None) -> None:
        super().__init__()
        if not _is_number(sparsity) or not 0 <= sparsity < 1:
            raise ValueError(f'sparsity must be at least 0 and below 1, got {sparsity!r}.')
        if not _is_number(prune_rate) or not 0 <= prune_rate <= 1:
            raise ValueError(f'prune_rate must be between 0 and 1, got {prune_rate!r}.')
        _check_integer('prune_interval', prune_interval, 1)
        _check_integer('sparsity_steps', sparsity_steps, 1)
        _check_integer('sparsity_seed', sparsity_seed, 0)
        _check_integer('mask_sharing_interval', mask_sharing_interval, 1)
        if sparsity_init not in INITIALISATIONS:
            raise ValueError(f'sparsity_init must be one of {INITIALISATIONS}, got {sparsity_init!r}.')
        self.sparsity = sparsity
        self.prune_rate = prune_rate
        self.prune_interval = prune_interval
        self.sparsity_init = sparsity_init
        self.sparsity_steps = sparsity_steps
        self.sparsity_seed = sparsity_seed
        self.mask_sharing_interval = mask_sharing_interval
        # a tuple, not a ModuleList: the layers belong to the network, which names them in its state dict
        self._stages = tuple(tuple(stage) for stage in stages)
        self.register_buffer('phase', torch.tensor(WAITING, dtype=torch.int64, device=device))
        self.register_buffer('step', torch.tensor(0, dtype=torch.int64, device=device))
        # what the buffers hold, so that a step on an accelerator need not wait for their values
        self._phase = WAITING
        self._step = 0
        self._fresh_optimizer = False
        if self.sparsity > 0:
            follow(self)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.sparsity > 0:
            follow(self)  # a copy trains as the original does

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.phase.device.type != 'meta':
            self._phase, self._step = int(self.phase), int(self.step)

    def fuse(self) -> nn.Module:
        """What stands in the schedule's place in a network for inference: nothing."""
        return nn.Identity()

    @torch.jit.ignore
    def layers(self) -> list[ShiftwiseConv2d]:
        """The operators that are followed, in the order of the network."""
        return [layer for stage in self._stages for layer in stage]

    @torch.jit.ignore
    def sparsity_per_stage(self) -> list[float]:
        """Share of pruned groups in each stage, those of every path counted, as the masks stand."""
        shares = []
        for stage in self._stages:
            masks = torch.cat([layer.group_mask.flatten() for layer in stage])
            shares.append(1 - int(masks.sum()) / len(masks))
        return shares

    @torch.jit.ignore
    def followed_parameters(self) -> list[nn.Parameter]:
        """See :class:`timm_shiftwise.sparsity.follow.Follower`.

        Raises:
            RuntimeError: If a wrapper took the weights of a network in training apart, so that no optimiser holds them.
        """
        weights = [layer.kernels for layer in self.layers()]
        if self.training and not all(isinstance(weight, nn.Parameter) and weight.ndim == 5 for weight in weights):
            raise RuntimeError(
                'The sparsity schedule cannot follow weights that are no parameters of their own any more: '
                'FullyShardedDataParallel flattens them. Shard the network by torch.distributed.fsdp.fully_shard, or '
                'create it with sparsity=0.')
        return weights

    def _trained(self) -> list[tuple[int, ShiftwiseConv2d]]:
        """The layers that have gradients, with their index: frozen ones, and those that features drop, have none."""
        return [(i, layer) for i, layer in enumerate(self.layers()) if layer.kernels.grad is not None]

    @torch.jit.ignore
    def before_step(self, optimizer: Optimizer) -> None:
        """Draw the masks at the first step, whose gradients tell the densities."""
        self._fresh_optimizer = len(optimizer.state) == 0
        if self._phase == WAITING and self._trained():
            self._draw_masks(optimizer)

    @torch.jit.ignore
    def after_step(self, optimizer: Optimizer) -> None:
        """Count the step, and prune and regrow when the interval is over."""
        if self._phase != RUNNING:
            return
        if self._step > 0 and self._fresh_optimizer and len(optimizer.state) > 0:
            # weights that have trained meet an optimiser that has not: somebody fine-tunes them
            self._set(FIXED, self._step)
            _log('Fine-tuning keeps the masks of the loaded weights; pruned groups per stage: %s.', self._shares())
            return
        self._set(RUNNING, self._step + 1)
        if self._step % self.prune_interval == 0 and self._step < self.sparsity_steps:
            self._update_masks(optimizer)

    def _draw_masks(self, optimizer: Optimizer) -> None:
        trained = self._trained()
        for (_, layer), masks in zip(trained, self._first_masks(trained), strict=True):
            self._put_masks(layer, masks, optimizer)
            multiply(cast(Tensor, layer.kernels.grad), layer.group_mask[..., None, None])
        self._set(RUNNING, 0)
        _log(
            'Training sparse: %.0f %% of the small kernels are pruned (per stage: %s), exchanged every %d steps '
            'over %d. sparsity=0 trains the dense network.',
            100 * self.sparsity, self._shares(), self.prune_interval, self.sparsity_steps)

    def _first_masks(self, trained: list[tuple[int, ShiftwiseConv2d]]) -> list[Tensor]:
        if self.sparsity_init == 'magnitude':
            return largest_masks(
                [_magnitude(layer) for _, layer in trained], [_heard(layer) for _, layer in trained], self.sparsity)
        if self.sparsity_init == 'snip':
            saliencies = [
                path for _, layer in trained
                for path in snip_saliency(whole(layer.kernels), whole(cast(Tensor, layer.kernels.grad)))]
            counts = iter(snip_counts(saliencies, self.sparsity))
        else:
            sizes = [path.numel() for _, layer in trained for path in layer.group_mask]
            counts = iter(uniform_counts(sizes, self.sparsity))
        return [
            first_masks(layer.group_mask.shape, list(islice(counts, len(layer.group_mask))), self.sparsity_seed, index)
            for index, layer in trained]

    def _update_masks(self, optimizer: Optimizer) -> None:
        rate = prune_rate_at(self._step, self.sparsity_steps, self.prune_rate)
        shared = self._step // self.prune_interval % self.mask_sharing_interval == 0
        for index, layer in self._trained():
            masks = prune_and_regrow(
                layer.group_mask, _magnitude(layer), rate, shared, self.sparsity_seed, self._step, index)
            self._put_masks(layer, masks, optimizer)

    @staticmethod
    def _put_masks(layer: ShiftwiseConv2d, masks: Tensor, optimizer: Optimizer) -> None:
        """Set masks; weights and what the optimiser knows of them stay where a group stands before and after."""
        masks = masks.to(layer.group_mask.device)
        keep = (layer.group_mask & masks)[..., None, None]
        layer.group_mask.copy_(masks)
        multiply(layer.kernels, keep)
        for value in optimizer.state.get(layer.kernels, {}).values():
            if isinstance(value, Tensor) and value.shape == layer.kernels.shape:
                multiply(value, keep)

    def _set(self, phase: int, step: int) -> None:
        self._phase, self._step = phase, step
        self.phase.fill_(phase)
        self.step.fill_(step)

    def _shares(self) -> str:
        return ', '.join(f'{100 * share:.1f} %' for share in self.sparsity_per_stage())

    def extra_repr(self) -> str:
        """What the schedule's own line in a printed model says."""
        return (
            f'sparsity={self.sparsity}, prune_rate={self.prune_rate}, prune_interval={self.prune_interval}, '
            f'sparsity_init={self.sparsity_init!r}, sparsity_steps={self.sparsity_steps}, '
            f'sparsity_seed={self.sparsity_seed}, mask_sharing_interval={self.mask_sharing_interval}'
        )


def keep_masks(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict that makes the model keep the masks it loads, whatever is trained afterwards."""
    phases = {
        f'{name}.phase': torch.tensor(FIXED) for name, module in model.named_modules()
        if isinstance(module, SparsitySchedule)
    }
    return {**state_dict, **phases}


def _magnitude(layer: ShiftwiseConv2d) -> Tensor:
    """Sum of ``|w|`` of every group, [P, C, K]."""
    return whole(layer.kernels).abs().sum(dim=(3, 4))


def _heard(layer: ShiftwiseConv2d) -> Tensor:
    """Which groups a branch reads whose norm has a weight other than zero, bool [C, K]."""
    wiring = layer.wiring.transpose(0, 1)  # [C, R, 2 * G + 1]
    branches = [
        whole(norm.weight) != 0 if isinstance(norm, nn.BatchNorm2d) else wiring.new_ones(len(wiring), dtype=torch.bool)
        for norm in (layer.norm_h, layer.norm_v, layer.norm_i)]
    groups = wiring.shape[2] // 2
    reads = torch.stack([*branches[:1] * groups, *branches[1:2] * groups, branches[2]], dim=1)  # [C, 2 * G + 1]
    heard = wiring.new_zeros(len(wiring), layer.num_maps)
    heard.scatter_add_(1, wiring.flatten(1).long(), reads[:, None].expand_as(wiring).flatten(1).to(heard.dtype))
    return heard > 0


def _log(message: str, *args) -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        _logger.info(message, *args)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_integer(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f'{name} must be an integer of at least {least}, got {value!r}.')

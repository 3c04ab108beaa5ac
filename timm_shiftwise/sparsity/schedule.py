"""The schedule of grouped shift-wise sparsity, carried by the model through any training script.

Source: Shift-ConvNets (arXiv 2401.12736), Section 3.3; SLaK (arXiv 2207.03620), Section 4.
"""
import logging
import warnings
from collections.abc import Mapping
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.types import Device

from timm_shiftwise.layers import ShiftwiseConv2d

from .follow import at_end_of_backward, follow
from .masks import (
    first_masks,
    largest_masks,
    prune_and_regrow,
    prune_rate_at,
    snip_counts,
    snip_saliency,
    uniform_counts,
)
from .optimizer_state import exchange_state
from .run_length import RunLength
from .sharding import keep_only, whole
from .steps import Step, Steps

_logger = logging.getLogger(__name__)

INITIALISATIONS = ('snip', 'uniform', 'magnitude')

# values of the buffer `phase`
WAITING = 0
"""No masks drawn yet: they follow from the gradients of the first optimiser step."""
RUNNING = 1
"""Masks drawn; groups are pruned and regrown at every interval."""
FIXED = 2
"""Masks stay as they are: weights that are fine-tuned keep theirs."""

LARGEST = {'phase': FIXED, 'step': 2 ** 62}
"""The largest value that each buffer may hold."""

States = Mapping[int, list[Mapping[str, Any]]]
"""What the optimisers that hold a layer's kernels know of them, by the layer's place in the network."""


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
            sparsity_init: str = 'snip', sparsity_steps: int = 93_900, sparsity_seed: int = 0,
            mask_sharing_interval: int = 1, device: Device = None) -> None:
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
        # what was last read from the buffers, and which tensors, how often written, that was
        self._known = WAITING, 0
        self._written: list[tuple[int, int]] = []
        self._steps = Steps()
        self._scores: dict[int, Tensor | None] = {}  # until the masks are drawn
        self._run = RunLength(sparsity_steps)
        self._has_warned = False
        if self.sparsity > 0:
            follow(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, '_written': [], '_scores': {}})
        if self.sparsity > 0:
            follow(self)  # a copy trains as the original does

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        errors = args[-1]
        for name in LARGEST:
            key = f'{prefix}{name}'
            problem = wrong_state(key, state_dict[key]) if key in state_dict else ''
            if problem:
                errors.append(f'{problem}.')
                state_dict[key] = getattr(self, name)  # nothing is changed
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._written = []

    def reset_parameters(self) -> None:
        """Go back to before the first step, as a new network is."""
        self._write(WAITING, 0)

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
        """See :class:`timm_shiftwise.sparsity.follow.Follower`; none of weights that cannot be followed."""
        if self.phase.is_meta:
            return []
        weights, lost = [], []
        for i, stage in enumerate(self._stages):
            for j, layer in enumerate(stage):
                weight = layer._parameters.get('kernels')
                if weight is None or weight.ndim != 5:
                    lost.append(f'stages.{i}.blocks.{j}.conv_dw.kernels')
                else:
                    weights.append(weight)
        if not lost:
            return weights
        if self.training and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f'The sparsity schedule of a network does not prune it: {lost[0]} is no parameter of its own any more, '
                'so that no optimiser tells of its steps. FullyShardedDataParallel flattens weights: shard the network '
                'by torch.distributed.fsdp.fully_shard. Parametrizations replace them. For a network that is to stay '
                'as it is, sparsity=0 says so.', stacklevel=2)
        return []

    @torch.jit.ignore
    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, held: list[int]) -> None:
        """Draw the masks at the first step, whose gradients tell the densities."""
        weights = self.followed_parameters()
        in_backward = at_end_of_backward(self._end_backward)
        last = self._steps.begin(optimizer, held, weights, in_backward)
        if last is not None:
            self._count(last)
        if self._state()[0] != WAITING:
            return
        for i, weight in enumerate(weights):
            # layers that are frozen, and those that features drop, have no gradient
            if weight.grad is not None and i not in self._scores:
                self._scores[i] = self._score(weight)
        if self._scores and not in_backward:
            self._draw_masks({i: [optimizer.state.get(weights[i], {})] for i in held})

    @torch.jit.ignore
    def after_step(self, optimizer: Optimizer, held: list[int]) -> None:
        """Count the network's step if this completes it, and prune and regrow when the interval is over."""
        step = self._steps.end(optimizer, held, self.followed_parameters())
        if step is None:
            return
        self._count(step)
        phase, number = self._state()
        if phase == RUNNING and _is_first_rank():
            self._run.notice(optimizer, number)

    @torch.no_grad()
    def _end_backward(self) -> None:
        step = self._steps.close(self.followed_parameters())
        if step is not None:
            self._count(step)

    def _count(self, taken: Step) -> None:
        if self._state()[0] == WAITING and self._scores:
            self._draw_masks(taken.states)
        phase, step = self._state()
        if phase == RUNNING and step > 0 and taken.is_first:
            # weights that have trained meet optimisers that have not: somebody fine-tunes them
            phase = FIXED
            self._write(phase, step)
            _log('Fine-tuning keeps the masks of the loaded weights; pruned groups per stage: %s.', self._shares())
        if phase == RUNNING:
            step += 1
            self._write(phase, step)
            if step % self.prune_interval == 0 and step < self.sparsity_steps:
                self._update_masks(step, taken.states)
                return
        if phase != WAITING:
            # some optimisers, such as Kron, move weights that have no gradient
            layers = self.layers()
            for i in taken.states:
                keep_only(layers[i].kernels, layers[i].group_mask[..., None, None])

    def _score(self, weight: nn.Parameter) -> Tensor | None:
        """What decides how many groups each path of a layer keeps, [P, C, K]; None if it is the same share in all."""
        return snip_saliency(whole(weight), whole(cast(Tensor, weight.grad))) if self.sparsity_init == 'snip' else None

    def _draw_masks(self, states: States) -> None:
        layers, scores = self.layers(), dict(sorted(self._scores.items()))
        self._scores.clear()
        for i, masks in zip(scores, self._first_masks(scores), strict=True):
            _put_masks(layers[i], masks, states.get(i, []))
        self._write(RUNNING, 0)
        _log(
            'Training sparse: %.0f %% of the small kernels are pruned (per stage: %s), exchanged every %d steps '
            'over %d. sparsity=0 trains the dense network.',
            100 * self.sparsity, self._shares(), self.prune_interval, self.sparsity_steps)

    def _first_masks(self, scores: Mapping[int, Tensor | None]) -> list[Tensor]:
        """Masks [P, C, K] with which each of the layers that have a score starts."""
        layers = [self.layers()[i] for i in scores]
        if self.sparsity_init == 'magnitude':
            return largest_masks(list(map(_magnitude, layers)), list(map(_heard, layers)), self.sparsity)
        if self.sparsity_init == 'snip':
            counts = snip_counts([path for score in scores.values() for path in cast(Tensor, score)], self.sparsity)
        else:
            counts = uniform_counts([path.numel() for layer in layers for path in layer.group_mask], self.sparsity)
        left = iter(counts)
        return [
            first_masks(layer.group_mask.shape, list(islice(left, len(layer.group_mask))), self.sparsity_seed, i)
            for i, layer in zip(scores, layers, strict=True)]

    def _update_masks(self, step: int, states: States) -> None:
        layers = self.layers()
        rate = prune_rate_at(step, self.sparsity_steps, self.prune_rate)
        shared = step // self.prune_interval % self.mask_sharing_interval == 0
        for i, known in states.items():
            masks = prune_and_regrow(
                layers[i].group_mask, _magnitude(layers[i]), rate, shared, self.sparsity_seed, step, i)
            _put_masks(layers[i], masks, known)

    def _state(self) -> tuple[int, int]:
        """Phase and step, of which the buffers are the truth, whoever wrote them.

        On an accelerator they are read where somebody else did, or every step would wait for it.
        """
        if self.phase.device.type == 'cpu':
            return int(self.phase), int(self.step)
        written = self._versions()
        if written != self._written:
            self._known, self._written = (int(self.phase), int(self.step)), written
        return self._known

    def _write(self, phase: int, step: int) -> None:
        self.phase.fill_(phase)
        self.step.fill_(step)
        self._known, self._written = (phase, step), self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        return [(id(buffer), buffer._version) for buffer in (self.phase, self.step)]

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


def _put_masks(layer: ShiftwiseConv2d, masks: Tensor, states: list[Mapping[str, Any]]) -> None:
    """Set masks; weights and what optimisers know of them stay where a group stands before and after."""
    weight, masks = layer.kernels, masks.to(layer.group_mask.device)
    keep, grown = layer.group_mask & masks, ~layer.group_mask & masks
    layer.group_mask.copy_(masks)
    keep_only(weight, keep[..., None, None])
    if weight.grad is not None:
        keep_only(weight.grad, masks[..., None, None])
    exchange_state(states, weight, keep, grown)


def wrong_state(key: str, value: Tensor) -> str:
    """What is wrong with a phase or a step that a checkpoint holds; empty if nothing.

    Args:
        key: Its name, which ends in ``phase`` or ``step``.
        value: The tensor.
    """
    if value.is_meta:
        return ''
    most = LARGEST[key.rpartition('.')[2]]
    number = value.item() if value.numel() == 1 and not value.is_complex() else -1
    if 0 <= number <= most and number == int(number):
        return ''
    return f'{key} must hold one integer of 0 to {most}, it holds {value.tolist()}'


def _magnitude(layer: ShiftwiseConv2d) -> Tensor:
    """Sum of ``|w|`` of every group, [P, C, K]."""
    return whole(layer.kernels).abs().sum(dim=(3, 4))


def _heard(layer: ShiftwiseConv2d) -> Tensor:
    """Which groups a branch reads whose norm has a weight other than zero, bool [C, K]."""
    wiring = layer.wiring.transpose(0, 1)  # [C, R, 2 * G + 1]
    branches = [
        wiring.new_ones(len(wiring), dtype=torch.bool) if isinstance(norm, nn.Identity) else whole(norm.weight) != 0
        for norm in (layer.norm_h, layer.norm_v, layer.norm_i)]
    groups = wiring.shape[2] // 2
    reads = torch.stack([*branches[:1] * groups, *branches[1:2] * groups, branches[2]], dim=1)  # [C, 2 * G + 1]
    heard = wiring.new_zeros(len(wiring), layer.num_maps)
    heard.scatter_add_(1, wiring.flatten(1).long(), reads[:, None].expand_as(wiring).flatten(1).to(heard.dtype))
    return heard > 0


def _log(message: str, *args: Any) -> None:
    if _is_first_rank():
        _logger.info(message, *args)


def _is_first_rank() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_integer(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f'{name} must be an integer of at least {least}, got {value!r}.')

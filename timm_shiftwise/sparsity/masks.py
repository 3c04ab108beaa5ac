"""How many groups each layer keeps, and which: the arithmetic of grouped shift-wise sparsity.

A *group* is one small kernel of one channel on one path. Source: Shift-ConvNets (arXiv 2401.12736), Section 3.3, which
follows SLaK (arXiv 2207.03620), Section 4; saliency from SNIP (arXiv 1810.02340), Eq. 6. `docs/training.md` compares
each rule with the authors' release.

Every draw follows from (seed, step, layer, path) alone, so that all ranks of a distributed run, a rerun and a resumed
run agree.
"""
import math

import numpy as np
import torch
from torch import Tensor

FINAL_PRUNE_RATE = 0.005
"""Prune rate at the end of the cosine decay."""

DENSE_FROM = 0.99
"""A layer of which at least this share is drawn to be kept stays dense for the whole run."""


def snip_saliency(weight: Tensor, grad: Tensor) -> Tensor:
    """Saliency of every group, the mean of ``|w * grad|`` over its weights.

    Args:
        weight: Kernels [P, C, K, N, N].
        grad: Their gradient, of the same shape.

    Returns:
        Saliency [P, C, K], float32.
    """
    return (weight.float() * grad.float()).abs().mean(dim=(3, 4))


def snip_counts(saliencies: list[Tensor], sparsity: float) -> list[int]:
    """Groups that each path of each layer keeps under one threshold over all of them.

    Args:
        saliencies: Saliency [C, K] of each path of each layer.
        sparsity: Share of all groups to prune, 0 up to, not including, 1.

    Returns:
        A count for each path, at least 1; together the wanted number of groups (rounded), or one per path if that is
        more. Where no saliency is positive and finite the share is the same everywhere.
    """
    sizes = [s.numel() for s in saliencies]
    flat = torch.cat([s.flatten().cpu().double() for s in saliencies])
    if not torch.isfinite(flat).all() or not (flat > 0).any():
        return uniform_counts(sizes, sparsity)
    total = max(round((1 - sparsity) * len(flat)), len(sizes))
    # a stable sort: of equal saliencies the earlier layer's is kept, on every machine
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[flat.argsort(descending=True, stable=True)[:total]] = True
    counts = [int(part.sum()) for part in kept.split(sizes)]
    for _ in range(counts.count(0)):
        counts[counts.index(max(counts))] -= 1
    return [max(count, 1) for count in counts]


def largest_masks(magnitudes: list[Tensor], heard: list[Tensor], sparsity: float) -> list[Tensor]:
    """Masks of the groups of largest magnitude under one threshold over all layers.

    Args:
        magnitudes: Sum of ``|w|`` of the groups of each layer, [P, C, K].
        heard: Which of them have a part in the output, boolean [C, K]. These come before all that have none.
        sparsity: Share of all groups to prune, 0 up to, not including, 1.

    Returns:
        Boolean masks [P, C, K] on the CPU for each layer, counts as :func:`snip_counts` gives them.
    """
    above = 1 + max(magnitude.max() for magnitude in magnitudes).double()
    scores = [magnitude.double() + above * part for magnitude, part in zip(magnitudes, heard, strict=True)]
    masks = []
    for score, count in zip(scores, snip_counts(scores, sparsity), strict=True):
        mask = torch.zeros(score.shape, dtype=torch.bool)
        mask.view(-1)[score.flatten().cpu().argsort(descending=True, stable=True)[:count]] = True
        masks.append(mask)
    return masks


def uniform_counts(sizes: list[int], sparsity: float) -> list[int]:
    """Groups that each layer, or path of one, keeps when the share is the same in all, at least 1 each."""
    return [max(round((1 - sparsity) * size), 1) for size in sizes]


def random_mask(shape: tuple[int, ...], count: int, seed: int, step: int, layer: int, path: int = 0) -> Tensor:
    """A mask on the CPU with ``count`` kept groups drawn at random."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[_order(mask.numel(), seed, step, layer, path)[:count]] = True
    return mask


def first_masks(shape: tuple[int, ...], counts: list[int], seed: int, layer: int) -> Tensor:
    """Masks with which a layer starts: as many groups of each path as were counted, drawn at random.

    Args:
        shape: P, C and K.
        counts: Groups that each path keeps. Where they are 99 % of the layer or more, it stays dense: of a mask without
            pruned groups an exchange grows what it removes.
        seed: Seed of the schedule.
        layer: Index of the layer.

    Returns:
        Boolean masks [P, C, K] on the CPU.
    """
    if sum(counts) >= DENSE_FROM * math.prod(shape):
        return torch.ones(shape, dtype=torch.bool)
    return torch.stack([random_mask(shape[1:], count, seed, 0, layer, path) for path, count in enumerate(counts)])


def prune_and_regrow(
        mask: Tensor, magnitude: Tensor, rate: float, shared: bool, seed: int, step: int, layer: int) -> Tensor:
    """Remove the kept groups of smallest magnitude and grow as many pruned ones, drawn at random.

    A group that was just removed may be drawn: then it was never gone.

    Args:
        mask: Kept groups, boolean [P, C, K].
        magnitude: Sum of ``|w|`` of each group over its weights, [P, C, K].
        rate: Share of a path's kept groups to remove, rounded up.
        shared: Whether the paths get one mask: magnitudes are then summed over them, and those of the first path's
            groups are removed that are among the smallest sums, as many as it has pruned and has to remove together.
            Else each path exchanges groups of its own.
        seed: Seed of the schedule.
        step: Optimiser steps taken.
        layer: Index of the layer.

    Returns:
        The new masks, boolean [P, C, K] on the CPU; each keeps as many groups as before, or as the first if shared.
    """
    mask = mask.cpu()
    magnitude = magnitude.detach().cpu().double().masked_fill(~mask, 0)
    if shared:
        summed = magnitude.sum(0).masked_fill(~mask.any(0), -1)
        return _exchanged(mask[0], summed, rate, (seed, step, layer, 0)).repeat(len(mask), 1, 1)
    magnitude = magnitude.masked_fill(~mask, -1)
    return torch.stack([
        _exchanged(kept, of_path, rate, (seed, step, layer, path))
        for path, (kept, of_path) in enumerate(zip(mask, magnitude, strict=True))])


def _exchanged(mask: Tensor, magnitude: Tensor, rate: float, draw: tuple[int, ...]) -> Tensor:
    """A mask [C, K] after an exchange.

    Args:
        mask: Kept groups.
        magnitude: Magnitude of each group [C, K]; -1, below that of a kept group of zeros, where none is kept.
        rate: Share of the kept groups to remove, rounded up.
        draw: What the draw follows from.
    """
    kept = int(mask.sum())
    number = mask.numel() - kept + math.ceil(rate * kept)
    new = mask.flatten().clone()
    new[magnitude.flatten().argsort(stable=True)[:number]] = False
    order = _order(len(new), *draw)
    new[order[~new[order]][:kept - int(new.sum())]] = True
    return new.view_as(mask)


def prune_rate_at(step: int, steps: int, initial: float) -> float:
    """Prune rate after a number of optimiser steps: a cosine from ``initial`` to 0.005 over ``steps``."""
    final = min(initial, FINAL_PRUNE_RATE)
    return final + (initial - final) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.)))


def _order(size: int, *draw: int) -> Tensor:
    state = np.random.SeedSequence(draw).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device='cpu').manual_seed(int(state) >> 1)
    return torch.randperm(size, generator=generator, device='cpu')

"""How many groups each layer keeps, and which: the arithmetic of grouped shift-wise sparsity.

A *group* is one small kernel of one channel on all paths. Source: Shift-ConvNets (arXiv 2401.12736), Section 3.3, which
follows SLaK (arXiv 2207.03620), Section 4; saliency from SNIP (arXiv 1810.02340), Eq. 6.

Every draw follows from (seed, step, layer) alone, so that all ranks of a distributed run, a rerun and a resumed run
agree.
"""
import math

import numpy as np
import torch
from torch import Tensor

FINAL_PRUNE_RATE = 0.005
"""Prune rate at the end of the cosine decay."""


def snip_saliency(weight: Tensor, grad: Tensor) -> Tensor:
    """Saliency of every group, the mean of ``|w * grad|`` over its weights.

    Args:
        weight: Kernels [P, C, K, N, N].
        grad: Their gradient, of the same shape.

    Returns:
        Saliency [C, K], float32.
    """
    return (weight.float() * grad.float()).abs().mean(dim=(0, 3, 4))


def snip_counts(saliencies: list[Tensor], sparsity: float) -> list[int]:
    """Groups that each layer keeps under one threshold over all layers.

    Args:
        saliencies: Saliency [C, K] of each layer.
        sparsity: Share of all groups to prune, 0 up to, not including, 1.

    Returns:
        A count for each layer, at least 1; together the wanted number of groups (rounded), or one per layer if that is
        more. Where no saliency is positive and finite the share is the same in every layer.
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
        magnitudes: Sum of ``|w|`` of the groups of each layer.
        heard: Which of them have a part in the output, boolean. These come before all that have none.
        sparsity: Share of all groups to prune, 0 up to, not including, 1.

    Returns:
        A boolean mask on the CPU for each layer, counts as :func:`snip_counts` gives them.
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
    """Groups that each layer keeps when the share is the same in all, at least 1 each."""
    return [max(round((1 - sparsity) * size), 1) for size in sizes]


def random_mask(shape: tuple[int, ...], count: int, seed: int, step: int, layer: int) -> Tensor:
    """A mask on the CPU with ``count`` kept groups drawn at random."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[_order(mask.numel(), seed, step, layer)[:count]] = True
    return mask


def prune_and_regrow(
        mask: Tensor, magnitude: Tensor, rate: float, seed: int, step: int, layer: int) -> tuple[Tensor, Tensor]:
    """Remove the kept groups of smallest magnitude and grow as many pruned ones, drawn at random.

    A group that was just removed may be drawn: it then starts anew, from zero, like every other one that grows.

    Args:
        mask: Kept groups, boolean [C, K].
        magnitude: Sum of ``|w|`` of each group over its weights and paths, [C, K].
        rate: Share of the kept groups to remove, rounded up.
        seed: Seed of the schedule.
        step: Optimiser steps taken.
        layer: Index of the layer.

    Returns:
        What was left standing and what has grown: two boolean masks [C, K] on the CPU, disjoint.
    """
    mask, magnitude = mask.cpu().flatten(), magnitude.detach().cpu().double().flatten()
    kept = mask.nonzero().squeeze(1)
    removed = kept[magnitude[kept].argsort(stable=True)[:math.ceil(rate * len(kept))]]
    standing = mask.clone()
    standing[removed] = False
    order = _order(len(mask), seed, step, layer)
    grown = torch.zeros_like(mask)
    grown[order[~standing[order]][:len(removed)]] = True
    return standing, grown


def prune_rate_at(step: int, steps: int, initial: float) -> float:
    """Prune rate after a number of optimiser steps: a cosine from ``initial`` to 0.005 over ``steps``."""
    final = min(initial, FINAL_PRUNE_RATE)
    return final + (initial - final) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.)))


def _order(size: int, seed: int, step: int, layer: int) -> Tensor:
    state = np.random.SeedSequence((seed, step, layer)).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device='cpu').manual_seed(int(state) >> 1)
    return torch.randperm(size, generator=generator, device='cpu')

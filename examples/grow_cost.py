"""Latency of a grown network, merged, over that of the ConvNeXt it was grown from.

    python examples/grow_cost.py

Networks take turns in one process, so that whatever slows the machine down slows them alike; the ratios are of medians.
"""
import statistics

import timm
import torch
from timm.utils import reparameterize_model

from timm_shiftwise.profile.timing import take_turns

NAMES = ('convnext_tiny', 'sw_convnext_tiny', 'sw_tiny')
BATCH, SIZE, TURNS = 1, 224, 25


def merged(name: str) -> torch.nn.Module:
    """A network in its form for inference."""
    return reparameterize_model(timm.create_model(name).eval())


def main() -> None:
    """Print a table of the ratios."""
    models = [merged(name) for name in NAMES]
    print(f'PyTorch {torch.__version__}, {torch.get_num_threads()} threads, float32, {SIZE} pixels')
    times = take_turns(models, torch.randn(BATCH, 3, SIZE, SIZE), TURNS)
    base, *others = (statistics.median(taken) for taken in times)
    for name, time in zip(NAMES[1:], others, strict=True):
        print(f'batch {BATCH}: {name} takes {time / base:.2f} times as long as {NAMES[0]} ({base:.0f} ms)')


if __name__ == '__main__':
    main()

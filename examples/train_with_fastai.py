"""Sparse training, or fine-tuning, with fastai's vision_learner.

    pip install . fastai  # in a clone of this repository
    python examples/train_with_fastai.py PHOTOS --model sw_convnext_tiny --pretrained

PHOTOS has train/CLASS/*.jpg and val/CLASS/*.jpg. fastai takes any name that timm knows: it needs the import below, or
`timm-shiftwise enable` once. Of the network it keeps all but the head, the sparsity schedule included, but its own
optimisers are none of PyTorch's, whose steps the schedule follows: with them a network trains dense, masks from weights
stay. For sparse training give it one of PyTorch's, as below.

Expect fastai's table of losses and accuracy, and learner.pkl, which load_learner opens where this package is installed.
"""
import argparse
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from fastai.vision.all import ImageDataLoaders, Learner, OptimWrapper, Resize, accuracy, vision_learner

import timm_shiftwise  # noqa: F401  registers the models


def make_learner(folder: Path, name: str, pretrained: bool, epochs: int, batch_size: int = 64) -> Learner:
    """A learner for a folder of images, sparse if the network is and starts from scratch."""
    size = timm.get_pretrained_cfg(name).input_size[-1]
    data = ImageDataLoaders.from_folder(
        folder, train='train', valid='val', item_tfms=Resize(size), bs=batch_size, num_workers=0)
    steps = epochs * len(data.train)
    schedule: dict[str, Any] = dict(sparsity_steps=steps, prune_interval=max(10, steps // 46))
    return vision_learner(
        data, name, pretrained=pretrained, metrics=accuracy, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),
        **schedule)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--model', default='test_sw')
    parser.add_argument('--pretrained', action='store_true')
    parser.add_argument('--epochs', type=int, default=10)
    args = parser.parse_args()
    learner = make_learner(args.folder, args.model, args.pretrained, args.epochs)
    if args.pretrained:
        learner.fine_tune(args.epochs)
    else:
        learner.fit_one_cycle(args.epochs, 3e-3)
    learner.export('learner.pkl')

"""Handwritten digits as a folder of images.

The digits ship with scikit-learn: 1797 grey images of 8 x 8 pixels by 13 writers, the test set of "Optical Recognition
of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998), https://archive.ics.uci.edu/dataset/80.
"""
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = tuple('0123456789')
"""Names of the classes, in the order of their indices."""

HELD_OUT_EVERY = 5
"""Of each class, in the data set's own order, one image in so many is held out."""

_BRIGHTEST = 16  # strokes of the data set go from 0 to 16


def write_digits(folder: Path) -> tuple[int, int]:
    """Write the digits as PNG files, split into ``train/CLASS`` and ``val/CLASS``.

    The split is always the same. Every class is held out from in the same share.

    Args:
        folder: Directory to make; it must not exist.

    Returns:
        Numbers of training and of held-out images.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    for split in ('train', 'val'):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
    counts = {'train': 0, 'val': 0}
    seen = [0] * len(CLASSES)
    for strokes, label in zip(digits.images, digits.target, strict=True):
        split = 'val' if seen[label] % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else 'train'
        grey = np.round(strokes * (255 / _BRIGHTEST)).astype(np.uint8)  # [8, 8]
        Image.fromarray(grey).save(folder / split / CLASSES[label] / f'{seen[label]:03d}.png')
        seen[label] += 1
        counts[split] += 1
    return counts['train'], counts['val']

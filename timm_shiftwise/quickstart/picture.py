"""A picture of images with what the network says of them."""
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from .digits import CLASSES
from .training import Scores

_RIGHT, _WRONG = '#1a7f37', '#cf222e'


def draw_predictions(files: list[Path], scores: Scores, path: Path) -> None:
    """Draw the first held-out image of every class, and below it those the network found hardest.

    Args:
        files: The images.
        scores: What the network says of them, in the same order.
        path: PNG file to write.
    """
    probabilities = scores.logits.softmax(1).numpy()  # [images, classes]
    labels = scores.labels.numpy()
    of_truth = probabilities[np.arange(len(labels)), labels]
    first = [int(np.flatnonzero(labels == index)[0]) for index in range(len(CLASSES))]
    hardest = of_truth.argsort(kind='stable')[:len(CLASSES)].tolist()

    # a Figure of its own: pyplot, and with it the backend of whoever calls, is left alone
    figure = Figure(figsize=(12, 3.9), facecolor='white')
    FigureCanvasAgg(figure)
    figure.suptitle(
        f'Held-out handwritten digits: {len(labels) - scores.mistakes} of {len(labels)} right '
        f'({scores.accuracy:.1f} %)', fontsize=14, fontweight='bold')
    rows = ((first, 'One of each'), (hardest, 'The hardest'))
    axes = figure.subplots(len(rows), len(CLASSES))
    for row, (indices, title) in zip(axes, rows, strict=True):
        row[0].set_ylabel(title, fontsize=12)
        for ax, index in zip(row, indices, strict=True):
            guess = int(probabilities[index].argmax())
            right = guess == labels[index]
            ax.imshow(Image.open(files[index]), cmap='gray', interpolation='bilinear')
            ax.set_xticks([])
            ax.set_yticks([])
            for spine in ax.spines.values():
                spine.set(color=_RIGHT if right else _WRONG, linewidth=3)
            said = f'{CLASSES[guess]}  ({100 * probabilities[index, guess]:.0f} %)'
            ax.set_title(said, fontsize=13, color=_RIGHT if right else _WRONG)
            if not right:
                ax.set_xlabel(f'is {CLASSES[labels[index]]}', fontsize=11, color=_WRONG)
    figure.tight_layout()
    figure.savefig(path, dpi=110)

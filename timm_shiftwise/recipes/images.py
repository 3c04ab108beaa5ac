"""Counting the images and classes of a folder as train.py will find them."""
from dataclasses import dataclass
from pathlib import Path

from timm.data import create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder


class RecipeError(ValueError):
    """A recipe cannot be made: the message names what was seen and what is allowed."""


@dataclass(frozen=True)
class Images:
    """What there is to learn from.

    Attributes:
        images: Number of training images.
        classes: Number of classes.
    """
    images: int
    classes: int


IMAGENET = Images(1_281_167, 1000)
"""ImageNet-1k."""


def count_images(folder: Path) -> Images:
    """Count the training images and classes of a folder, by timm's own reader.

    Args:
        folder: What train.py's `--data-dir` names, with `train/CLASS` and `val/CLASS` (or what else timm takes these
            names for, such as `validation`).

    Raises:
        RecipeError: If there is no such folder, no images, or train.py would score on something else than held-out
            images of the same classes.
    """
    if not folder.is_dir():
        raise RecipeError(f'{folder} is no folder')
    learned, held_out = _read(folder, 'train'), _read(folder, 'validation')
    for here, there, other in ((learned, held_out, 'validation'), (held_out, learned, 'training')):
        if foreign := sorted(here.class_to_idx.keys() - there.class_to_idx.keys()):
            raise RecipeError(
                f'{here.root} has the class {foreign[0]!r}, of which there are no {other} images in {there.root}: '
                f'both need the same classes, or their numbers would not agree')
    if len(learned.class_to_idx) < 2:
        raise RecipeError(f'{learned.root} has one class; at least 2 folders of images are needed')
    return Images(len(learned), len(learned.class_to_idx))


def _read(folder: Path, split: str) -> ReaderImageFolder:
    try:
        reader = create_dataset('', root=str(folder), split=split).reader
    except RuntimeError as error:  # no images
        raise RecipeError(str(error)) from error
    if Path(reader.root) == folder:  # what timm reads where it finds no folder of the split
        raise RecipeError(f'{folder} has no folder of {split} images; it needs train/CLASS and val/CLASS')
    return reader

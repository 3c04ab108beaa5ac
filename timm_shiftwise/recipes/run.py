"""A recipe fitted to a run: to its images, its GPUs and its length."""
import math
from dataclasses import dataclass
from typing import Any

import timm

from timm_shiftwise.sparsity import SparsitySchedule

from .images import Images, RecipeError
from .published import PUBLISHED_UPDATES, Recipe

LEAST_UPDATES = 50
"""Updates that an epoch keeps, if its images are enough: few images get a smaller total batch."""

LEAST_INTERVAL = 10
"""Updates between two exchanges at least, if the run is long enough: what has grown needs some to show its worth."""

_LEAST_BATCHES = 10  # of an epoch, where the size of a batch is left to us


@dataclass(frozen=True)
class Run:
    """The numbers of a run of train.py.

    Attributes:
        images: Number of training images.
        classes: Number of classes.
        gpus: Processes that train together.
        batch_size: Images of a process at a time.
        grad_accum_steps: Batches of a process in an update.
        epochs: Length, the warm-up included.
        warmup_epochs: Epochs of warm-up.
        lr: Peak learning rate.
        updates_per_epoch: Optimiser steps of an epoch.
    """
    images: int
    classes: int
    gpus: int
    batch_size: int
    grad_accum_steps: int
    epochs: int
    warmup_epochs: int
    lr: float
    updates_per_epoch: int

    @property
    def together(self) -> int:
        """Images that the processes see at a time."""
        return self.gpus * self.batch_size

    @property
    def total_batch(self) -> int:
        """Images of an update."""
        return self.together * self.grad_accum_steps

    @property
    def updates(self) -> int:
        """Optimiser steps of the run."""
        return self.epochs * self.updates_per_epoch


def plan_run(
        recipe: Recipe, images: Images, gpus: int, epochs: int | None = None, batch_size: int | None = None) -> Run:
    """Fit a recipe to a run.

    The total batch is the published one, or what leaves an epoch `LEAST_UPDATES` updates. The learning rate follows the
    square root of the total batch, as timm scales it for optimisers of Adam's kind. The warm-up keeps its share of the
    epochs.

    Args:
        recipe: What the network is trained with.
        images: What there is to learn from.
        gpus: Processes that train together.
        epochs: Length of the run, the warm-up included; None for the recipe's.
        batch_size: Images of a process at a time; None for the recipe's, or less if there are few images.

    Raises:
        RecipeError: If a number is out of its range.
    """
    for name, value in (('gpus', gpus), ('epochs', epochs), ('batch-size', batch_size)):
        if value is not None and value < 1:
            raise RecipeError(f'--{name} must be at least 1, got {value}')
    own = math.ceil(images.images / gpus)  # images of a process: DistributedSampler fills them up to the same number
    paired = any(recipe.settings.get(name) for name in ('mixup', 'cutmix'))
    if batch_size is None:
        batch_size = min(recipe.batch_size, max(own // _LEAST_BATCHES, 2))
        batch_size -= batch_size % 2 if paired else 0
    if batch_size > own:
        raise RecipeError(
            f'--batch-size {batch_size} leaves no whole batch of the {images.images} training images: at most {own} on '
            f'{counted(gpus, "GPU")}')
    if paired and batch_size % 2:
        raise RecipeError(f'--batch-size must be even, images of a batch are mixed in pairs; got {batch_size}')
    batches = own // batch_size  # train.py drops the rest
    accumulated = max(min(round(recipe.total_batch / (gpus * batch_size)), batches // LEAST_UPDATES), 1)
    length = epochs or recipe.epochs
    warmup = min(recipe.warmup_epochs, max(round(length * recipe.warmup_epochs / recipe.epochs), 1), length - 1)
    lr = recipe.lr * math.sqrt(gpus * batch_size * accumulated / recipe.total_batch)
    return Run(
        images=images.images,
        classes=images.classes,
        gpus=gpus,
        batch_size=batch_size,
        grad_accum_steps=accumulated,
        epochs=length,
        warmup_epochs=warmup,
        lr=float(f'{lr:.3g}'),
        updates_per_epoch=math.ceil(batches / accumulated),
    )


def own_schedule(model: str, **model_kwargs: Any) -> SparsitySchedule | None:
    """The schedule that a network has by its own defaults; None if it trains dense."""
    schedule = timm.create_model(model, device='meta', **model_kwargs).sparsity
    return schedule if isinstance(schedule, SparsitySchedule) and schedule.sparsity > 0 else None


def fit_schedule(schedule: SparsitySchedule | None, updates: int) -> dict[str, Any]:
    """Arguments of a network that fit its schedule to a run.

    A network's own interval is for a run of `PUBLISHED_UPDATES`. Another run has as many exchanges: the interval is the
    same share of it, at least `LEAST_INTERVAL`, and in a run too short for that, half of the run.

    Args:
        schedule: See :func:`own_schedule`; without one there is nothing to fit.
        updates: Optimiser steps of the run.
    """
    if schedule is None:
        return {}
    share = round(schedule.prune_interval * updates / PUBLISHED_UPDATES)
    interval = min(max(share, LEAST_INTERVAL), max(updates // 2, 1))
    return dict(sparsity_steps=updates, prune_interval=interval)


def counted(number: int, what: str) -> str:
    """A number of things, in words."""
    return f'{number:,} {what}{"" if number == 1 else "s"}'

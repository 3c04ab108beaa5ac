"""Training and scoring of a network on the digits, with timm's loaders, optimiser and scheduler."""
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
import torch.nn.functional as F
from timm.data import ImageDataset, create_dataset, create_loader, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_shiftwise.models import ShiftwiseNet
from timm_shiftwise.recipes import OPTIMISER, RECIPES, Images, Run, fit_schedule, own_schedule, plan_run

from .digits import CLASSES

MODEL = 'test_sw'
"""Name of the network that is trained."""

_RECIPE = RECIPES[MODEL]
BATCH_SIZE = _RECIPE.batch_size


class Progress(NamedTuple):
    """Where a training run stands after an optimiser step.

    Attributes:
        epoch: Epochs begun, 1 to the number of epochs.
        step: Optimiser steps taken in all.
        loss: Training loss of the epoch so far, averaged over its images.
        accuracy: Held-out top-1 in percent, of the last epoch that ended; None in the first.
    """
    epoch: int
    step: int
    loss: float
    accuracy: float | None


class Scores(NamedTuple):
    """What a network says of a set of images.

    Attributes:
        logits: [images, classes]
        labels: [images]
    """
    logits: Tensor
    labels: Tensor

    @property
    def accuracy(self) -> float:
        """Top-1 in percent."""
        return accuracy(self.logits, self.labels)[0].item()

    @property
    def mistakes(self) -> int:
        """Number of images whose class is not the one of the highest logit."""
        return int((self.logits.argmax(1) != self.labels).sum())


def count_steps(images: int, epochs: int) -> int:
    """Optimiser steps of a run; the last, smaller batch of an epoch is dropped."""
    return _plan(images, epochs).updates


def _plan(images: int, epochs: int) -> Run:
    return plan_run(_RECIPE, Images(images, len(CLASSES)), gpus=1, epochs=epochs, batch_size=BATCH_SIZE)


def image_size(model: nn.Module) -> int:
    """Side of the images that a network was made for, in pixels."""
    return resolve_model_data_config(model)['input_size'][-1]


def create_network(steps: int) -> ShiftwiseNet:
    """The untrained network, sparse as by default, its masks exchanged over a run of the given length.

    Args:
        steps: Optimiser steps of the run.
    """
    model = timm.create_model(
        MODEL,
        num_classes=len(CLASSES),
        **fit_schedule(own_schedule(MODEL), steps),
    )
    return cast(ShiftwiseNet, model)


def train_loader(folder: Path, model: nn.Module, device: torch.device) -> DataLoader[Any]:
    """Training images, cut out and stretched at random; digits are not mirrored."""
    dataset = create_dataset('folder', root=str(folder), split='train', is_training=True)
    return create_loader(
        dataset,
        batch_size=BATCH_SIZE,
        is_training=True,
        **{name: _RECIPE.settings[name] for name in ('scale', 'ratio', 'hflip', 'color_jitter')},
        **_loader_args(model, device),
    )


def held_out_loader(folder: Path, model: nn.Module, device: torch.device) -> DataLoader[Any]:
    """Held-out images in the order of their names, prepared as the network's own configuration says."""
    dataset = create_dataset('folder', root=str(folder), split='val')
    crop_pct = resolve_model_data_config(model)['crop_pct']
    return create_loader(dataset, batch_size=BATCH_SIZE, crop_pct=crop_pct, **_loader_args(model, device))


def _loader_args(model: nn.Module, device: torch.device) -> dict[str, Any]:
    config = resolve_model_data_config(model)
    return dict(
        input_size=config['input_size'],
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        # images of 8 x 8 pixels are read faster than a worker process hands them over
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
        device=device,
    )


def train(
        model: nn.Module, images: DataLoader[Any], held_out: DataLoader[Any], epochs: int,
        device: torch.device) -> Iterator[Progress]:
    """Train a network; it is in evaluation mode afterwards.

    Args:
        model: The network, on the device.
        images: Training images.
        held_out: Images whose accuracy is reported after every epoch; nothing is chosen by it.
        epochs: Times to go through the training images.
        device: Where to train.

    Yields:
        Where the run stands, after every optimiser step and at the end of every epoch.
    """
    run = _plan(len(cast(ImageDataset, images.dataset)), epochs)
    optimizer = create_optimizer_v2(model, **OPTIMISER, lr=run.lr)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched='cosine',
        num_epochs=epochs - run.warmup_epochs,
        warmup_epochs=run.warmup_epochs,
        warmup_prefix=True,
        warmup_lr=_RECIPE.warmup_lr,
        min_lr=_RECIPE.min_lr,
        step_on_epochs=False,
        updates_per_epoch=len(images),
    )
    step, top1 = 0, None
    for epoch in range(1, epochs + 1):
        model.train()
        loss_meter = AverageMeter()
        for x, labels in images:
            x, labels = x.to(device), labels.to(device)
            loss = F.cross_entropy(model(x), labels, label_smoothing=_RECIPE.settings['smoothing'])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            scheduler.step_update(step)
            loss_meter.update(loss.item(), len(x))
            yield Progress(epoch, step, loss_meter.avg, top1)
        top1 = score(model, held_out, device).accuracy
        yield Progress(epoch, step, loss_meter.avg, top1)


@torch.inference_mode()
def score(model: nn.Module, images: DataLoader[Any], device: torch.device) -> Scores:
    """Run a network over images; it is in evaluation mode afterwards."""
    model.eval()
    logits, labels = [], []
    for x, y in images:
        logits.append(model(x.to(device)).cpu())
        labels.append(y)
    return Scores(torch.cat(logits), torch.cat(labels))


def files_of(images: DataLoader[Any]) -> list[Path]:
    """Paths of a loader's images, in the data set's order."""
    return [Path(file) for file in cast(ImageDataset, images.dataset).filenames(absolute=True)]

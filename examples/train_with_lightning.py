"""Sparse training, or fine-tuning, under Lightning's Trainer.

    pip install . lightning  # in a clone of this repository
    python examples/train_with_lightning.py PHOTOS --model sw_tiny --epochs 100

PHOTOS has train/CLASS/*.jpg and val/CLASS/*.jpg. Lightning needs nothing of ours, timm the import below, or
`timm-shiftwise enable` once. The network is whole inside of the LightningModule, and its sparsity schedule hears of the
optimiser's steps as in any other loop: masks are drawn at the first and exchanged at every prune_interval-th, are in
checkpoints, and a run resumed by ckpt_path= goes on with them. From weights (--pretrained) they stay as they are.

Averaged weights: EMAWeightAveraging(use_buffers=False), the masks are copied then. Lightning's default averages masks,
counters and tables as if they were weights, which spoils them.

Expect the loss, accuracy in val_accuracy, and weights.pth, which `timm-shiftwise convert` takes.
"""
import argparse
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import Tensor
from torch.utils.data import DataLoader

import timm_shiftwise  # noqa: F401  registers the models


class Classifier(lightning.LightningModule):
    """A network of timm's with a loss, an optimiser and a learning rate that falls to zero."""

    def __init__(self, name: str, lr: float = 1e-3, **model_kwargs: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model(name, **model_kwargs)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=0.1)
        self.log('loss', loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        self.log('val_accuracy', (self.model(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.05)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {'optimizer': optimizer, 'lr_scheduler': {'scheduler': scheduler, 'interval': 'step'}}


def loader(folder: Path, split: str, name: str, batch_size: int, workers: int = 2) -> DataLoader:
    """Images of a folder as the network was made to see them."""
    dataset, is_training = create_dataset('folder', str(folder), split=split), split == 'train'
    data = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    dataset.transform = create_transform(**data, is_training=is_training)
    return DataLoader(dataset, batch_size, shuffle=is_training, drop_last=is_training, num_workers=workers)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--model', default='test_sw')
    parser.add_argument('--pretrained', action='store_true')
    parser.add_argument('--epochs', type=int, default=30)
    parser.add_argument('--batch-size', type=int, default=64)
    args = parser.parse_args()
    train, val = (loader(args.folder, split, args.model, args.batch_size) for split in ('train', 'val'))
    steps = args.epochs * len(train)
    classifier = Classifier(
        args.model, pretrained=args.pretrained, num_classes=len(train.dataset.reader.class_to_idx),
        sparsity_steps=steps, prune_interval=max(10, steps // 46))  # 46 exchanges, as published for sw_tiny
    lightning.Trainer(max_epochs=args.epochs).fit(classifier, train, val)
    torch.save(classifier.model.state_dict(), 'weights.pth')

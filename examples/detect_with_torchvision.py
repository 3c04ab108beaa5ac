"""Detection with torchvision: RetinaNet over a feature pyramid on one of our networks.

    pip install . scikit-learn  # in a clone of this repository
    python examples/detect_with_torchvision.py --model sw_convnext_tiny

torchvision knows nothing of timm; timm's features_only gives it the maps of strides 8, 16 and 32, on which its own
FeaturePyramidNetwork and RetinaNet work with their default anchors. timm needs the import below, or `timm-shiftwise
enable` once. FasterRCNN takes the same Pyramid.

features_only hands out the stages without their sparsity schedule: from weights the masks stay as they are, without
weights all is trained dense. Detectors train on few images at a time: the BatchNorms in the operators are frozen where
they come with weights. timm.utils.reparameterize_model(detector) merges what was trained.

Expect the loss to fall from 1.9 to about 0.5 in 100 steps on the digits below, which stand for your images, and most of
them to be found.
"""
import argparse
from collections.abc import Iterable

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import timm_shiftwise  # noqa: F401  registers the models


class Pyramid(nn.Module):
    """Five maps of strides 8 to 128, all of `out_channels` channels."""

    def __init__(self, name: str, pretrained: bool = True, out_channels: int = 256) -> None:
        super().__init__()
        body = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=(1, 2, 3))
        self.body = freeze_batch_norm_2d(body) if pretrained else body
        self.out_channels = out_channels
        self.fpn = FeaturePyramidNetwork(
            body.feature_info.channels(), out_channels, LastLevelP6P7(out_channels, out_channels))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps of images [B, 3, H, W], by name."""
        return self.fpn({str(i): out for i, out in enumerate(self.body(x))})


def detector(name: str, pretrained: bool = True, classes: int = 1, size: int = 800) -> RetinaNet:
    """RetinaNet for images whose shorter side is brought to `size` pixels."""
    cfg = timm.get_pretrained_cfg(name)
    return RetinaNet(Pyramid(name, pretrained), classes, min_size=size, image_mean=cfg.mean, image_std=cfg.std)


def batch(size: int = 4) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Pictures [3, 128, 128] with a digit each, values 0 to 1, and its box (x1, y1, x2, y2), of class 0."""
    digits, images, targets = torch.tensor(load_digits().images, dtype=torch.float32), [], []
    for strokes in digits[torch.randint(len(digits), (size,))]:  # [8, 8], 0 to 16
        side = int(torch.randint(32, 65, ()))
        x, y = torch.randint(128 - side, (2,)).tolist()
        image = 0.2 * torch.rand(3, 128, 128)
        image[:, y:y + side, x:x + side] += F.interpolate(strokes[None, None] / 20, size=side, mode='bilinear')[0]
        images.append(image)
        targets.append({'boxes': torch.tensor([[x, y, x + side, y + side]]).float(), 'labels': torch.tensor([0])})
    return images, targets


def train(model: nn.Module, batches: Iterable[tuple[list[Tensor], list[dict[str, Tensor]]]]) -> list[float]:
    """Train, and return the loss of every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for images, targets in batches:
        loss = torch.stack(list(model.train()(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='test_sw.digits')
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--steps', type=int, default=100)
    args = parser.parse_args()
    model = detector(args.model, size=args.size)
    print(*(f'{loss:.2f}' for loss in train(model, (batch() for _ in range(args.steps)))))
    images, targets = batch()
    with torch.inference_mode():
        for found, target in zip(model.eval()(images), targets, strict=True):
            print('is at', target['boxes'].tolist(), 'found at', found['boxes'][:1].round().tolist())

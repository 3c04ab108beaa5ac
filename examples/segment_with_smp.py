"""Segmentation with segmentation_models_pytorch: a U-Net, or another of its networks, on one of ours.

    pip install . scikit-learn segmentation-models-pytorch  # in a clone of this repository
    python examples/segment_with_smp.py --encoder tu-sw_convnext_tiny

smp takes any network of timm's that is registered: it needs the import below, or `timm-shiftwise enable` once, and the
prefix tu-. With encoder_weights=True the name may say where weights are: tu-test_sw.digits,
tu-local-dir:FOLDER, tu-hf-hub:you/sw_tiny_mine. Images have sides that are multiples of 32.

Unet, UnetPlusPlus, MAnet, Linknet, FPN, PSPNet, UPerNet, Segformer and DPT work; DeepLabV3, DeepLabV3Plus and PAN ask
for dilated stages (output_stride), which these networks do not have, and end with an error that says so. smp takes the
stages without their sparsity schedule: from weights the masks stay as they are, without weights all is trained dense.

Expect the loss to fall from about 1.5 to 0.2 in 30 steps on the digits below, which stand for your images.
"""
import argparse
from collections.abc import Iterable

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import timm_shiftwise  # noqa: F401  registers the models


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    """Digits on a noisy background, [B, 3, 64, 64], and which pixels are strokes, [B, 1, 64, 64]."""
    digits = torch.tensor(load_digits().images[:1000], dtype=torch.float32)[:, None] / 16  # [1000, 1, 8, 8]
    strokes = F.interpolate(digits[torch.randint(len(digits), (size,))], size=64, mode='bilinear')
    return (strokes + 0.3 * torch.randn(size, 3, 64, 64) - 0.5) / 0.5, (strokes > 0.5).float()


def train(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """Train, and return the loss of every step."""
    dice, cross_entropy = smp.losses.DiceLoss('binary'), smp.losses.SoftBCEWithLogitsLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for images, masks in batches:
        logits = model.train()(images)
        loss = dice(logits, masks) + cross_entropy(logits, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--encoder', default='tu-test_sw.digits')
    parser.add_argument('--no-weights', action='store_true')
    parser.add_argument('--steps', type=int, default=30)
    args = parser.parse_args()
    model = smp.Unet(args.encoder, encoder_weights=None if args.no_weights else True, classes=1)
    print(*(f'{loss:.3f}' for loss in train(model, (batch() for _ in range(args.steps)))))
    model.save_pretrained('unet')  # smp.from_pretrained('unet') builds and fills it anew

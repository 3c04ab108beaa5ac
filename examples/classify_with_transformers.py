"""Classification and feature maps with transformers, from a folder that `timm-shiftwise convert` wrote.

    pip install . transformers  # in a clone of this repository
    timm-shiftwise convert output/train/20260101-120000-sw_tiny-224 --output sw_tiny_mine
    python examples/classify_with_transformers.py sw_tiny_mine photo.jpg

The same works with the name of a repository on the Hub that `timm-shiftwise publish` made, and with networks merged for
inference (`convert --reparameterize`). transformers wraps timm (TimmWrapper): it needs the import below, or
`timm-shiftwise enable` once, and names of classes from `label_names` in config.json, or as id2label= here.

For feature maps there is TimmBackbone. In transformers 5.24 it sets the statistics of BatchNorms of any timm network
back after it has loaded them; freeze_batch_norm_2d=True keeps them. A merged network has none. The maps are in the
order of channels that timm's features_only has. To train, load with AutoModelForImageClassification: there the sparsity
schedule comes along, masks from weights stay; a TimmBackbone has the stages alone.

Expect the five likeliest classes of each image, and the shapes of three maps.
"""
import argparse
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoBackbone, AutoImageProcessor, TimmBackboneConfig, pipeline

import timm_shiftwise  # noqa: F401  registers the models


def classify(name: str, images: list[Image.Image]) -> list[list[dict[str, Any]]]:
    """Labels and scores of the five likeliest classes of each image."""
    return pipeline('image-classification', model=name)(images)


@torch.inference_mode()
def feature_maps(name: str, images: list[Image.Image], stages: tuple[int, ...] = (1, 2, 3)) -> tuple[Tensor, ...]:
    """Maps [B, C, H, W] of some stages of the network in a folder."""
    pixels = AutoImageProcessor.from_pretrained(name)(images)['pixel_values']
    # timm calls a folder local-dir:FOLDER, and a repository of the Hub hf-hub:NAME
    config = TimmBackboneConfig(backbone=f'local-dir:{name}', out_indices=stages, freeze_batch_norm_2d=True)
    return AutoBackbone.from_config(config, pretrained=True).eval()(pixels).feature_maps


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder')
    parser.add_argument('images', nargs='+')
    args = parser.parse_args()
    images = [Image.open(path).convert('RGB') for path in args.images]
    for path, found in zip(args.images, classify(args.folder, images), strict=True):
        print(path, *(f'{guess["label"]} {guess["score"]:.2f}' for guess in found), sep='  ')
    print([tuple(found.shape) for found in feature_maps(args.folder, images)])

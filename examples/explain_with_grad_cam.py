"""Where a network looks, with pytorch-grad-cam: a heat map over an image.

    pip install . grad-cam  # in a clone of this repository
    python examples/explain_with_grad_cam.py photo.jpg --model sw_convnext_tiny --output cam.png

grad-cam takes any PyTorch network and needs nothing but a layer with maps [B, C, H, W]: a stage of ours. It works alike
on networks merged for inference (--merged, or weights that are merged already), whose maps are the same. timm needs the
import below, or `timm-shiftwise enable` once.

Expect a picture with the image and the heat over it. The last stage has a map of 1/32 of the image's side; with small
images an earlier one (--stage 1) tells more.
"""
import argparse

import numpy as np
import timm
import torch
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from timm.data import create_transform, resolve_model_data_config
from timm.utils import reparameterize_model

import timm_shiftwise  # noqa: F401  registers the models


def explain(name: str, image: Image.Image, stage: int = -1, merged: bool = False) -> tuple[int, np.ndarray, np.ndarray]:
    """The likeliest class, the heat [H, W] of 0 to 1 for it, and a picture [H, W, 3] of 0 to 255 with both."""
    model = timm.create_model(name, pretrained=True).eval()
    if merged:
        model = reparameterize_model(model)
    data = resolve_model_data_config(model)
    pixels = create_transform(**data)(image.convert('RGB'))  # [3, H, W]
    with GradCAM(model, target_layers=[model.stages[stage]]) as cam:
        heat = cam(pixels[None], targets=None)[0]  # None: for the likeliest class
        guess = int(cam.outputs.argmax())
    mean, std = (torch.tensor(data[key])[:, None, None] for key in ('mean', 'std'))
    seen = (pixels * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()  # [H, W, 3]
    return guess, heat, show_cam_on_image(seen, heat, use_rgb=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('image')
    parser.add_argument('--model', default='test_sw.digits')
    parser.add_argument('--stage', type=int, default=-1)
    parser.add_argument('--merged', action='store_true')
    parser.add_argument('--output', default='cam.png')
    args = parser.parse_args()
    guess, _, picture = explain(args.model, Image.open(args.image), args.stage, args.merged)
    Image.fromarray(picture).save(args.output)
    print(f'class {guess}; {args.output} shows where it is seen')

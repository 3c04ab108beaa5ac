"""Draw docs/receptive_field.png: effective receptive fields of untrained networks, in a minute on two cores."""
import io
from pathlib import Path

import timm
import torch
from PIL import Image

import timm_shiftwise  # registers the models
from timm_shiftwise.receptive_field import ReceptiveField, layer_scales
from timm_shiftwise.receptive_field.picture import draw_receptive_fields

MODELS = ('sw_tiny', 'slak_tiny', 'convnext_tiny', 'inception_next_tiny')
LAYER_SCALE, SAMPLES, SIZE = 0.5, 20, 352  # the last map has an odd side


def measure(name: str) -> ReceptiveField:
    """Build a network with random weights and measure it."""
    torch.manual_seed(0)
    network = timm.create_model(name)
    with torch.no_grad():
        for scale in layer_scales(network):
            scale.fill_(LAYER_SCALE)
    return timm_shiftwise.erf(
        network, size=SIZE, samples=SAMPLES, name=name, weights=f'random, layer scale {LAYER_SCALE:g}')


if __name__ == '__main__':
    fields = [measure(name) for name in MODELS]
    picture = Image.open(io.BytesIO(draw_receptive_fields(fields)))
    # a hundred colours, or the noise of the scores would take a megabyte
    picture.convert('RGB').quantize(100).save(Path(__file__).with_name('receptive_field.png'), optimize=True)
    for field in fields:
        print(field.model, *(f'{square.share:.0%}: {square.side} px' for square in field.squares()), sep='  ')

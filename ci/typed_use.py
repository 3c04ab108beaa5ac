"""What a type checker makes of code that uses this package; mypy reads it, nobody runs it."""
# mypy: disallow-untyped-calls
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from typing_extensions import assert_type

import timm_shiftwise
from timm_shiftwise.layers import ShiftwiseConv2d
from timm_shiftwise.models import CheckpointError
from timm_shiftwise.ops import shift_add, shiftwise_conv2d
from timm_shiftwise.profile import network_groups, profile_model


def networks(images: Tensor, batches: Iterator[Tensor], weights: Mapping[str, Tensor]) -> None:
    """Networks, what they give and take, and what is said of them."""
    network = timm_shiftwise.ShiftwiseNet(num_classes=10)
    assert_type(network.forward_features(images), Tensor)
    assert_type(network.forward_head(images), Tensor)
    assert_type(network.num_features, int)
    assert_type(timm_shiftwise.calibrate(network, batches), nn.Module)
    assert_type(timm_shiftwise.grow('convnext_tiny'), nn.Module)
    assert_type(timm_shiftwise.released_channel_order(images, network), Tensor)
    try:
        assert_type(timm_shiftwise.checkpoint_filter_fn(weights, network), dict[str, Tensor])
    except CheckpointError as error:
        assert_type(str(error), str)
    assert_type(profile_model('sw_tiny').stages[0].way.name, str)
    assert_type(network_groups(network).stages[0].kept, int)


def receptive_field(model: nn.Module, images: list[Tensor], folder: Path) -> None:
    """The effective receptive field."""
    field = timm_shiftwise.erf(model, images, size=(224, 160))
    assert_type(field.scores, np.ndarray)
    assert_type(field.squares()[0].share, float)


def operators(x: Tensor, weight: Tensor, wiring: Tensor) -> None:
    """Operators and layers."""
    assert_type(shiftwise_conv2d(x, weight, wiring, focus_length=51), tuple[Tensor, Tensor, Tensor])
    assert_type(shift_add(x, wiring, focus_length=51, kernel_size=5), tuple[Tensor, Tensor, Tensor])
    assert_type(ShiftwiseConv2d(96, 51).kept_groups(), Tensor)

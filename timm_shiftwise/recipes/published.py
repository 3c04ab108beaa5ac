"""The settings that each network is trained with, and which of them are nobody's but ours.

Sources: Shift-ConvNets (arXiv 2401.12736) and its CVPR 2025 version, SLaK (arXiv 2207.03620), ConvNeXt (arXiv
2201.03545), whose training all of them follow.
"""
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

PUBLISHED_UPDATES = 93_900
"""Optimiser steps of the published runs: 300 epochs of ImageNet-1k in batches of 4096, 313 an epoch."""

OPTIMISER: dict[str, Any] = dict(opt='adamw', weight_decay=0.05)
"""The same for all networks. timm takes parameters of one dimension out of the weight decay, as is published."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        source: Whose settings these are, a sentence for the head of the file.
        settings: Augmentation, regularisation and precision, in train.py's argument names.
        ours: Why a setting, an argument of train.py or of the network, has a value that was not published.
        epochs: Length of the run, the warm-up included.
        warmup_epochs: Epochs of warm-up.
        lr: Peak learning rate.
        total_batch: Images of an optimiser step, all GPUs and accumulation steps together, that `lr` belongs to.
        batch_size: Images of a GPU at a time.
        min_lr: Learning rate at the end.
        warmup_lr: Learning rate at the start.
        model_kwargs: Arguments of the network that differ from its own defaults.
        published: Whether the settings are other people's, of runs on ImageNet-1k.
    """
    source: str
    settings: Mapping[str, Any]
    ours: Mapping[str, str] = field(default_factory=dict)
    epochs: int = 300
    warmup_epochs: int = 20
    lr: float = 4e-3
    total_batch: int = 4096
    batch_size: int = 64
    min_lr: float = 1e-6
    warmup_lr: float = 0.
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    published: bool = True

    def varied(self, ours: Mapping[str, str] | None = None, **settings: Any) -> 'Recipe':
        """The same with other settings, and further reasons for those that are ours."""
        return replace(self, settings={**self.settings, **settings}, ours={**self.ours, **(ours or {})})


_NOT_RUN = 'What is not published says "ours". The authors of this package have not run it on ImageNet.'

_SHIFTWISE = Recipe(
    source='the training settings of Shift-ConvNets (arXiv 2401.12736) and ShiftwiseConv (CVPR 2025). ' + _NOT_RUN,
    settings=dict(
        aa='rand-m9-mstd0.5-inc1',
        mixup=0.8,
        cutmix=1.0,
        smoothing=0.1,
        reprob=0.25,
        remode='pixel',
        interpolation='bicubic',
        train_interpolation='bicubic',
        drop_path=0.1,
        amp=True,
        amp_dtype='bfloat16',
        model_ema=False,
    ),
    ours=dict(amp='the published runs are in float32, which `amp: false` gives.'),
)


def _as_convnext(letter: str, rate: float) -> dict[str, Any]:
    """The drop path of ConvNeXt's network of the same size, for one whose own was not published."""
    return dict(
        drop_path=rate, ours=dict(drop_path=f'not published for this size; {rate} is that of ConvNeXt-{letter}.'))


_SHIFTWISE_V2 = replace(_SHIFTWISE, warmup_epochs=5)

_SLAK = replace(
    _SHIFTWISE,
    source="SLaK's training settings (arXiv 2207.03620), but dense: SLaK prunes 40 % of the single weights of all "
           f'convolutions while it trains, which this package does not. {_NOT_RUN}',
    ours={
        **_SHIFTWISE.ours,
        'model_ema_decay': "SLaK's weights are averaged; 0.9999 is what ConvNeXt averages with.",
    },
).varied(model_ema=True, model_ema_decay=0.9999)
_SLAK_SIZES = dict(
    tiny=_SLAK,
    small=_SLAK.varied(**_as_convnext('S', 0.4)),
    base=_SLAK.varied(**_as_convnext('B', 0.5)),
)

_EQ_SLAK = (
    "SLaK's training settings (arXiv 2207.03620), dense. The published accuracy is that of SLaK's own weights in this "
    f'form; a training from scratch was not published. {_NOT_RUN}')

_TEST = Recipe(
    source='our own, for a network of our own that reads handwritten digits of 8 x 8 pixels.',
    # digits are cut out and stretched but not mirrored; a network as small as this needs no more
    settings=dict(smoothing=0.1, scale=[0.7, 1.0], ratio=[0.85, 1 / 0.85], hflip=0.0, color_jitter=0.0),
    epochs=20,
    warmup_epochs=2,
    lr=3e-3,
    total_batch=32,
    batch_size=32,
    min_lr=1e-5,
    warmup_lr=1e-4,
    published=False,
)


def finetuning(recipe: Recipe) -> Recipe:
    """The recipe for a run that starts from weights.

    Nothing of the kind was published with these networks. As in ConvNeXt's fine-tuning (arXiv 2201.03545, appendix),
    the run is short, its learning rate low, and images are not mixed.
    """
    unmixed = {name: 0.0 for name in ('mixup', 'cutmix') if name in recipe.settings}
    settings = {name: value for name, value in recipe.settings.items() if name != 'pretrained'}
    return replace(
        recipe,
        settings={**settings, **unmixed},
        ours={},
        source='our own, for a start from weights: a short run with a low learning rate, whose images are not mixed.',
        epochs=30,
        warmup_epochs=2,
        lr=5e-4,
        total_batch=512,
        warmup_lr=0.,
        model_kwargs={},
        published=False,
    )


def _grown(recipe: Recipe) -> Recipe:
    """The recipe for fine-tuning from the ConvNeXt that a network is grown from."""
    return replace(
        finetuning(recipe), source="our own, for a start from a ConvNeXt's weights, which are fetched from the Hub.",
        ours={}).varied(pretrained=True)


RECIPES: dict[str, Recipe] = {
    'sw_tiny': _SHIFTWISE,
    'sw_small': _SHIFTWISE.varied(**_as_convnext('S', 0.4)),
    'sw_base': _SHIFTWISE.varied(**_as_convnext('B', 0.5)),
    'sw_v2_tiny': _SHIFTWISE_V2.varied(drop_path=0.2),
    'sw_v2_small': _SHIFTWISE_V2.varied(**_as_convnext('S', 0.4)),
    'sw_v2_base': _SHIFTWISE_V2.varied(**_as_convnext('B', 0.5)),
    'sw_v2_large': _SHIFTWISE_V2.varied(**_as_convnext('L', 0.5)),
    **{f'slak_{size}': recipe for size, recipe in _SLAK_SIZES.items()},
    **{f'eq_slak_{size}': replace(recipe, source=_EQ_SLAK) for size, recipe in _SLAK_SIZES.items()},
    'p_sw_tiny': _SHIFTWISE,
    'p2_sw_tiny': replace(
        _SHIFTWISE,
        epochs=120,
        model_kwargs=dict(sparsity=0.4),
        ours={
            **_SHIFTWISE.ours,
            'warmup_epochs': 'the published run has 120 epochs; 20 of warm-up are those of the runs of 300.',
            'sparsity': 'the published run was pruned, to which share is not published; 0.4 is that of sw_tiny.',
        },
    ),
    **{f'sw_convnext_{size}': _grown(_SHIFTWISE) for size in ('tiny', 'small', 'base', 'large')},
    'test_sw_convnext': _grown(_TEST),
    'test_sw': _TEST,
}
"""Recipes by the name of their network."""

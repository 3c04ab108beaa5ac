""" Shift-wise ConvNets that are grown from ConvNeXts

The networks are those of ``shiftwise.py`` with kernels of 7 x 7 and nothing that a ConvNeXt
(https://arxiv.org/abs/2201.03545) has no place for: no ghosts, one path, one group of a channel in the centre branch.
Their pretrained weights are the ConvNeXts' own, which timm publishes; ``grow.py`` says how they are read. Tags, inputs
and licences are those that timm gives there.
"""
from dataclasses import replace
from typing import Any

from timm.models import generate_default_cfgs, get_arch_pretrained_cfgs, register_model

from .shiftwise import ShiftwiseNet, create_shiftwise
from .variants import SHIFTWISE

__all__: list[str] = []  # the registry adds each entrypoint


def _create_grown(variant: str, pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    return create_shiftwise(variant, pretrained, **dict(SHIFTWISE[variant], **kwargs))


default_cfgs = generate_default_cfgs({
    name.replace('convnext', 'sw_convnext'): replace(
        cfg, url=None, paper_ids='arXiv:2201.03545', paper_name='A ConvNet for the 2020s',
        origin_url=f'https://huggingface.co/{cfg.hf_hub_id}')
    for convnext in ('convnext_tiny', 'convnext_small', 'convnext_base', 'convnext_large', 'test_convnext')
    for name, cfg in get_arch_pretrained_cfgs(convnext).items()
    if cfg.license == 'apache-2.0' and cfg.hf_hub_id
})


@register_model
def sw_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """ConvNeXt, tiny, with the reach of shift-wise operators."""
    return _create_grown('sw_convnext_tiny', pretrained=pretrained, **kwargs)


@register_model
def sw_convnext_small(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """ConvNeXt, small, with the reach of shift-wise operators."""
    return _create_grown('sw_convnext_small', pretrained=pretrained, **kwargs)


@register_model
def sw_convnext_base(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """ConvNeXt, base, with the reach of shift-wise operators."""
    return _create_grown('sw_convnext_base', pretrained=pretrained, **kwargs)


@register_model
def sw_convnext_large(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """ConvNeXt, large, with the reach of shift-wise operators."""
    return _create_grown('sw_convnext_large', pretrained=pretrained, **kwargs)


@register_model
def test_sw_convnext(pretrained: bool = False, **kwargs: Any) -> ShiftwiseNet:
    """timm's small test_convnext, with the reach of shift-wise operators."""
    return _create_grown('test_sw_convnext', pretrained=pretrained, **kwargs)

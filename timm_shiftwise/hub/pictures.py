"""The pictures of a model card: how far the network sees, and which groups it keeps."""
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from timm.utils import reparameterize_model

from timm_shiftwise.models import ShiftwiseNet
from timm_shiftwise.profile import NetworkProfile, network_groups
from timm_shiftwise.receptive_field import ReceptiveField, erf
from timm_shiftwise.receptive_field.effective import SHARES, describe_weights

from .errors import HubError
from .images import Images

RECEPTIVE_FIELD, MASKS = 'receptive_field.png', 'masks.png'
"""Names of the pictures in a Hub folder."""

_SAMPLES = 8  # images, which a network of sw_tiny's size is shown within seconds
_COLOURS = 128  # with all of them the noise of scores and masks would take more than twice the bytes


@dataclass(frozen=True)
class Pictures:
    """What was drawn.

    Attributes:
        files: Names of the pictures.
        section: Markdown that shows them and says how to read them.
        missing: Why there is no picture of the receptive field, or none at all; None if there is.
    """
    files: tuple[str, ...] = ()
    section: str = ''
    missing: str | None = None


def draw_pictures(
        model: ShiftwiseNet, profile: NetworkProfile, folder: Path, size: tuple[int, int],
        images: str | Path | None = None) -> Pictures:
    """Draw the effective receptive field of a network and, where groups are pruned, which are kept.

    The same weights and images give the same files.

    Args:
        model: The network, merged or not, with its weights.
        profile: What it costs and keeps.
        folder: Where to write the pictures.
        size: Height and width in pixels of the images that it is shown.
        images: A folder of images to show it; None for Gaussian noise.

    Raises:
        HubError: If the images cannot be read, or the receptive field not be measured on them.
        OSError: If a picture cannot be written.
    """
    try:
        from timm_shiftwise.profile.picture import groups_picture
        from timm_shiftwise.receptive_field.picture import draw_receptive_fields
    except ImportError as error:
        return Pictures(missing=f'pictures need matplotlib (pip install matplotlib): {error}')
    files, sections, missing = [], [], None
    try:
        field = _measure(model, profile.model, size, images)
    except (OSError, RuntimeError, ValueError) as error:
        if images is not None:
            raise HubError(f'The receptive field cannot be measured on the images in {images}: {error}') from error
        missing = str(error)
    else:
        _write(folder / RECEPTIVE_FIELD, draw_receptive_fields([field]))
        files.append(RECEPTIVE_FIELD)
        sections.append(
            f'## Effective Receptive Field\n![Effective receptive field]({RECEPTIVE_FIELD})\n\n{_read_field(field)}')
    if profile.kept < profile.total:
        _write(folder / MASKS, groups_picture(network_groups(model), profile.model))
        files.append(MASKS)
        sections.append(
            f'## Kept Groups\n![Kept groups of each layer]({MASKS})\n\nA group is one small kernel of one channel. '
            'Each layer has a bar, the share of its groups that it keeps, and below it a map with a row for each '
            'channel and a column for each group: what is grey was pruned, and does nothing.')
    return Pictures(tuple(files), '\n\n'.join(sections), missing)


def _measure(
        model: ShiftwiseNet, name: str, size: tuple[int, int], images: str | Path | None) -> ReceptiveField:
    # merged, a network computes the same in less time; merging makes layers, which draw random weights at first
    with torch.random.fork_rng(devices=[]):
        merged = reparameterize_model(model)
    shown = None if images is None else Images(images, model, _SAMPLES, size, squash=True)
    return erf(
        merged, shown, size=size, samples=_SAMPLES, name=name, weights=describe_weights('those of this card', model))


def _read_field(field: ReceptiveField) -> str:
    """How to read the picture, and what it is of."""
    assert field.reach is not None  # it is a network of ours
    height, width = field.scores.shape
    noise = ' (which tells less about a trained network than photographs do)' if field.seen == 'Gaussian noise' else ''
    reach = 'the kept kernels reach every pixel' if field.reach.all() else 'beyond the dashed line none reaches'
    if field.sees_all:
        reach += '; layers that pool over the whole map let every pixel through besides'
    *shares, last = (f'{100 * share:g}' for share in SHARES)
    return (
        'The darker a pixel, the higher its score: how much it matters to the middle of the last feature map, as '
        f'RepLKNet measures it (https://arxiv.org/abs/2203.06717), here on {field.images} x {field.seen}{noise} of '
        f'{height} x {width} pixels. The squares hold {", ".join(shares)} and {last} % of log10(score + 1). That is '
        f'measured; which pixels the kernels reach at all is exact: {reach}.')


def _write(file: Path, picture: bytes) -> None:
    with Image.open(BytesIO(picture)) as image:
        image.convert('RGB').quantize(_COLOURS).save(file, 'PNG', optimize=True)

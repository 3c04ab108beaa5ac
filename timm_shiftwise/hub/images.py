"""Images of a folder, as a network expects them."""
from collections.abc import Iterator
from pathlib import Path

from timm.data import ImageDataset, create_transform, resolve_model_data_config
from torch import Tensor, nn

from .errors import HubError


class Images:
    """Images [3, H, W] of a folder, as many as are asked for, spread over it.

    Args:
        folder: The folder, with or without a folder for each class.
        network: The network, whose configuration says how images are prepared.
        most: How many to take at most.
        size: Height and width of the images; None for the network's own.
        squash: Whether the whole image is squashed to the size, so that its middle is the network's, in place of the
            crop that the network is evaluated with.

    Raises:
        HubError: The folder holds no images.
    """

    def __init__(
            self, folder: str | Path, network: nn.Module, most: int, size: tuple[int, int] | None = None,
            squash: bool = False) -> None:
        config = resolve_model_data_config(network)
        channels = config['input_size'][0]
        if size is not None:
            config['input_size'] = (channels, *size)
        if squash:
            config.update(crop_pct=1.0, crop_mode='squash')
        try:
            self._dataset = ImageDataset(
                str(folder), transform=create_transform(**config), input_img_mode='L' if channels == 1 else 'RGB')
        except (OSError, RuntimeError) as error:
            raise HubError(f'{folder} cannot be read as images: {error}') from error
        count = len(self._dataset)
        self._chosen = [count * index // min(count, most) for index in range(min(count, most))]

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[Tensor]:
        for index in self._chosen:
            yield self._dataset[index][0]

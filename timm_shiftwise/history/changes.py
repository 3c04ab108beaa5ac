"""What changed between the epochs of a run whose masks are known."""
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from timm_shiftwise.profile import NetworkGroups

from .record import Epoch


class Fate(IntEnum):
    """What became of a group over the known epochs, by whether any path keeps it."""
    NEVER = 0
    KEPT = 1
    GROWN = 2
    PRUNED = 3
    OFTEN = 4


@dataclass(frozen=True)
class StageHistory:
    """What a stage kept over the known epochs.

    Attributes:
        layers: Where the masks of its operators are among those of an epoch.
        kept: Share of its groups that any path keeps, which is what costs, by epoch.
        by_path: The same of each path alone.
        exchanged: For each two known epochs that follow each other both, and the share of what the paths keep at the
            second that they did not keep at the first. What was pruned and grew again in between cannot be seen.
    """
    layers: slice
    kept: dict[int, float]
    by_path: tuple[dict[int, float], ...]
    exchanged: tuple[tuple[int, int, float], ...]

    @property
    def has_paths_apart(self) -> bool:
        """Whether at any epoch a path keeps fewer groups than all of them together."""
        return any(path != self.kept for path in self.by_path)


def stage_histories(epochs: Sequence[Epoch], groups: NetworkGroups) -> list[StageHistory]:
    """What each stage kept over the known epochs, at least one.

    Args:
        epochs: The epochs in order.
        groups: Groups of the network.
    """
    histories = []
    start = 0
    for stage in groups.stages:
        layers = slice(start, start := start + len(stage.layers))
        masks = [  # [P, groups of the stage]
            np.concatenate([mask.reshape(len(mask), -1) for mask in epoch.masks[layers]], axis=1) for epoch in epochs]
        numbers = [epoch.number for epoch in epochs]
        histories.append(StageHistory(
            layers,
            {number: float(mask.any(axis=0).mean()) for number, mask in zip(numbers, masks, strict=True)},
            tuple(
                {number: float(mask[path].mean()) for number, mask in zip(numbers, masks, strict=True)}
                for path in range(len(masks[0]))),
            tuple(
                (numbers[i], numbers[i + 1], int((masks[i + 1] & ~masks[i]).sum()) / max(int(masks[i + 1].sum()), 1))
                for i in range(len(epochs) - 1)),
        ))
    return histories


def fates(masks: Sequence[np.ndarray]) -> np.ndarray:
    """What became of each group of an operator.

    Args:
        masks: Its masks, bool [P, C, K], in the order of the epochs.

    Returns:
        Values of :class:`Fate`, uint8 [C, K].
    """
    kept = np.stack([mask.any(axis=0) for mask in masks])  # [E, C, K]
    changes = (kept[1:] != kept[:-1]).sum(axis=0)
    once = np.where(kept[-1], Fate.GROWN, Fate.PRUNED)
    unchanged = np.where(kept[-1], Fate.KEPT, Fate.NEVER)
    return np.select([changes == 0, changes == 1], [unchanged, once], Fate.OFTEN).astype(np.uint8)


def missing_epochs(epochs: Sequence[Epoch], interval: int = 1) -> list[int]:
    """Epochs before the last known one that are not known.

    Args:
        epochs: The epochs in order, at least one.
        interval: Of how many epochs train.py saves one (``--val-interval``).
    """
    known = {epoch.number for epoch in epochs}
    return [number for number in range(interval - 1, epochs[-1].number, interval) if number not in known]

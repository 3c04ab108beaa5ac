"""Noticing that a run has another length than its schedule was made for.

A training script does not tell a network how long it will train. Its learning rate shows where a run comes to its end,
and so does the end of the process.
"""
import atexit
import logging
import weakref
from typing import Any

from torch.optim.optimizer import Optimizer

_logger = logging.getLogger(__name__)

ENDED = 0.005
"""Share of its largest value so far from which on a learning rate counts as come to its end."""
FAR = 0.8, 1.25
"""Shares of the planned steps between which a run has about the planned length."""
SHORT = 100
"""Steps that a process takes at least if its end is to count as that of a run: fewer are somebody's try."""


class RunLength:
    """Warns once of a run that ends far from its planned length.

    A copy of this starts anew.

    Args:
        planned: Planned length in optimiser steps.
    """

    def __init__(self, planned: int) -> None:
        self._planned = planned
        self._largest = 0.
        self._counted = 0
        self._step = 0
        self._has_told = False

    def __reduce__(self) -> tuple[Any, ...]:
        return RunLength, (self._planned,)

    def notice(self, optimizer: Optimizer, step: int) -> None:
        """Take notice of a step.

        Args:
            optimizer: The optimiser that took it.
            step: Its number in the run.
        """
        self._counted, self._step = self._counted + 1, step
        if self._counted == SHORT:
            atexit.register(_at_exit, weakref.ref(self))
        # a rate that is a tensor may lie on an accelerator, and would have to be waited for
        rate = max((rate for group in optimizer.param_groups if isinstance(rate := group.get('lr'), float)), default=1.)
        self._largest = max(self._largest, rate)
        if rate <= ENDED * self._largest:
            self.tell('The learning rate has come to its end')

    def tell(self, what: str) -> None:
        """Warn that something ended the run, if its length is far from the planned one.

        Args:
            what: What ended it, the beginning of a sentence.
        """
        least, most = (share * self._planned for share in FAR)
        if self._has_told or least <= self._step <= most:
            return
        self._has_told = True
        _logger.warning(
            '%s at optimiser step %d, but the exchange of groups is planned over sparsity_steps=%d. Unless the run '
            'goes on, its masks were exchanged at another rate than meant: create the network with sparsity_steps=%d, '
            'and a prune_interval that leaves some dozens of exchanges.', what, self._step, self._planned, self._step)


def _at_exit(ref: 'weakref.ref[RunLength]') -> None:
    run = ref()
    if run is not None:
        run.tell('The process ends')

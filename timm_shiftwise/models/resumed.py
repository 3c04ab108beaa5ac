"""Refusing to go on with an optimiser whose state is in another order of channels than the weights.

A checkpoint in the released order is brought into ours when it is loaded (``layouts.py``); what an optimiser of its run
knew of the weights, such as their moments, is not.
"""
import weakref

from torch import nn
from torch.optim.optimizer import Optimizer

from timm_shiftwise.sparsity.follow import follow
from timm_shiftwise.sparsity.optimizer_state import has_stepped

_guards: 'weakref.WeakKeyDictionary[nn.Module, _Guard]' = weakref.WeakKeyDictionary()


def refuse_state_of_old_order(network: nn.Module) -> None:
    """Let the next step of an optimiser that already holds state of a network's parameters fail.

    A step of one that holds none ends this.

    Args:
        network: A network whose weights were just brought into another order.
    """
    _guards[network] = guard = _Guard(network)
    follow(guard)


class _Guard:
    """Looks at the first optimiser that steps a network; a follower as :mod:`timm_shiftwise.sparsity.follow` has them.

    It belongs to no module, so that copies of the network, and files of it, are without.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = weakref.ref(network)
        self._is_done = False

    def followed_parameters(self) -> list[nn.Parameter]:
        """The network's parameters, none once a step was harmless."""
        network = None if self._is_done else self._network()
        return [] if network is None else list(network.parameters())

    def before_step(self, optimizer: Optimizer, held: list[int]) -> None:
        """Look whether the optimiser comes from an earlier run.

        Raises:
            RuntimeError: If it does.
        """
        if any(has_stepped(optimizer.state.get(parameter)) for parameter in self.followed_parameters()):
            raise RuntimeError(
                'The weights come from a checkpoint in another order of channels, that of version 0.1 or of the '
                'authors, and were brought into the order of this version. The optimizer already holds state of them, '
                'which is in the old order and would be applied to the wrong channels. Start a new run from these '
                "weights, with a fresh optimizer: in timm's train.py --initial-checkpoint FILE in place of "
                '--resume FILE.')
        self._is_done = True

    def after_step(self, optimizer: Optimizer, held: list[int]) -> None:
        """Nothing is left to do."""

"""Counting a network's steps, whichever and however many optimisers take them."""
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.optimizer import Optimizer

from .optimizer_state import has_stepped


class Step(NamedTuple):
    """A step of a network.

    Attributes:
        states: What the optimisers know of each weight that was stepped, by the weight's place.
        is_first: Whether none of them knew any of these weights before, and all do now.
    """
    states: dict[int, list[Mapping[str, Any]]]
    is_first: bool


class _Begun(NamedTuple):
    """A step of an optimiser that has begun: of which weights, and whether within a backward pass."""
    held: frozenset[int]
    in_backward: bool


class Steps:
    """Tells when a step of a network is complete: when all optimisers that hold weights of it have stepped.

    They may hold some of the weights each. One may wrap another, as Lookahead does: what it runs is a part of its own
    step. There may be one for each weight that steps as soon as the gradient is there: then the backward pass is one
    step. Steps that failed, or were skipped, are followed by the next one of the same weights, which shows it.

    Weights are told by their places in a list. A copy of this starts anew: other optimisers will step its weights.
    """

    def __init__(self) -> None:
        self._begun: dict[int, _Begun] = {}
        self._seen: set[int] = set()  # whose optimisers have stepped since the last step of the network
        self._optimizers: dict[int, list[weakref.ref[Optimizer]]] = {}  # of those that were moved
        self._known: set[int] = set()  # of which an optimiser knew something before
        self._idle: set[int] = set()  # which have gradients but no optimiser, as the last steps showed

    def __reduce__(self) -> tuple[Any, ...]:
        return Steps, ()

    def begin(self, optimizer: Optimizer, held: Collection[int], weights: Sequence[Tensor], in_backward: bool) -> (
            Step | None):
        """Take notice of a step that an optimiser is about to take.

        Args:
            optimizer: The optimiser.
            held: Places of the weights that it holds.
            weights: All weights.
            in_backward: Whether a backward pass is running, at whose end :meth:`close` will be called.

        Returns:
            The network's last step, if only this one's begin shows that it is complete.
        """
        last = None
        if not self._seen.isdisjoint(held):
            self._idle = self._waited_for(weights)
            # within a backward pass nothing may be changed that it still reads: its end will complete the step
            last = None if in_backward else self._complete(weights)
        self._begun.pop(id(optimizer), None)
        self._begun[id(optimizer)] = _Begun(frozenset(held), in_backward)
        self._known.update(i for i in held if has_stepped(optimizer.state.get(weights[i])))
        return last

    def end(self, optimizer: Optimizer, held: Collection[int], weights: Sequence[Tensor]) -> Step | None:
        """Take notice of a step that an optimiser has taken.

        Args:
            optimizer: The optimiser.
            held: Places of the weights that it holds.
            weights: All weights, with the gradients that the step was made of.

        Returns:
            The network's step, if this one completes it.
        """
        begun = self._begun.pop(id(optimizer), None)
        moved = {i for i in held if weights[i].grad is not None}
        if begun is None or not moved:
            return None
        if not self._seen and moved <= self._idle:
            self._idle -= moved  # it is late: the step that it is a part of was counted without
            return None
        self._idle -= moved
        self._seen.update(held)
        for i in moved:
            self._optimizers.setdefault(i, []).append(weakref.ref(optimizer))
        is_part = any(not outer.held.isdisjoint(held) for outer in self._begun.values())
        return None if is_part or begun.in_backward or self._waited_for(weights) else self._complete(weights)

    def close(self, weights: Sequence[Tensor]) -> Step | None:
        """Take notice of the end of a backward pass in which optimisers have stepped.

        Returns:
            The network's step, unless weights are left whose optimisers step later.
        """
        return self._complete(weights) if self._seen and not self._waited_for(weights) else None

    def _waited_for(self, weights: Sequence[Tensor]) -> set[int]:
        """Weights with gradients whose optimisers, if there are any, have not stepped."""
        return {
            i for i, weight in enumerate(weights)
            if i not in self._seen and i not in self._idle and weight.requires_grad and weight.grad is not None}

    def _complete(self, weights: Sequence[Tensor]) -> Step:
        states = {
            i: [optimizer.state[weights[i]] for ref in refs
                if (optimizer := ref()) is not None and weights[i] in optimizer.state]
            for i, refs in sorted(self._optimizers.items())
        }
        is_first = self._known.isdisjoint(states) and all(any(map(has_stepped, known)) for known in states.values())
        self._begun.clear()
        self._seen.clear()
        self._optimizers.clear()
        self._known.clear()
        return Step(states, is_first)

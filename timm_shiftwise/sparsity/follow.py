"""Following "after the optimiser stepped" from the model's side.

A training script that knows nothing of sparsity calls ``optimizer.step()`` and no more. PyTorch has hooks around the
step of every optimiser; through them a schedule hears of the steps of the optimisers that hold its weights. Schedules
are held weakly: one whose model is gone is no longer followed, and with the last one the hooks go too.
"""
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Follower(Protocol):
    """What hears of optimiser steps."""

    def followed_parameters(self) -> list[nn.Parameter]:
        """Parameters any of which tells that an optimiser is one to listen to."""

    def before_step(self, optimizer: Optimizer, held: list[int]) -> None:
        """Called before a step that will be taken, gradients in place, with the places of the parameters it is of."""

    def after_step(self, optimizer: Optimizer, held: list[int]) -> None:
        """Called after a step that was taken."""


_lock = threading.RLock()
_followers: dict[int, weakref.ref[Any]] = {}
_handles: list[Any] = []


def follow(follower: Follower) -> None:
    """Let a follower hear of the steps of the optimiser that holds its parameters, as long as it lives."""
    key = id(follower)
    with _lock:
        _followers[key] = weakref.ref(follower, lambda _: _forget(key))
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(_before_step))
            _handles.append(register_optimizer_step_post_hook(_after_step))


def is_following() -> bool:
    """Whether any follower is alive and the hooks stand."""
    return bool(_handles)


def _forget(key: int) -> None:
    with _lock:
        _followers.pop(key, None)
        if not _followers:
            while _handles:
                _handles.pop().remove()


def at_end_of_backward(function: Callable[[], None]) -> bool:
    """Call a function when the backward pass that is running is through.

    Returns:
        Whether one is running.
    """
    try:
        torch.autograd.Variable._execution_engine.queue_callback(function)
    except RuntimeError:
        return False
    return True


def _listeners(optimizer: Optimizer) -> list[tuple[Follower, list[int]]]:
    with _lock:
        alive = [follower for ref in _followers.values() if (follower := ref()) is not None]
    followed = [(follower, parameters) for follower in alive if (parameters := follower.followed_parameters())]
    if not followed:
        return []
    of_optimizer = {id(p) for group in optimizer.param_groups for p in group['params']}
    listeners = []
    for follower, parameters in followed:
        held = [i for i, p in enumerate(parameters) if id(p) in of_optimizer]
        if held:
            listeners.append((follower, held))
    return listeners


def _is_skipped(optimizer: Optimizer) -> bool:
    # an optimiser that unscales by itself is stepped by GradScaler even where the gradients overflowed
    found_inf = getattr(optimizer, 'found_inf', None)
    return found_inf is not None and bool(found_inf)


# a compiled optimizer.step must not be compiled anew for every state of the schedule
@torch.compiler.disable
def _before_step(
        optimizer: Optimizer, args: tuple[Any, ...],
        kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if _is_skipped(optimizer):
        return None
    # the gradients of a step that is given a closure, as Lightning does, are those that the closure computes
    if len(args) > 1 and callable(args[1]):
        return (args[0], _telling(args[1], optimizer), *args[2:]), kwargs
    if callable(kwargs.get('closure')):
        return args, {**kwargs, 'closure': _telling(kwargs['closure'], optimizer)}
    _tell(optimizer)
    return None


@torch.compiler.disable
@torch.no_grad()
def _tell(optimizer: Optimizer) -> None:
    for follower, held in _listeners(optimizer):
        follower.before_step(optimizer, held)


def _telling(closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
    """A closure after whose first call, gradients in place, the followers hear of the step."""
    has_told = False

    def call() -> Any:
        nonlocal has_told
        loss = closure()
        if not has_told:
            has_told = True
            _tell(optimizer)
        return loss

    return call


@torch.compiler.disable
@torch.no_grad()
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _is_skipped(optimizer):
        for follower, held in _listeners(optimizer):
            follower.after_step(optimizer, held)

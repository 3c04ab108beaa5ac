"""Which implementation of an operator runs, and why.

Every operator has an implementation in plain PyTorch, its definition, and one in Taichi. On the CPU Taichi runs wherever
it can, unless the ``backend`` argument of a call or the environment variable ``TIMM_SHIFTWISE_BACKEND`` says otherwise;
on other devices it runs only where one of these asks for it.
"""
import logging
import os
from typing import NamedTuple

import torch

from .taichi import runtime

_logger = logging.getLogger(__name__)

BACKENDS = ('auto', 'taichi', 'torch')
ENVIRONMENT_VARIABLE = 'TIMM_SHIFTWISE_BACKEND'

_warned: set[str] = set()


class BackendChoice(NamedTuple):
    """What runs, and why.

    Attributes:
        backend: ``'taichi'`` or ``'torch'``.
        reason: A clause that explains the choice, for people.
        fallback: Whether Taichi would have been taken had it been able to run.
    """
    backend: str
    reason: str
    fallback: bool = False


def requested_backend(requested: str | None) -> tuple[str, str]:
    """One of :data:`BACKENDS`, and what asks for it: the argument of a call or, if that is None, the environment.

    Raises:
        ValueError: If it is unknown.
    """
    source = 'the backend argument'
    if requested is None:
        requested = os.environ.get(ENVIRONMENT_VARIABLE) or 'auto'
        source = f'the environment variable {ENVIRONMENT_VARIABLE}'
    if requested not in BACKENDS:
        raise ValueError(f'{source} must be one of {", ".join(map(repr, BACKENDS))}, got {requested!r}.')
    return requested, source


def explain_backend(requested: str | None, device: torch.device) -> BackendChoice:
    """Choose the implementation of an operator and say why.

    Args:
        requested: ``'auto'``, ``'taichi'`` or ``'torch'``; None follows the environment variable
            ``TIMM_SHIFTWISE_BACKEND``, else ``'auto'``.
        device: Where the tensors of the call are.

    Raises:
        ValueError: If the backend asked for is unknown.
        RuntimeError: If the backend asked for cannot run here.
    """
    requested, source = requested_backend(requested)
    if requested == 'torch':
        return BackendChoice('torch', f'asked for by {source}')
    if requested == 'auto' and device.type != 'cpu':
        return BackendChoice('torch', f'for tensors on {device.type} Taichi has to be asked for')
    obstacle = runtime.obstacle(device)
    if requested == 'taichi':
        if obstacle is not None:
            raise RuntimeError(f"{source} asks for 'taichi', which cannot run here: {obstacle}.")
        return BackendChoice('taichi', f'asked for by {source}')
    if obstacle is not None:
        return BackendChoice('torch', obstacle, fallback=True)
    return BackendChoice('taichi', f'the default for tensors on {device.type}')


def choose_backend(requested: str | None, device: torch.device) -> str:
    """As :func:`explain_backend`, ``'taichi'`` or ``'torch'`` alone; logs a fallback, once for each reason."""
    choice = explain_backend(requested, device)
    if choice.fallback and choice.reason not in _warned:
        _warned.add(choice.reason)
        _logger.warning(
            'Shift-wise operators run in plain PyTorch, not in Taichi: %s. (%s=torch asks for this and is silent.)',
            choice.reason, ENVIRONMENT_VARIABLE)
    return choice.backend

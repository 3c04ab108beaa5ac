"""What an optimiser knows of weights, where groups of them are pruned and grow."""
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .sharding import add, keep_only, whole

SECOND_MOMENTS = frozenset({
    'exp_avg_sq', 'max_exp_avg_sq',  # Adam and its kin: NAdam, RAdam, LAMB, ADOPT, Adan, MARS, Muon's other half, ...
    'exp_avg_var', 'max_exp_avg_var',  # AdaBelief
    'exp_inf',  # Adamax
    'exp_hessian_diag_sq',  # AdaHessian
    'square_avg', 'acc_delta',  # RMSprop, Adadelta
    'sum',  # Adagrad
    'grad_sum_sq',  # MADGRAD
})
"""Names of what optimisers of torch.optim and timm divide a step by, or scale it with."""


def exchange_state(states: Iterable[Mapping[str, Any]], weight: Tensor, keep: Tensor, grown: Tensor) -> None:
    """Bring what optimisers know of a weight in line with its masks after an exchange.

    Where a group stands before and after, all stays. A group that grows has the second moments that those have on
    average, so that its first steps are no larger than theirs: with second moments of zero Adam would move each of its
    weights by some five learning rates in ten steps. Everything else is zero, as the weight itself is: first moments,
    buffers of momentum, and copies of the weight such as MADGRAD's ``x0``. State of another shape is left as it is.

    Args:
        states: What each optimiser that holds the weight knows of it.
        weight: Kernels [P, C, K, N, N], whole or sharded.
        keep: Groups that stand before and after, boolean [P, C, K]. If there is none, all becomes zero.
        grown: Groups that stand after alone, boolean [P, C, K].
    """
    keep, grown = keep[..., None, None], grown[..., None, None]
    for key, value in ((key, value) for state in states for key, value in state.items()):
        if not isinstance(value, Tensor) or value.shape != weight.shape:
            continue
        keep_only(value, keep)
        if key in SECOND_MOMENTS:
            count = keep.sum() * weight.shape[-1] ** 2
            add(value, grown * (whole(value).sum() / count.clamp(min=1)))


def has_stepped(state: Mapping[str, Any] | None) -> bool:
    """Whether an optimiser's state of a weight comes from steps: Adagrad has a state before its first."""
    if not state:
        return False
    if 'step' in state:
        return float(state['step']) > 0
    return any(isinstance(value, Tensor) for value in state.values())

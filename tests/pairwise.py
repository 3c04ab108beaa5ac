"""Fewer cases than a product has: any two values of two parameters meet in one of them."""
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

Pair = tuple[tuple[int, int], tuple[int, int]]
"""Two parameters with a value of each, by their numbers."""


def pairwise(parameters: Mapping[str, Iterable[Any]], indirect: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Parametrize a test with pairwise cases of values by name; several names, parted by commas, have tuples."""
    names = [tuple(name.strip() for name in group.split(',')) for group in parameters]
    cases = [
        [part for group, value in zip(names, case, strict=True) for part in (value if len(group) > 1 else (value,))]
        for case in pairwise_cases(*map(list, parameters.values()))
    ]
    return pytest.mark.parametrize(', '.join(itertools.chain(*names)), cases, indirect=indirect)


def pairwise_cases(*parameters: list[Any]) -> list[tuple[Any, ...]]:
    """Combinations of a value of each parameter, the same in every call, in which all pairs of values occur."""
    open_pairs = {
        ((i, a), (j, b))
        for (i, first), (j, second) in itertools.combinations(enumerate(parameters), 2)
        for a in range(len(first)) for b in range(len(second))
    }
    cases = []
    uses: Counter[tuple[int, int]] = Counter()
    while open_pairs:
        case = dict(min(open_pairs))  # for the rest what closes most other pairs, and of equals what had fewest cases

        for i, values in enumerate(parameters):
            if i not in case:
                worth = [(len(open_pairs & _pairs({**case, i: a})), -uses[i, a]) for a in range(len(values))]
                case[i] = worth.index(max(worth))
        open_pairs -= _pairs(case)
        uses.update(case.items())
        cases.append(tuple(values[case[i]] for i, values in enumerate(parameters)))
    return cases


def _pairs(case: dict[int, int]) -> set[Pair]:
    return set(itertools.combinations(sorted(case.items()), 2))

"""The helper that makes fewer cases than a product has."""
import itertools

import pytest
from pairwise import pairwise, pairwise_cases


@pytest.mark.parametrize('counts', [(2, 3), (3, 2, 4), (2, 2, 2, 2, 2), (1, 5, 1), (7, 2, 3, 8, 2)])
def test_any_two_values_meet_in_fewer_cases_than_the_product_has(counts):
    parameters = [[(number, value) for value in range(count)] for number, count in enumerate(counts)]
    cases = pairwise_cases(*parameters)
    assert all(value in values for case in cases for value, values in zip(case, parameters, strict=True))
    met = {pair for case in cases for pair in itertools.combinations(case, 2)}
    assert met == {
        pair for first, second in itertools.combinations(parameters, 2) for pair in itertools.product(first, second)}
    largest, second = sorted(counts)[:-3:-1]
    assert largest * second <= len(cases) <= largest * second + 3 * len(counts)
    assert cases == pairwise_cases(*parameters)


def test_a_test_is_parametrized_by_name():
    mark = pairwise({'a': (1, 2), 'b, c': [(3, 4), (5, 6)]}).mark
    assert mark.args == ('a, b, c', [[1, 3, 4], [1, 5, 6], [2, 3, 4], [2, 5, 6]])

"""Intervals of published accuracies, against the definition of Wilson's interval."""

import math

import pytest

from toolkit.theory.published import half_width, is_chance, published_cell


@pytest.mark.parametrize(("task", "percent", "n"), [("gsm8k", 32.2, 1319), ("boolq", 88.2, 3270)])
def test_half_width_is_wilsons(task, percent, n):
    share, z = round(n * percent / 100) / n, 1.959964
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z**2 / n)
    assert half_width(task, percent) == pytest.approx(100 * half, rel=1e-6)


def test_sets_of_unknown_size_have_none():
    assert half_width("listops", 66.2) is None
    assert published_cell("listops", 66.2) == "66.2"


def test_what_may_be_chance_is_marked():
    assert is_chance("winogrande", 51.4)
    assert not is_chance("winogrande", 55.7)
    assert not is_chance("gsm8k", 50.0)
    assert published_cell("winogrande", 49.2) == "49.2* ± 2.7"

"""The verdict follows the lower end of the interval, and its thresholds are the study's."""

import pytest

from toolkit.report.verdict import verdict


@pytest.mark.parametrize(
    ("low", "name"),
    [
        (0.93, "steerable at this size"),
        (0.9, "steerable at this size"),
        (0.89, "steerable in part"),
        (0.5, "steerable in part"),
        (0.49, "not shown"),
        (-0.3, "not shown"),
        (None, "not shown"),
    ],
)
def test_the_lower_end_decides(low, name):
    assert verdict({"reported": {"low": low, "estimate": 0.97}})["name"] == name


def test_a_run_without_an_interval_has_none():
    assert verdict(None) is None
    assert verdict({"recovered": 0.9}) is None

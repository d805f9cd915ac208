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
    shown = {"low": low, "estimate": 0.97, "apart": True}
    assert verdict({"reported": shown, "fit": "forced", "lower": 0.2})["name"] == name


def test_prompts_that_chose_report_no_more_than_the_bound_over_all():
    shown = {"low": 0.95, "estimate": 0.97, "apart": False}
    found = verdict({"reported": shown, "fit": "forced", "lower": 0.6})
    assert found["name"] == "steerable in part"
    assert "at least 0.60 of the fine-tune" in found["why"]


def test_runs_that_the_study_does_not_cover_have_none():
    shown = {"low": 0.95, "estimate": 0.97, "apart": True}
    assert verdict(None) is None
    assert verdict({"recovered": 0.9}) is None
    assert verdict({"reported": shown, "fit": "distilled", "lower": 0.9}) is None

"""A diagnosis' divergences and what steering recovers equal the textbook's, in several families."""

import functools

import numpy as np
import pytest
import torch

from tests.support import textbook
from tests.support.diagnosed import (
    NONE,
    assert_tables_equal,
    case,
    each_case,
    every_candidate,
    kl_tolerance,
    n_numbers,
    of_candidate,
)


def on_own_tokens(candidate):
    """Tell whether the report shows it so."""
    shown = candidate["location"] == "post_block" and candidate["rank"] in (0, 8, "full")
    return candidate["layers"] == "all" and (shown or candidate["kind"] == "none")


@each_case
def test_sequential_kl(family, dtype):
    """KL at every generated token index, of no steering, the oracle and every candidate."""
    c = case(family, dtype)
    frame = c.run.sequential_kl.frame
    for candidate, nats in every_candidate(family, dtype):
        for forcing in nats:
            found = of_candidate(frame, candidate).query("forcing == @forcing")
            if not nats[forcing] or (forcing == "own" and not on_own_tokens(candidate)):
                assert found.empty or forcing == "tuned" or candidate["kind"] == "oracle"
                continue
            rtol, atol = kl_tolerance(c)
            rows = textbook.curve(nats[forcing])
            columns = ["token_index", "kl_mean", "kl_sem", "n_prompts"]
            assert_tables_equal(found[columns], rows, ["token_index"], rtol, atol)


@each_case
def test_steerability(family, dtype):
    """Mean KL over all generated tokens, what it recovers of no steering's, and the cost."""
    c = case(family, dtype)
    candidates = list(every_candidate(family, dtype))
    frame = c.run.steerability.frame
    assert len(candidates) == ((frame.target != "block") & (frame.kind != "lora")).sum()
    none = candidates[0][1]["tuned"]
    per_prompt = np.array([n.sum() for n in none])
    for candidate, nats in candidates:
        (row,) = of_candidate(c.run.steerability.frame, candidate).to_dict("records")
        rtol, atol = kl_tolerance(c)
        scale = textbook.mean_nats(none)
        expected = textbook.mean_nats(nats["tuned"])
        sums = np.array([n.sum() for n in nats["tuned"]])
        lengths = np.array([len(n) for n in nats["tuned"]])
        near = functools.partial(pytest.approx, rel=10 * rtol, abs=10 * atol / scale)
        assert row["kl"] == pytest.approx(expected, rel=rtol, abs=atol)
        assert row["kl_sem"] == near(textbook.ratio_sem(sums, lengths))
        assert row["recovered"] == near(1 - expected / scale)
        assert row["recovered_sem"] == near(textbook.ratio_sem(sums, per_prompt))
        assert row["parameters"] == n_numbers(candidate)
        percent = 100 * row["parameters"] / c.parameters
        assert row["parameters_percent"] == pytest.approx(percent, rel=1e-12)


def test_prompts_end_at_different_tokens():
    """The exactness above covers prompts of different lengths that end at different indices."""
    c = case("llama", torch.float64)
    assert len({len(p) for p in c.prompts}) > 2
    counts = of_candidate(c.run.sequential_kl.frame, NONE).query("forcing == 'tuned'").n_prompts
    assert counts.iloc[-1] < counts.iloc[0]


def test_the_answer_is_the_smallest_that_reaches_the_target_or_the_nearest():
    """Its adapters are there; whatever holds fewer numbers is not shown to reach the target."""
    c = case("llama", torch.float64)
    answer, frame = c.run.recommendation, c.run.steerability.frame
    adapters = frame[frame.kind.isin(["vector", "linear"])]
    assert answer["parameters"] == c.run.adapters.parameters
    assert answer["asked"] == 0.9
    assert answer["reached"] == (answer["lower"] >= 0.9)
    assert answer["n_candidates"] == len(adapters)
    assert answer["recovered"] in adapters.recovered.to_numpy()  # over all prompts


def test_some_prompts_choose_and_the_others_report():
    """The best of the choosing prompts is named, and reported as the textbook has it."""
    c = case("llama", torch.float64)
    answer = c.run.recommendation
    assert 1 < c.reports.sum() < len(c.reports) - 1
    assert answer["n_choosing"] == (~c.reports).sum()

    def recovered(nats, rows):
        sums = [np.array([n.sum() for n in some["tuned"]])[rows] for some in (nats, none)]
        return 1 - sums[0].sum() / sums[1].sum()

    (_, none), _, *found = every_candidate("llama", torch.float64)
    best = max(found, key=lambda pair: recovered(pair[1], ~c.reports))
    names = ("location", "kind", "rank", "fit", "layers", "target")
    chosen = {name: answer[name] for name in names}
    if not answer["reached"]:
        assert chosen == {name: best[0][name] for name in names}
    nats = next(nats for candidate, nats in found if candidate == chosen)
    shown = answer["reported"]
    assert (shown["n"], shown["apart"]) == (c.reports.sum(), True)
    assert shown["estimate"] == pytest.approx(recovered(nats, c.reports), rel=1e-5)
    assert shown["low"] < shown["estimate"] < shown["high"]


def test_weights_stand_beside_steering_number_for_number():
    """A change in the metric of its inputs and one by SVD, at steering's sizes and a LoRA's."""
    c = case("llama", torch.float64)
    frame = c.run.steerability.frame
    rows = frame[frame.kind == "lora"]
    assert sorted(zip(rows.target, rows.fit, strict=True)) == [
        (size, fit) for size in ("lora 8", "steering 8") for fit in ("metric", "plain")
    ]
    (steering,) = frame.query("location == 'post_block' and fit == 'forced' and rank == 8").to_dict(
        "records"
    )
    beside = rows[rows.target == "steering 8"]
    assert (beside.parameters <= steering["parameters"]).all()
    assert (beside.parameters > 0.8 * steering["parameters"]).all()
    assert rows.recovered.max() > 0

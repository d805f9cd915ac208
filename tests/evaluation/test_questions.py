"""Kept, gained and paired differences against plain counting; which questions are asked."""

from contextlib import nullcontext

import numpy as np
import pytest

from tests.support import tiny
from tests.support.members import together
from toolkit import Document, InputError
from toolkit.documents.tasks.listops import ListOps
from toolkit.evaluation.accuracy import RESAMPLES, bootstrap
from toolkit.evaluation.questions import Questions, compared, task_rows
from toolkit.runtime.processes import ALONE

THREE = ("base", "tuned", "recommended")


def test_kept_and_gained_are_counted_question_by_question():
    rng = np.random.default_rng(0)
    right = {name: rng.random(60) < 0.5 for name in THREE}
    rows = {row["model"]: row for row in compared(right)}
    base, tuned, ours = (right[name].tolist() for name in right)
    kept = [c for a, c in zip(base, ours, strict=True) if a]
    gained = [c for a, b, c in zip(base, tuned, ours, strict=True) if b and not a]
    row = rows["recommended"]
    assert (row["kept"], row["kept_of"]) == (sum(kept) / len(kept), len(kept))
    assert (row["gained"], row["gained_of"]) == (sum(gained) / len(gained), len(gained))
    assert row["right"] == sum(ours)
    assert row["difference"] == pytest.approx((sum(ours) - sum(tuned)) / 60)
    assert (rows["base"]["kept"], rows["base"]["gained"], rows["tuned"]["gained"]) == (1, 0, 1)


def test_the_interval_of_a_difference_draws_both_models_answers_together():
    rng = np.random.default_rng(1)
    tuned = rng.random(300) < 0.5
    ours = tuned ^ (rng.random(300) < 0.05)  # nearly the same answers
    row = compared({"base": tuned, "tuned": tuned, "recommended": ours})[2]
    plain = [
        np.mean([float(ours[i]) - float(tuned[i]) for i in rng.integers(0, 300, 300)])
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(plain, [0.025, 0.975])
    assert row["difference_low"] == pytest.approx(low, abs=0.005)
    assert row["difference_high"] == pytest.approx(high, abs=0.005)
    apart = np.subtract(*bootstrap(ours)[::-1])
    assert row["difference_high"] - row["difference_low"] < apart / 2


def test_no_question_to_keep_is_no_number():
    nothing = np.zeros(4, dtype=bool)
    row = compared({"base": nothing, "tuned": ~nothing})[1]
    assert np.isnan(row["kept"])
    assert row["kept_of"] == 0


def test_questions_that_are_documents_are_left_out_and_counted():
    task = ListOps()
    first, second, *others = task.examples("test")
    documents = [Document(prompt=f" {first.prompt}\n", response="x"), Document(text=second.prompt)]
    found = Questions.of(task, documents, 5)
    assert found.left_out == 2
    assert found.examples == others[:5]
    with pytest.raises(InputError, match="are documents of the data"):
        Questions.of(
            task, [Document(prompt=e.prompt, response="x") for e in task.examples("test")], 5
        )


def test_every_model_is_asked_every_question(tokenizer):
    models = {name: lambda i=i: nullcontext(tiny.make_model("llama", seed=i))
              for i, name in enumerate(("base", "tuned"))}  # fmt: skip
    questions = Questions.of(ListOps(), [], 70)
    advanced = []
    rows = task_rows(models, tokenizer, questions, lambda: advanced.append(1))
    assert [row["n_questions"] for row in rows] == [70, 70]
    assert len(advanced) == questions.n_batches(models) == 4


def test_processes_share_the_models(tokenizer):
    """Each says how many batches are its own; all have the rows of one process."""
    made = {name: tiny.make_model("llama", seed=i) for i, name in enumerate(THREE)}
    models = {name: lambda model=model: nullcontext(model) for name, model in made.items()}
    questions = Questions.of(ListOps(), [], 5)

    def asked(processes):
        advanced = []
        rows = task_rows(models, tokenizer, questions, lambda: advanced.append(1), processes)
        return rows, len(advanced), questions.n_batches(models, processes)

    alone, *_ = asked(ALONE)
    (first, *ours), (second, *theirs) = together(2, asked)
    assert first == second == alone
    assert (ours, theirs) == ([2, 2], [1, 1])

"""The table: rates chosen on validation alone, intervals over seeds, nothing run twice."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tests.support import tiny
from toolkit import InputError
from toolkit.documents.tasks.task import Example, Task
from toolkit.jobs import comparison as run_table
from toolkit.jobs.comparison import TableRequest, make_table
from toolkit.models.pair import ModelPair
from toolkit.training import comparison as table
from toolkit.training.comparison import Bench, Outcome, Record, Setting, row_of, run_method
from toolkit.training.methods import Method
from toolkit.training.trainer import TrainingOptions


class Words(Task):
    """Say the prompt's last word again."""

    name = "words"
    new_tokens = 3

    def examples(self, split, n=None, seed=0):
        rng = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[split])
        texts = [tiny.random_text(rng, 4) for _ in range(n or 40)]
        return [Example(text, text.split()[-1], text.split()[-1]) for text in texts]

    def extract(self, text):
        return text.strip() or None


METHODS = (
    Method("base", "none"),
    Method("tuned", "tuned"),
    Method("vector", "vector", "post_block"),
    Method("fitted", "linear", "post_block", 2, start="sequential", trained=False),
    Method("fitted, trained", "loreft", "post_mlp", 2, start="forced"),
)


def make_bench(steps=2):
    base = tiny.make_model("llama").float()
    pair = ModelPair.from_models(base, tiny.tune(base), tiny.make_tokenizer())
    options = TrainingOptions(1.0, batch_size=4, max_steps=steps)
    setting = Setting(pair, Words(), options, 40, 10, 12, 30, n_kl=6, batch_size=5)
    return Bench(setting)


@pytest.fixture(scope="module")
def bench():
    return make_bench()


def outcome(method="vector", rate=1e-3, seed=0, right="0101", accuracy=0.5, loss=1.0):
    return Outcome(method, rate, seed, 10, right, accuracy, loss, 0.1, 0.9, 2, 30, 1.0, 0.0)


class Told:
    """A bench whose outcomes are known."""

    def __init__(self, validation):
        self.validation, self.asked = validation, []

    def run(self, method, rate, seed):
        self.asked.append((rate, seed))
        accuracy, loss = self.validation[rate]
        return outcome(method.name, rate, seed, "0" if rate == 3 else "1", accuracy, loss)


def test_the_rate_is_chosen_on_validation_and_run_with_every_seed(tmp_path):
    """Rate 3 has the best validation and the worst test; it is taken. Ties go to the loss."""
    bench = Told({1: (0.5, 0.1), 2: (0.9, 0.3), 3: (0.9, 0.2)})
    method = METHODS[2]
    found = run_method(bench, method, (1, 2, 3), (7, 8, 9), Record(tmp_path / "x.jsonl"))
    assert bench.asked == [(1, 7), (2, 7), (3, 7), (3, 8), (3, 9)]
    assert [(o.learning_rate, o.seed) for o in found] == [(3, 7), (3, 8), (3, 9)]


def test_a_loss_that_is_no_number_is_never_chosen(tmp_path):
    bench = Told({1: (0.0, float("nan")), 2: (0.0, 9.0)})
    found = run_method(bench, METHODS[2], (1, 2), (0,), Record(tmp_path / "x.jsonl"))
    assert found[0].learning_rate == 2


def test_finished_runs_are_not_run_again(tmp_path):
    """A line cut off by a kill counts as not there."""
    bench = Told({1: (0.5, 0.1), 2: (0.9, 0.3)})
    path = tmp_path / "runs" / "x.jsonl"
    run_method(bench, METHODS[2], (1, 2), (0, 1), Record(path))
    n_runs = len(bench.asked)
    whole = path.read_text()
    path.write_text(whole[: -len(whole.splitlines()[-1]) // 2])
    run_method(bench, METHODS[2], (1, 2), (0, 1), Record(path))
    assert len(bench.asked) == n_runs + 1


def test_a_row_is_the_mean_over_seeds_with_an_interval_over_both(tmp_path):
    seeds = [outcome(right="1111" * 50), outcome(right="0000" * 50)]
    row = row_of(METHODS[2], seeds, 1000)
    assert row["accuracy"] == 0.5
    assert row["accuracy_low"] == 0.0
    assert row["accuracy_high"] == 1.0
    same = row_of(METHODS[2], [outcome(right="01" * 100)] * 2, 1000)
    assert 0.4 < same["accuracy_low"] < 0.5 < same["accuracy_high"] < 0.6
    assert row["parameters_percent"] == 1.0


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_methods_run_and_leave_the_base_model_as_it_was(bench, method):
    before = {k: v.clone() for k, v in bench.pair.base.state_dict().items()}
    rate = 1e-2 if method.trained and method.kind not in ("none", "tuned") else None
    found = bench.run(method, rate, 0)
    assert len(found.right) == 12
    assert set(found.right) <= {"0", "1"}
    assert all(v.equal(before[k]) for k, v in bench.pair.base.state_dict().items())
    if method.kind == "none":
        assert found.recovered == 0
        assert found.parameters == 0
    if method.kind == "tuned":
        assert abs(found.kl) < 1e-9
        assert abs(found.recovered - 1) < 1e-9
    if method.kind == "vector":
        assert found.steps == 2
        assert found.parameters == tiny.N_LAYERS * tiny.D_MODEL


def test_seeds_reproduce_and_differ(bench):
    method = Method("r2", "linear", "post_block", 2)
    one, again, other = (bench.run(method, 1e-2, seed) for seed in (0, 0, 1))
    assert one.validation_loss == again.validation_loss != other.validation_loss


def test_the_job_writes_its_table_and_goes_on(tmp_path, monkeypatch):
    """In one process; a second call with more seeds runs only those."""
    monkeypatch.setattr(TableRequest, "bench", lambda self: make_bench())
    monkeypatch.setattr(run_table.tiny, "RATES", {"steering": (1e-2,)})
    request = TableRequest(methods=METHODS)
    frame, chance = make_table(request, tmp_path / "t", range(1), 1, show_progress=False)
    assert list(frame.method) == [m.name for m in METHODS]
    written = pd.read_csv(tmp_path / "t" / "table.csv")
    assert np.allclose(written.accuracy, frame.accuracy)
    about = json.loads((tmp_path / "t" / "table.json").read_text())
    assert about["chance"] == chance
    assert about["versions"]["torch"]
    assert (tmp_path / "t" / "table.png").stat().st_size > 10_000
    lines = {p.name: len(p.read_text().splitlines()) for p in (tmp_path / "t" / "runs").glob("*l")}
    frame, _ = make_table(request, tmp_path / "t", range(2), 1, show_progress=False)
    assert frame.set_index("method").seeds["vector"] == 2
    more = {p.name: len(p.read_text().splitlines()) for p in (tmp_path / "t" / "runs").glob("*l")}
    assert {k: more[k] - lines[k] for k in lines} == {
        "base.jsonl": 0, "tuned.jsonl": 0, "vector.jsonl": 1, "fitted.jsonl": 1,
        "fitted-trained.jsonl": 1,
    }  # fmt: skip
    with pytest.raises(InputError, match="another request"):
        make_table(replace(request, max_steps=7), tmp_path / "t", range(1), 1, False)
    run_table.forget_runs(tmp_path / "t")
    make_table(replace(request, max_steps=7), tmp_path / "t", range(1), 1, False)
    anew = {p.name: len(p.read_text().splitlines()) for p in (tmp_path / "t" / "runs").glob("*l")}
    assert anew == lines


def test_only_a_tables_own_runs_are_forgotten(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine.txt").write_text("kept")
    run_table.forget_runs(tmp_path)
    assert (tmp_path / "runs" / "mine.txt").exists()


def test_a_base_without_its_fine_tune_is_refused():
    with pytest.raises(InputError, match="needs --tuned"):
        TableRequest(model="somewhere").setting()
    assert table.Setting is Setting

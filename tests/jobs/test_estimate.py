"""Estimates without a fine-tune: short trainings, choice and report apart, resumed, refused."""

import json

import pandas as pd
import pytest
import torch

from tests.support import tiny
from tests.support.commands import oracle
from toolkit.adapters.collection import Adapters
from toolkit.analysis.divergence import Divergences
from toolkit.jobs.estimate import conclude
from toolkit.training.methods import Method
from toolkit.training.trials import Trial, most_of, smallest_with, trial_methods, trial_row

STEPS = 4


def made_up(name, parameters, choosing, reporting, kind="linear"):
    """A trial with one token's loss for each of a few documents."""
    sides = [torch.tensor(values).double()[:, None] for values in (choosing, reporting)]
    first, second = (Divergences(nats, torch.ones_like(nats).bool()) for nats in sides)
    return Trial(Method(name, kind, "post_block", 1), parameters, first, second)


NONE = made_up("base", 0, [2.0, 4.0], [3.0, 3.0, 6.0], "none")
SMALL = made_up("small", 10, [1.0, 2.2], [1.5, 2.5, 3.2])
LARGE = made_up("large", 90, [1.0, 2.0], [1.0, 1.0, 2.0])
LORA = made_up("lora", 900, [0.8, 2.0], [1.0, 1.5, 2.0], "lora")


def test_the_smallest_adapter_near_the_largest_gain_is_chosen_on_the_documents_that_choose():
    """Gains there are 1.4, 1.5 and, of the LoRA, which is never chosen, 1.6 nats."""
    trials = [SMALL, LARGE, LORA]
    assert most_of([NONE, *trials]) is LORA
    assert smallest_with(trials, NONE, 0.85) is SMALL
    assert smallest_with(trials, NONE, 0.9) is LARGE
    assert smallest_with(trials, NONE, 0.99) is LARGE  # none is so near: the nearest
    assert smallest_with([NONE, made_up("worse", 1, [5.0, 5.0], [9.0])], NONE, 0.5) is None


def test_a_training_whose_loss_is_no_number_is_never_chosen():
    lost = made_up("lost", 1, [float("nan"), float("nan")], [1.0, 1.0, 1.0])
    assert smallest_with([lost, SMALL, LARGE], NONE, 0.9) is SMALL
    assert most_of([NONE, lost, SMALL]) is SMALL
    assert smallest_with([lost], NONE, 0.9) is None


def test_the_headline_says_when_no_adapter_gains_the_share():
    trials = [NONE, SMALL, LARGE, LORA]
    reached = conclude(trials, 0.9, True, 1000)
    assert "the smallest adapter to gain 0.9 of the most" in reached.headline
    assert (reached.chosen, "large (90 parameters)" in reached.headline) == ("large", True)
    nearest = conclude(trials, 0.99, True, 1000)
    assert nearest.chosen == "large"
    assert "no adapter gains 0.99 of the most" in nearest.headline
    assert "smallest" not in nearest.headline


def test_rows_are_of_the_documents_that_report():
    row = trial_row(SMALL, NONE, LORA, 1000)
    assert row["loss"] == pytest.approx(7.2 / 3)
    assert row["gain"] == pytest.approx(4.8 / 3)
    assert row["share"] == pytest.approx(4.8 / 7.5)
    assert row["share_low"] < row["share"] < row["share_high"]
    assert (row["parameters_percent"], row["n_documents"]) == (1.0, 3)


def test_places_that_a_family_lacks_are_not_tried():
    names = [method.name for method in trial_methods({"heads": "no such point"})]
    assert names[0] == "pre_mlp vector"
    assert "post_mlp vector" not in names  # the same adapter as after the block
    assert len(names) == 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.save_request(tmp_path_factory.mktemp("models"), n_documents=40)
    rows = [{"prompt": f"w{5 + i % 9} w{6 + i}", "response": "w7 w8"} for i in range(30)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": f"w5 w{i}"}) for i in range(5, 25))
    )
    return folder


def estimated(folder, out, *more, train="train.jsonl"):
    asked = ("--train", folder / train, "--out", out, "--steps", STEPS, "--quiet")
    return oracle("diagnose", folder / "base", *asked, *more)


def test_an_estimate_says_what_it_is_and_goes_on(folder, tmp_path):
    out = tmp_path / "estimate"
    result = estimated(folder, out)
    assert result.exit_code == 0, result.output
    assert "An estimate" in result.stdout
    frame = pd.read_csv(out / "estimate.csv")
    page = (out / "estimate.html").read_text("utf-8")
    assert all(f">{method}</td>" in page for method in frame.method)
    assert page.count('<tr class="chosen">') == 1
    assert "nan" not in page.split("<h2>All trainings</h2>")[1]
    said = json.loads((out / "estimate.json").read_text())
    assert frame.method[0] == "base"
    assert frame.gain[0] == 0
    assert (frame.n_documents > 1).all()
    if said["chosen"]:
        kept = Adapters.from_pretrained(out / "adapters")
        row = frame[frame.method == said["chosen"]].iloc[0]
        assert (kept.location, kept.parameters) == (row.location, row.parameters)
        assert kept.fit == "trained"
        card = (out / "adapters" / "README.md").read_text()
        assert f"- data: `{folder / 'train.jsonl'}`\n- sha256 of the data: `{said['data']}`" in card
    assert (out / "estimate.png").is_file()
    # Finished trainings are not run again: the marked loss of one is read.
    kept = out / "trials" / "pre_mlp-r1.safetensors"
    kept.unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (out / "trials").glob("*.safetensors")}
    again = estimated(folder, out)
    assert again.exit_code == 0
    after = {path.name: path.stat().st_mtime_ns for path in (out / "trials").glob("*.safetensors")}
    assert {name: after[name] for name in before} == before
    assert kept.is_file()
    assert pd.read_csv(out / "estimate.csv").equals(frame)


REFUSED = {
    "with a fine-tune": (["TUNED"], "train.jsonl", "without TUNED"),
    "no responses": ([], "texts.jsonl", "no held-out document with a response"),
    "responses cut off": (["--max-length", "2"], "train.jsonl", "response within --max-length"),
    "a plan": (["--dry-run"], "train.jsonl", "--train takes no --dry-run"),
    "a task": (["--task", "listops", "--distil", "5"], "train.jsonl", "no --distil, --task"),
    "no steps": (["--steps", "0"], "train.jsonl", "1 or more steps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_estimated_is_one_line(name, folder, tmp_path):
    more, train, expected = REFUSED[name]
    result = estimated(folder, tmp_path / "out", *more, train=train)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert expected in result.stderr
    assert not list(tmp_path.iterdir())


def test_documents_past_the_learned_positions_are_one_line(tmp_path):
    tiny.save_pair(tmp_path, "gpt2")
    words = " ".join(f"w{5 + i % 50}" for i in range(140))
    rows = [{"prompt": f"w{n} {words}", "response": "w7 w8"} for n in range(5, 35)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = estimated(tmp_path, tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert "the model's learned positions end at 128: give --max-length 128" in result.stderr
    assert not (tmp_path / "out").exists()

"""Fitting, training and judging as a user gives the commands, on tiny models in folders."""

import json

import numpy as np
import pytest
import torch

from tests.support import tiny
from tests.support.commands import oracle
from toolkit import Adapters, ModelPair, steer
from toolkit.jobs import train as jobs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base and a tuned model, training and test examples (say the last word again)."""
    root = tiny.save_pair(tmp_path_factory.mktemp("training"))
    rng = np.random.default_rng(0)
    for name, n in (("train", 60), ("test", 12)):
        texts = [tiny.random_text(rng, 5) for _ in range(n)]
        rows = [{"prompt": t, "response": t.split()[-1], "answer": t.split()[-1]} for t in texts]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def task(root):
    files = ("--train", root / "train.jsonl", "--test", root / "test.jsonl")
    return ("--task", "jsonl", *files, "--quiet")


SHORT = ("--max-steps", 3, "--batch-size", 8)


@pytest.mark.parametrize(
    ("kind", "location"),
    [("linear", "post_block"), ("gated_heads", "heads"), ("loreft", "pre_mlp")],
)
def test_train_and_judge(root, tmp_path, kind, location):
    """The best of two rates is kept, can be judged, and the record says how it came about."""
    out, where = tmp_path / "adapters", ("--kind", kind, "--location", location, "--rank", 2)
    rates = ("--rate", 1e-3, "--rate", 1e-1)
    done = oracle(
        "steer", "train", root / "base", *task(root), *where, *rates, *SHORT, "--out", out
    )
    assert done.exit_code == 0, done.output
    record = json.loads((out / "training.json").read_text())
    scores = {
        r["learning_rate"]: (r["validation_accuracy"], -r["validation_loss"])
        for r in record["rates"]
    }
    assert record["best"] == max(scores, key=scores.get)
    adapters = Adapters.from_pretrained(out)
    assert (adapters.kind, adapters.location, adapters.fit) == (kind, location, "trained")
    assert adapters.info["learning_rate"] == record["best"]
    found = tmp_path / "found.json"
    judged = oracle("steer", "eval", root / "base", *task(root), "--adapters", out,
                    "--tuned", root / "tuned", "--out", found)  # fmt: skip
    assert judged.exit_code == 0, judged.output
    results = {row["who"]: row for row in json.loads(found.read_text())["results"]}
    assert results.keys() == {"base", str(out), "tuned"}
    assert results["base"]["recovered"] == 0
    assert results["tuned"]["recovered"] == pytest.approx(1)


def test_an_interrupted_training_goes_on(root, tmp_path, monkeypatch):
    """The second rate fails; the same command then trains that one alone."""
    out, rates = tmp_path / "adapters", ("--rate", 1e-3, "--rate", 1e-2)
    asked = []
    real = jobs.train

    def failing(trainee, rows, options, *more):
        asked.append(options.learning_rate)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(trainee, rows, options, *more)

    monkeypatch.setattr(jobs, "train", failing)
    command = ("steer", "train", root / "base", *task(root), *rates, *SHORT, "--out", out)
    oracle(*command)
    assert oracle(*command).exit_code == 0
    assert asked == [1e-3, 1e-2, 1e-2]
    other = oracle(*command, "--kind", "vector")
    assert other.exit_code == 2
    assert "another training" in other.stderr


def test_finetune_makes_models_that_load(root, tmp_path):
    """LoRA as a PEFT folder, all weights as a model's: both are tuned halves of a pair."""
    for method in ("lora", "sft"):
        out = tmp_path / method
        arguments = ("--method", method, "--rank", 2, "--rate", 1e-2, *SHORT, "--out", out)
        done = oracle("finetune", root / "base", *task(root), *arguments)
        assert done.exit_code == 0, done.output
        pair = ModelPair.load(root / "base", out)
        ids = torch.arange(5, 15)[None]
        assert not torch.equal(pair.base(ids).logits, pair.tuned(ids).logits)


@pytest.mark.parametrize("fit", ["forced", "sequential", "blended", "best"])
def test_fit(root, tmp_path, fit):
    """Adapters nearer to the tuned model than the base is, and a start for training."""
    out, data = tmp_path / "fitted", ("--data", root / "train.jsonl")
    done = oracle("steer", "fit", root / "base", root / "tuned", *data, "--rank", 4, "--fit", fit,
                  "--out", out, "--quiet")  # fmt: skip
    assert done.exit_code == 0, done.output
    pair, adapters = ModelPair.load(root / "base", root / "tuned"), Adapters.from_pretrained(out)
    prompts = [
        json.loads(line)["prompt"] for line in (root / "train.jsonl").read_text().splitlines()
    ]
    ids = pair.tokenizer(prompts, return_tensors="pt")["input_ids"]
    target = pair.tuned(ids).logits[:, 1:]
    far = lambda: float((pair.base(ids).logits[:, 1:] - target).square().mean())  # noqa: E731
    without = far()
    with steer(pair.base, adapters):
        assert far() < without
    again = oracle("steer", "train", root / "base", *task(root), "--rate", 1e-3, *SHORT,
                   "--start", out, "--out", tmp_path / "on")  # fmt: skip
    assert again.exit_code == 0, again.output
    assert Adapters.from_pretrained(tmp_path / "on").parameters == adapters.parameters


def test_allocated_ranks_have_the_same_parameters(root, tmp_path):
    sizes = []
    for more in ((), ("--allocate",)):
        out = tmp_path / f"a{len(more)}"
        done = oracle("steer", "fit", root / "base", root / "tuned", "--data", root / "train.jsonl",
                      "--rank", 4, "--out", out, "--quiet", *more)  # fmt: skip
        assert done.exit_code == 0, done.output
        sizes.append(Adapters.from_pretrained(out))
    assert sizes[0].parameters == sizes[1].parameters
    ranks = [adapter.rank for adapter in sizes[1].by_layer.values()]
    assert sum(ranks) == 4 * tiny.N_LAYERS
    assert min(ranks) >= 1


TRAIN, OUT = ("steer", "train", "{base}"), ("--out", "{out}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*TRAIN, "--task", "chess", *OUT), "no task is called"),
        ((*TRAIN, "--task", "jsonl", *OUT), "needs --train FILE"),
        ((*TRAIN, "--task", "listops", "--kind", "x", *OUT), "--kind"),
        ((*TRAIN, "--task", "listops", "--rank", "0", *OUT), "--rank"),
        ((*TRAIN, "--task", "listops", "--positions", "some", *OUT), "positions is 'some'"),
        (("finetune", "{base}", "--task", "listops", "--method", "x", *OUT), "sft or lora"),
        (("steer", "eval", "{base}", "--task", "listops", "--adapters", "{out}"), "does not hold"),
        (("table", "--model", "{base}", *OUT), "needs --tuned"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(root, tmp_path, arguments, message):
    filled = [a.format(base=root / "base", out=tmp_path / "out") for a in arguments]
    done = oracle(*filled)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_test_file_is_enough_to_judge(root, tmp_path):
    """Chance is then of the test's own most frequent answer."""
    found = tmp_path / "found.json"
    judged = oracle("steer", "eval", root / "base", "--task", "jsonl", "--test",
                    root / "test.jsonl", "--out", found, "--quiet")  # fmt: skip
    assert judged.exit_code == 0, judged.output
    answers = [
        json.loads(line)["answer"] for line in (root / "test.jsonl").read_text().splitlines()
    ]
    most = max(answers.count(answer) for answer in answers)
    assert json.loads(found.read_text())["chance"] == pytest.approx(most / len(answers))


@pytest.mark.parametrize("command", ["fit", "train", "eval"])
def test_a_wrong_dtype_is_one_line(root, tmp_path, command):
    out = tmp_path / "out"
    words = {
        "fit": (root / "base", root / "tuned", "--data", root / "train.jsonl", "--out", out),
        "train": (root / "base", *task(root), *SHORT, "--out", out),
        "eval": (root / "base", *task(root)),
    }[command]
    done = oracle("steer", command, *words, "--dtype", "floaty")
    assert done.exit_code == 2
    assert "--dtype is 'floaty': expected one of float32" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_longer_examples_are_skipped_when_asked(root, tmp_path):
    rows = (root / "train.jsonl").read_text()
    long = json.dumps({"prompt": "w5 " * 40, "response": "w5", "answer": "w5"})
    (tmp_path / "train.jsonl").write_text(f"{rows}{long}\n")
    files = ("--train", tmp_path / "train.jsonl", "--test", root / "test.jsonl", "--quiet")
    words = ("finetune", root / "base", "--task", "jsonl", *files, *SHORT, "--max-length", 30)
    refused = oracle(*words, "--out", tmp_path / "a")
    assert refused.exit_code == 2
    assert "1 of " in refused.stderr
    assert "--longer skip" in refused.stderr
    done = oracle(*words, "--longer", "skip", "--rate", 1e-3, "--out", tmp_path / "b")
    assert done.exit_code == 0, done.output
    assert "left out: 1 examples" in done.stderr

"""The plan of a run, against the run."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from tests.support import tiny
from toolkit import ModelPair, Options, diagnose
from toolkit.cli.main import app
from toolkit.documents.batches import make_batches
from toolkit.documents.documents import read_documents
from toolkit.documents.tokens import encode_all
from toolkit.models.outline import outline
from toolkit.planning.estimate import duration, engineering, plan


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch):
    """Time for a moment only: tests ask whether rates are found, not how steady they are."""
    monkeypatch.setattr("toolkit.planning.timing.SECONDS", 0.02)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny.save_request(tmp_path_factory.mktemp("models"))


@pytest.fixture
def no_weights(monkeypatch):
    """Loading any weights fails."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("toolkit.models.pair.load_model", refuse)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)


def oracle(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def asked(folders, *more):
    data = ("--data", folders / "data.jsonl")
    return ("diagnose", folders / "base", folders / "tuned", *data, *more)


def test_the_plan_is_of_the_runs_own_batches_and_prompts(folders, no_weights):
    documents = read_documents(folders / "data.jsonl")
    options = Options(batch_tokens=64, max_prompts=3, positions="response")
    planned = plan(outline(folders / "base", folders / "tuned"), documents, options, timed=False)
    encoded = encode_all(documents, tiny.make_tokenizer())
    batches = make_batches(encoded, "response", 64)
    shapes = [(b.rows, b.length, b.counted, b.held_out) for b in planned.work.batches]
    assert shapes == [(*b.ids.shape, int(b.counted.sum()), b.held_out) for b in batches]
    assert sum(p.rows for p in planned.work.prompts) == 3
    assert sum(planned.documents) == len(encoded) == 20
    with pytest.raises(ValueError, match="timed=True"):
        planned.seconds(planned.stages[0])


def test_the_plan_has_the_runs_candidates(folders):
    documents = read_documents(folders / "data.jsonl")
    options = Options(new_tokens=4, max_prompts=2, sample=0, shared_sample=0)
    planned = plan(outline(folders / "base", folders / "tuned"), documents, options, timed=False)
    pair = ModelPair.load(folders / "base", folders / "tuned")
    run = diagnose(pair, documents, options, show_progress=False)
    frame = run.steerability.frame
    everywhere = frame[(frame.layers == "all") & (frame.kind != "oracle")]
    assert planned.work.everywhere == len(everywhere)
    assert planned.work.single == (frame.layers != "all").any()
    by_folds = replace(options, folds=3)
    planned = plan(outline(folders / "base", folders / "tuned"), documents, by_folds, timed=False)
    frame = diagnose(pair, documents, by_folds, show_progress=False).cross_fitted.frame
    assert planned.work.fold_maps == len(frame)
    assert {sum(p.rows for p in planned.work.fold_prompts)} == set(frame.n_prompts) == {6}


def test_dry_run_says_all_and_writes_nothing(folders, no_weights, tmp_path):
    before = sorted(folders.rglob("*"))
    result = oracle(*asked(folders, "--dry-run", "--out", tmp_path / "out"))
    assert result.exit_code == 0, result.output
    for said in ("counted tokens", "passes of the march", "moments", "estimated time"):
        assert said in result.stdout
    assert "memory: enough" in result.stdout
    assert not list(tmp_path.iterdir())
    assert sorted(folders.rglob("*")) == before


def test_dry_run_needs_no_out(folders, no_weights):
    result = oracle(*asked(folders, "--dry-run", "--dtype", "bfloat16", "--max-kl", "0.1"))
    assert result.exit_code == 0, result.output
    assert "rank set: passes" in result.stdout
    assert "the search for ranks is counted with 2 rounds" in result.stdout
    assert "size of the process" in result.stdout


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "phi3", "opt", "mixtral"])
def test_families_are_timed(family, tmp_path, tokenizer):
    base = tiny.make_model(family, torch.float32)
    for name, model in (("base", base), ("tuned", tiny.tune(base))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    planned = plan(outline(tmp_path / "base", tmp_path / "tuned"), tiny.make_documents(12))
    assert all(planned.seconds(stage) > 0 for stage in planned.stages)
    assert planned.total_seconds == sum(map(planned.seconds, planned.stages))
    has_mlp = "first order of the MLPs" in {stage.name for stage in planned.stages}
    assert has_mlp == (family != "mixtral")


def test_a_run_that_does_not_fit_is_refused_before_models_are_read(
    folders, no_weights, monkeypatch, tmp_path
):
    monkeypatch.setattr("toolkit.planning.free_memory.available_memory", lambda: 1000.0)
    result = oracle(*asked(folders, "--quiet", "--out", tmp_path / "out"))
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "this run needs about" in result.stderr
    assert "--no-memory-check" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_check_can_be_left_out(folders, monkeypatch, tmp_path):
    monkeypatch.setattr("toolkit.planning.free_memory.available_memory", lambda: 1000.0)
    small = ("--new-tokens", 2, "--sample", 0, "--shared-sample", 0, "--max-prompts", 1)
    asked_for = asked(folders, "--quiet", "--out", tmp_path / "out", "--no-memory-check", *small)
    result = oracle(*asked_for)
    assert result.exit_code == 0, result.output


def test_models_of_different_sizes_are_refused(folders, tmp_path, tokenizer):
    tiny.make_model("gpt2", torch.float32).save_pretrained(tmp_path / "other")
    data = ("--data", folders / "data.jsonl")
    result = oracle("diagnose", folders / "base", tmp_path / "other", *data, "--dry-run")
    assert result.exit_code == 2
    assert "the models differ in model_type" in result.stderr


def test_numbers_in_words():
    assert engineering(12_345_678_900) == "12.3 G"
    assert engineering(950) == "950"
    assert (duration(5.24), duration(180), duration(8640)) == ("5.2 s", "3.0 min", "2.4 h")

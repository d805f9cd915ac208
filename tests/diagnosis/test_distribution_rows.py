"""The tables distributions, tokens and prompts of a whole run, by plain code from its models."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from tests.documents.test_phases import thinking_tokenizer
from tests.support import textbook, tiny
from toolkit import Options, diagnose
from toolkit.diagnosis.distribution_rows import first_difference
from toolkit.documents.tokens import encode_all
from toolkit.report.folder import publish, read_run

N_NEW = 6
ENDS = {tiny.EOS, *range(20, 26)}


def thinking_documents(n=90):
    """Prompts, every second of which has the model begin to think."""
    rng = np.random.default_rng(0)
    return [
        {
            "prompt": tiny.random_text(rng, 4) + (" <think>" if index % 2 else ""),
            "response": tiny.random_text(rng, 5),
        }
        for index in range(n)
    ]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A run, its pair, and the prompts that report."""
    tokenizer = thinking_tokenizer()
    pair = tiny.make_pair("llama", torch.float64, tokenizer, size=0.5)
    pair.tuned.generation_config.eos_token_id = sorted(ENDS)
    documents = thinking_documents()
    run = diagnose(pair, documents, Options(new_tokens=N_NEW, sample=1), show_progress=False)
    encoded = encode_all(documents, tokenizer)
    prompts = [e.prompt_ids for e in encoded if e.held_out and e.reports]
    assert len(prompts) > 3
    folder = tmp_path_factory.mktemp("where") / "run"
    publish(run, folder)
    return run, pair, prompts, folder


def said_and_nats(pair, prompts):
    """The tuned model's answers, and KL(tuned ‖ base) of their tokens, by the textbook."""
    for prompt in prompts:
        logits = lambda ids: textbook.run(pair.tuned, ids).logits  # noqa: E731
        said, ours = textbook.greedy(logits, prompt, N_NEW, ENDS)
        theirs = textbook.run(pair.base, [*prompt, *said]).logits[len(prompt) - 1 : -1]
        yield said, textbook.kl(ours, theirs)


def test_the_base_is_as_far_as_the_textbook_says(case):
    run, pair, prompts, _ = case
    nats = [found for _, found in said_and_nats(pair, prompts)]
    frame = run.distributions.frame
    row = frame.query("model == 'base' and phase == 'all'").iloc[0]
    every = np.concatenate(nats)
    sums, counts = (np.array([f(n) for n in nats], dtype=float) for f in (np.sum, len))
    assert (row.n_prompts, row.n_samples, row.n_tokens) == (len(prompts), len(prompts), len(every))
    assert row.kl == pytest.approx(every.mean())
    assert row.kl_sem == pytest.approx(textbook.ratio_sem(sums, counts))
    largest = np.sort(every)[::-1]
    n = int(np.ceil(len(every) / 10))
    assert row.top_tenth == pytest.approx(largest[:n].sum() / every.sum())
    own = [
        textbook.greedy(lambda ids: textbook.run(pair.base, ids).logits, prompt, N_NEW, ENDS)[0]
        for prompt in prompts
    ]
    said = [tokens for tokens, _ in said_and_nats(pair, prompts)]
    indices = [
        next((i for i in range(N_NEW) if a[i : i + 1] != b[i : i + 1]), None)
        for a, b in zip(said, own, strict=True)
    ]
    assert row.exact == pytest.approx(np.mean([index is None for index in indices]))
    differ = [index for index in indices if index is not None]
    assert row.first_difference == pytest.approx(np.mean(differ))
    assert set(frame.model) == {"base", "recommended", "runner-up"}


def test_phases_add_up(case):
    """Tokens, nats of answers and nats of whole sequences; every phase is of the right tokens."""
    frame = case[0].distributions.frame
    for _, rows in frame.groupby("model"):
        by = rows.set_index("phase")
        assert set(by.index) == {"all", "thinking", "answer"}
        parts = by.drop(index="all")
        assert parts.n_tokens.sum() == by.n_tokens["all"]
        assert (parts.kl * parts.n_tokens).sum() == pytest.approx(by.kl["all"] * by.n_tokens["all"])
        for column in ("sequence_kl", "reverse_sequence_kl"):
            assert parts[column].sum() == pytest.approx(by[column]["all"])
        assert parts.exact.isna().all()
    _, pair, prompts, _ = case
    think = [58 in prompt for prompt in prompts]
    said = [tokens for tokens, _ in said_and_nats(pair, prompts)]
    assert not any(58 in tokens for tokens in said)
    thought = sum(
        (tokens.index(59) + 1 if 59 in tokens else len(tokens))
        for tokens, thinks in zip(said, think, strict=True)
        if thinks
    )
    assert by.n_tokens["thinking"] == thought


def test_tokens_and_prompts_are_those_with_most(case):
    run, pair, prompts, _ = case
    found = list(said_and_nats(pair, prompts))
    total = sum(float(nats.sum()) for _, nats in found)
    every = sorted(
        (
            (float(value), row, index)
            for row, (_, nats) in enumerate(found)
            for index, value in enumerate(nats)
        ),
        reverse=True,
    )
    rows = run.tokens.frame.query("of == 'changed'")
    assert len(rows) == min(40, len(every))
    for place, (ours, (value, prompt, index)) in enumerate(
        zip(rows.itertuples(), every, strict=False), start=1
    ):
        assert (ours.place, ours.prompt, ours.token_index) == (place, prompt, index)
        assert ours.nats == pytest.approx(value)
        assert ours.share == pytest.approx(value / total)
        assert ours.n_tokens == len(every)
        token = found[prompt][0][index]
        assert json.loads(ours.token) == pair.tokenizer.decode([token])
        assert ours.next_tuned.startswith(f"{ours.token} 0.")
        before = [*prompts[prompt], *found[prompt][0][:index]][-12:]
        assert json.loads(ours.context) == pair.tokenizer.decode(before)
    sums = run.prompts.frame
    np.testing.assert_allclose(sums.base, [nats.sum() for _, nats in found])
    assert sums.base_share.sum() == pytest.approx(1)
    recommended = run.distributions.frame.query("model == 'recommended' and phase == 'all'").iloc[0]
    assert sums.steered.sum() == pytest.approx(recommended.kl * recommended.n_tokens)
    left = run.tokens.frame.query("of == 'left'")
    assert left.nats.is_monotonic_decreasing
    assert left.nats.sum() <= sums.steered.sum() * (1 + 1e-12)


def test_a_run_keeps_them_and_the_page_shows_them(case):
    run, _, _, folder = case
    again = read_run(folder)
    for name in ("distributions", "tokens", "prompts"):
        assert run.tables[name].finding() == again.tables[name].finding()
        ours, theirs = (r.tables[name].frame for r in (run, again))
        pd.testing.assert_frame_equal(ours, theirs, check_dtype=False)
    html = (folder / "report.html").read_text("utf-8")
    assert "What fine-tuning changed: the tokens that hold most" in html
    assert "What steering leaves: the tokens that hold most" in html
    phases = json.loads((folder / "run.json").read_text())["data"]["fit"]["phases"]
    assert phases["thinking"] > 0
    assert sum(phases.values()) == run.info["data"]["fit"]["tokens"]


def test_runs_that_were_made_before_have_no_such_tables(case, tmp_path):
    """Their pages have no such section."""
    _, _, _, folder = case
    publish(read_run(folder), tmp_path / "run")
    said = json.loads((tmp_path / "run" / "report.json").read_text())
    for name in ("distributions", "tokens", "prompts"):
        (tmp_path / "run" / "tables" / f"{name}.csv").unlink()
        del said["tables"][name]
    (tmp_path / "run" / "report.json").write_text(json.dumps(said))
    old = read_run(tmp_path / "run")
    assert not old.tokens.measured
    publish(old, tmp_path / "again")
    assert "Where it sits</h2>" not in (tmp_path / "again" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("a", "b", "index"),
    [
        ([5, 6, 1], [5, 6, 1], None),
        ([5, 6, 1], [5, 7, 6], 1),
        ([5, 1], [5, 6, 6], 1),
        ([5, 6], [5, 6, 1], 2),
        ([], [], None),
    ],
)
def test_the_first_difference(a, b, index):
    assert first_difference(a, b) == first_difference(b, a) == index

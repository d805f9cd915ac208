"""Every table of a diagnosis equals the textbook's, on tiny models of several families."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests import textbook, tiny
from tests.textbook import Textbook
from toolkit import InputError, ModelPair, Options, Run, diagnose
from toolkit.documents import encode_all

N_NEW = 6
ENDS = {tiny.EOS, *range(20, 26)}  # many, so that some prompts end early
FEW = [{"text": "w5 w6 w7 w8"}, {"text": "w30 w11 w9"}, {"text": "w40 w21 w16 w5"}]
FAMILIES = ("llama", "gemma3", "qwen3", "gpt2", "neox", "phi3", "opt")
CASES = [(family, torch.float64) for family in FAMILIES]
CASES += [(family, torch.float32) for family in ("llama", "gemma3", "qwen3", "gpt2")]
each_case = pytest.mark.parametrize(
    ("family", "dtype"), CASES, ids=[f"{f}-{str(t)[6:]}" for f, t in CASES]
)

# Relative to the quantity itself where it keeps its sign, else to its scale (a share's is 1).
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-5}


@dataclass
class Case:
    """A diagnosis and the textbook on the same models and documents."""

    run: Run
    book: Textbook
    prompts: list[tuple[int, ...]]
    parameters: int
    tolerance: float


@functools.cache
def case(family: str, dtype: torch.dtype) -> Case:
    tokenizer = tiny.make_tokenizer()
    pair = tiny.make_pair(family, dtype, tokenizer)
    pair.tuned.generation_config.eos_token_id = sorted(ENDS)
    options = Options(new_tokens=N_NEW, sample=1, batch_tokens=200)
    documents = tiny.make_documents(24)
    run = diagnose(pair, documents, options, show_progress=False)
    encoded = encode_all(documents, tokenizer)
    book = Textbook(pair.base, pair.tuned, [(e.ids, e.held_out) for e in encoded])
    prompts = [e.prompt_ids for e in encoded if e.held_out]
    return Case(run, book, prompts, pair.n_parameters, TOLERANCE[dtype])


def assert_tables_equal(
    ours: pd.DataFrame, rows: Any, keys: list[str], rtol: float, atol: float = 0.0
) -> None:
    """The same rows by `keys`, and every other column of `rows` within tolerance."""
    theirs = pd.DataFrame(rows)
    both = theirs.merge(ours, on=keys, suffixes=("_book", ""), validate="one_to_one")
    assert len(both) == len(theirs) == len(ours)
    for column in set(theirs) - set(keys):
        expected, found = (both[c].to_numpy(float) for c in (f"{column}_book", column))
        np.testing.assert_allclose(found, expected, rtol, atol, err_msg=column)


@each_case
def test_norms(family, dtype):
    """Mean norm per token of every branch, and the MLP's share of them."""
    c = case(family, dtype)
    assert_tables_equal(c.run.norms.frame, c.book.norms(), ["layer", "of"], c.tolerance)


@each_case
def test_spectrum(family, dtype):
    """Eigenvalues of E[δδᵀ], from singular values of the deltas."""
    c = case(family, dtype)
    keys = ["layer", "location", "mode"]
    assert_tables_equal(c.run.spectrum.frame, c.book.spectrum(), keys, c.tolerance)


@each_case
def test_linear_fit(family, dtype):
    """Least squares with a ridge and reduced-rank regression, for all sources, targets, ranks.

    `explained` is 1 less a quotient and may be near 0: its scale is 1.
    """
    c = case(family, dtype)
    keys = ["layer", "source", "target", "mode", "rank"]
    tolerance = {"rtol": 0.0, "atol": c.tolerance}
    assert_tables_equal(c.run.linear_fit.frame, c.book.linear_fit(), keys, **tolerance)


@each_case
def test_first_order(family, dtype):
    """Terms of the MLP's change, token by token; shares may be near 0: their scale is 1."""
    c = case(family, dtype)
    tolerance = {"rtol": 0.0, "atol": c.tolerance}
    assert_tables_equal(c.run.first_order.frame, c.book.first_order(), ["layer"], **tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_reachability(family, tokenizer):
    """Budgeted residuals by damped least squares, on every counted token of few documents.

    A budget that suffices leaves a residual of rounding, 1e-16 or 1e-15: a residual's scale is 1.
    """
    pair = tiny.make_pair(family, torch.float64, tokenizer)
    run = diagnose(pair, FEW, Options(new_tokens=2, sample=100), show_progress=False)
    ids = [(e.ids, e.held_out) for e in encode_all(FEW, tokenizer)]
    rows = Textbook(pair.base, pair.tuned, ids).reachability()
    keys = ["layer", "target", "budget"]
    assert_tables_equal(run.reachability.frame, rows, keys, 1e-6, 1e-9)


@each_case
def test_sequential_kl(family, dtype):
    """KL at every generated token index, of no steering, the oracle and every candidate."""
    c = case(family, dtype)
    frame = c.run.sequential_kl.frame
    for candidate, nats in every_candidate(family, dtype):
        for forcing in nats:
            found = of_candidate(frame, candidate).query("forcing == @forcing")
            if not nats[forcing] or (candidate["layers"] != "all" and forcing == "own"):
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
    assert len(candidates) == len(c.run.steerability.frame)
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


def test_identical_models_differ_nowhere(tokenizer):
    """All tables are zero and hold no NaN, nothing is recommended, and every check agrees."""
    base = tiny.make_model("llama")
    pair = ModelPair.from_models(base, tiny.copy_of(base), tokenizer)
    run = diagnose(pair, tiny.make_documents(24), Options(new_tokens=3), show_progress=False)
    assert run.recommendation is None
    assert run.adapters is None
    assert run.reachability.frame.empty
    deltas = run.norms.frame.query("of in ('delta_free', 'delta_forced')")
    zero = [
        deltas.drop(columns=["layer", "of"]),
        run.spectrum.frame.drop(columns=["layer", "location", "mode", "n_tokens"]),
        run.linear_fit.frame[["explained_fit", "explained_heldout"]],
        run.first_order.frame.drop(columns="layer"),
        run.sequential_kl.frame[["kl_mean", "kl_sem"]],
        run.steerability.frame[["kl", "kl_sem", "recovered", "recovered_sem"]],
    ]
    for frame in zero:
        assert len(frame)
        assert not frame.to_numpy(float).any()
    assert not [check for check in run.checks if check.status == "failed"]


def test_oracle_in_every_family(tokenizer):
    """Writing every block's tuned output into the base model leaves no divergence."""
    for family in FAMILIES:
        if family != "opt":
            kl = of_candidate(case(family, torch.float64).run.steerability.frame, ORACLE).kl
            assert float(kl.iloc[0]) < 1e-10


def test_recommendation_is_the_smallest_within_one_standard_error():
    """It recovers something, none of those tied with it is smaller, and its adapters are there."""
    c = case("llama", torch.float64)
    chosen = c.run.recommendation
    assert chosen["recovered"] > 0
    assert chosen["recovered"] <= chosen["best"]["recovered"]
    assert chosen["parameters"] == c.run.adapters.parameters
    assert chosen["parameters"] <= min(
        (tied["parameters"] for tied in chosen["tied"]), default=chosen["parameters"]
    )
    assert chosen["best"]["recovered"] == c.run.steerability.frame.recovered.iloc[2:].max()


@pytest.mark.parametrize("family", ["granite", "mixtral"])
def test_what_a_family_lacks_is_said_and_the_rest_goes_on(family, tokenizer):
    """Granite scales its branches, Mixtral has no dense MLP: no rows there, and a reason."""
    pair = tiny.make_pair(family, torch.float32, tokenizer)
    run = diagnose(pair, tiny.make_documents(24), Options(new_tokens=3), show_progress=False)
    reasons = {check.name: check for check in run.checks if check.name.startswith("location")}
    assert {check.status for check in reasons.values()} == {"not applicable"}
    if family == "granite":
        assert {"location pre_mlp", "location post_mlp"} <= reasons.keys()
        assert set(run.spectrum.frame.location) == {"post_block"}
        assert set(run.linear_fit.frame.source) == {"post_block"}
        assert run.norms.frame[["pre_mlp", "post_mlp", "mlp_share"]].isna().all(axis=None)
    else:
        assert "location mlp" in reasons or "location mlp_act" in reasons
        assert run.first_order.frame.empty
        assert run.reachability.frame.empty
        assert set(run.spectrum.frame.location) == set(textbook.BRANCHES)
    assert all(len(check.detail) > 20 for check in reasons.values())
    oracle = of_candidate(run.steerability.frame, ORACLE)
    assert float(oracle.recovered.iloc[0]) > 0.999
    assert not run.linear_fit.frame.isna().any(axis=None)


@pytest.mark.parametrize("batch_tokens", [2, 64])
def test_padding_and_batching_change_nothing(batch_tokens, tokenizer):
    """One document a batch, few or all of them: the same numbers."""
    pair = tiny.make_pair("gemma3", torch.float64, tokenizer)
    tables = [
        diagnose(
            pair,
            tiny.make_documents(24),
            Options(new_tokens=2, sample=2, batch_tokens=n),
            show_progress=False,
        ).tables
        for n in (batch_tokens, 10_000)
    ]
    for ours, theirs in zip(*tables, strict=True):
        numbers = ours.frame.select_dtypes("number")
        np.testing.assert_allclose(
            numbers, theirs.frame[list(numbers)], 1e-9, 1e-10, err_msg=ours.name
        )


@pytest.mark.parametrize("positions", ["all", "response", "last"])
def test_positions_choose_the_tokens_that_count(llama_pair, positions):
    """Norms are over those tokens alone: by the textbook, masked by hand."""
    documents = [d for d in tiny.make_documents(24) if "prompt" in d]
    options = Options(positions=positions, new_tokens=2, sample=1)
    run = diagnose(llama_pair, documents, options, show_progress=False)
    lengths, n_tokens = [], 0
    for document in documents:
        n_prompt, n_response = (len(document[k].split()) for k in ("prompt", "response"))
        n = n_prompt + n_response
        first = {"all": 1, "response": n_prompt, "last": n - 1}[positions]
        ids = [int(word[1:]) for k in ("prompt", "response") for word in document[k].split()]
        states = textbook.run(llama_pair.base, ids).states["post_mlp", 1][first:]
        lengths += [np.linalg.norm(state) for state in states]
        n_tokens += n - first
    assert set(run.spectrum.frame.n_tokens) == {n_tokens}
    row = run.norms.frame.query("layer == 1 and of == 'base'")
    assert row.post_mlp.iloc[0] == pytest.approx(np.mean(lengths), rel=1e-10)


def test_sample_may_be_zero(llama_pair):
    """Without a sample there is no reachability, and all else is as before."""
    run = diagnose(llama_pair, FEW, Options(new_tokens=2, sample=0), show_progress=False)
    assert run.reachability.frame.empty
    assert len(run.first_order.frame) == tiny.N_LAYERS


@pytest.mark.parametrize(
    "wrong",
    [
        {"positions": "some"},
        {"max_length": 1},
        {"new_tokens": 0},
        {"sample": -1},
        {"max_prompts": 0},
    ],
)
def test_options_are_refused_by_name(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Options(**wrong)


def test_too_few_documents_are_refused(llama_pair):
    with pytest.raises(InputError, match="at least 2"):
        diagnose(llama_pair, FEW[:1], show_progress=False)


def kl_tolerance(c: Case) -> tuple[float, float]:
    """A KL is second order in the logits' difference: where it is small, their rounding counts."""
    return c.tolerance, c.tolerance / 10


NONE = {"location": "", "kind": "none", "rank": None, "fit": "", "layers": "all"}
ORACLE = {**NONE, "location": "post_block", "kind": "oracle"}


@functools.cache
def every_candidate(family: str, dtype: torch.dtype) -> list[tuple[dict, dict]]:
    """Every candidate that the run compared, with its divergences by the textbook."""
    c = case(family, dtype)
    found = [(NONE, c.book.divergences(c.prompts, N_NEW, ENDS))]
    found.append((ORACLE, c.book.divergences(c.prompts, N_NEW, ENDS, oracle=True)))
    names = list(NONE)
    for candidate in c.run.steerability.frame[names].to_dict("records")[2:]:
        maps = textbook_maps(family, dtype, *(candidate[n] for n in ("location", "rank", "fit")))
        if candidate["layers"] != "all":
            maps = {candidate["layers"]: maps[candidate["layers"]]}
        nats = c.book.divergences(c.prompts, N_NEW, ENDS, candidate["location"], maps)
        found.append((candidate, nats))
    return found


@functools.cache
def textbook_maps(family: str, dtype: torch.dtype, location: str, rank: int | str, fit: str):
    return case(family, dtype).book.maps(location, rank, fit)


def of_candidate(frame: pd.DataFrame, candidate: dict[str, Any]) -> pd.DataFrame:
    same = pd.Series(True, frame.index)
    for name, value in candidate.items():
        same &= frame[name].isna() if value is None else frame[name] == value
    return frame[same]


def n_numbers(candidate: dict[str, Any]) -> int:
    d, rank = tiny.D_MODEL, candidate["rank"]
    n_blocks = tiny.N_LAYERS if candidate["layers"] == "all" else 1
    if candidate["kind"] not in ("vector", "linear"):
        return 0
    return n_blocks * (d * d + d if rank == "full" else 2 * rank * d + d)

"""Every table of a diagnosis equals the textbook's, on tiny models of several families."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.support import textbook, tiny
from tests.support.textbook import Textbook
from toolkit import InputError, ModelPair, Options, Run, diagnose
from toolkit.diagnosis.reach_rows import SCALES
from toolkit.documents.tokens import encode_all
from toolkit.tables.spec import specs

N_NEW = 6
ENDS = {tiny.EOS, *range(20, 26)}  # many, so that some prompts end early
FEW = [{"text": "w5 w6 w7 w8"}, {"text": "w30 w11 w9"}, {"text": "w40 w21 w16 w5"}]
WITH_A_TAIL = ("llama", "gemma3", "gpt2", "phi3")
INSIDE = ("shared_reach", "forced_reach", "normalisation", "inner_pair", "first_order_scale")
INSIDE += ("mlp_fit", "weights")
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


@functools.cache
def few(family: str, dtype: torch.dtype) -> Run:
    """A diagnosis that looks at every counted token of few documents by itself."""
    pair = tiny.make_pair(family, dtype, tiny.make_tokenizer())
    options = Options(new_tokens=2, sample=100, shared_sample=8)
    return diagnose(pair, FEW, options, show_progress=False)


@functools.cache
def book_of_few(family: str) -> Textbook:
    """In float64, whatever the diagnosis ran in."""
    pair = tiny.make_pair(family, torch.float64, tiny.make_tokenizer())
    documents = encode_all(FEW, pair.tokenizer)
    return Textbook(pair.base, pair.tuned, [(e.ids, e.held_out) for e in documents])


@pytest.mark.parametrize("family", FAMILIES)
def test_reachability(family):
    """Budgeted residuals by damped least squares, on every counted token of few documents.

    A budget that suffices leaves a residual of rounding, 1e-16 or 1e-15: a residual's scale is 1.
    """
    frame = few(family, torch.float64).reachability.frame
    keys = ["layer", "target", "budget"]
    assert_tables_equal(frame, book_of_few(family).reachability(), keys, 1e-6, 1e-9)


@pytest.mark.parametrize("family", WITH_A_TAIL)
def test_reachability_in_float32_is_that_in_float64(family):
    """A float32 pair's residuals are within 10⁻³ of the float64 textbook at every budget."""
    frame = few(family, torch.float32).reachability.frame
    rows = pd.DataFrame(book_of_few(family).reachability())
    keys = ["layer", "target", "budget"]
    shown = [*keys, "residual_q25", "residual_median", "residual_q75", "n_tokens"]
    assert_tables_equal(frame[shown], rows[shown], keys, 0, 1e-3)
    norms = [*keys, "min_norm_median"]  # a step along directions that float32 hardly holds
    assert_tables_equal(frame[norms], rows[norms], keys, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", WITH_A_TAIL)
def test_forced_reach(family, dtype):
    """Every location and head, by dense Jacobians of the real modules and their singular values.

    Most families' norms compute in float32 even in a float64 model.
    """
    frame = few(family, dtype).forced_reach.frame
    assert set(frame.location) == {"pre_mlp", "heads", "post_mlp", "post_block"}
    keys = ["layer", "location", "head", "target", "budget"]
    tolerance = 1e-4 if dtype == torch.float64 else 1e-3
    rows = pd.DataFrame(book_of_few(family).forced_reach())
    shown = [name for name in rows if name != "nonlinear_residual_median"]
    assert_tables_equal(frame[shown], rows[shown], keys, 0, tolerance)
    # A budget that suffices is spent along directions that the map annihilates: any step will do.
    rows = rows[rows.budget < 0.3]
    assert {"pre_mlp", "heads", "post_mlp", "post_block"} == set(rows.location)
    shown = [*keys, "nonlinear_residual_median"]
    frame = frame[shown].merge(rows[keys], on=keys)
    assert_tables_equal(frame, rows[shown], keys, 5 * tolerance, 5 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", [*WITH_A_TAIL, "olmo2"])
def test_normalisation(family, dtype):
    """Medians of gains that dense Jacobians of the norms have; 1 where there is no norm."""
    rows = list(book_of_few(family).normalisation())
    frame = few(family, dtype).normalisation.frame
    assert_tables_equal(frame, rows, ["layer"], 1e-4, 1e-5)
    if family == "olmo2":
        assert set(frame.norm_gain) == set(frame.radial_gain) == {1.0}
    assert (frame.post_gain == 1).all() == (family in ("llama", "phi3", "gpt2"))


@each_case
def test_inner_pair(family, dtype):
    """Least squares on [W_g; W_u] token by token, and reduced-rank regression of its answer."""
    c = case(family, dtype)
    tolerance = {"rtol": c.tolerance, "atol": c.tolerance}
    assert_tables_equal(c.run.inner_pair.frame, c.book.inner_pair(), ["layer", "rank"], **tolerance)


@each_case
def test_first_order_scale(family, dtype):
    """First order of the blocks whose parameters lie so far along the line from base to tuned."""
    c = case(family, dtype)
    rows = c.book.first_order_scale(SCALES)
    tolerance = {"rtol": c.tolerance, "atol": c.tolerance}
    assert_tables_equal(c.run.first_order_scale.frame, rows, ["layer", "scale"], **tolerance)


@each_case
def test_mlp_fit(family, dtype):
    """What the best ReFT at the MLP's output does of ΔW_d m, and how linear the MLP is."""
    c = case(family, dtype)
    keys = ["layer", "source", "target", "rank"]
    assert_tables_equal(c.run.mlp_fit.frame, c.book.mlp_fit(), keys, 0, 2 * c.tolerance)


@each_case
def test_weights(family, dtype):
    """Singular values of every matrix's change, and what of it lies outside the matrix's columns.

    In float64 here: in float32 the change is a difference of rounded numbers.
    """
    c = case(family, dtype)
    frame = c.run.weights.frame.drop(columns="rank")
    rows = pd.DataFrame(c.book.weights()).drop(columns="rank")
    assert_tables_equal(frame, rows, ["layer", "module"], c.tolerance, c.tolerance)
    assert (c.run.weights.frame["rank"] == frame[["rows", "columns"]].min(axis=1)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_reach_after_the_mlp_is_the_linear_fit(family):
    """Whatever is added arrives: the table repeats `linear_fit`'s shares at its own ranks."""
    c = case(family, torch.float64)
    keys = ["layer", "location", "target", "rank"]
    theirs = c.run.linear_fit.frame.query("mode == 'forced' and target == 'block'")
    theirs = theirs[theirs["rank"].isin([0, 1, 8, "full"])].drop(columns="mode")
    theirs = theirs.rename(columns={"source": "location"}).query("location != 'pre_mlp'")
    ours = c.run.shared_reach.frame.query("location in ('post_mlp', 'post_block')")
    shown = [*keys, "explained_fit", "explained_heldout"]
    assert_tables_equal(ours[shown], theirs[shown], keys, 0)
    assert (ours.nonlinear_heldout == ours.explained_heldout).all()


@each_case
def test_shared_reach_before_the_mlp(family, dtype):
    """Rows of every layer, target and rank; no map explains more than a vector for every token.

    On the tokens that it was fitted on, more ranks explain as much or more (up to where the fits
    are stopped), and something where there is something.
    """
    c = case(family, dtype)
    frame = c.run.shared_reach.frame.query("location in ('mlp_in', 'pre_mlp')")
    aims = [("mlp_in", "down"), ("mlp_in", "exact")]
    aims += [("pre_mlp", "block")] if family in WITH_A_TAIL or family == "qwen3" else []
    expected = {(layer, *aim) for layer in range(tiny.N_LAYERS) for aim in aims}
    groups = dict(list(frame.groupby(["layer", "location", "target"])))
    assert groups.keys() == expected
    for group in groups.values():
        assert group["rank"].tolist() == [0, 1, 8, "full"]
        shares = group.explained_fit.to_numpy()
        assert (np.diff(shares) > -0.02).all()
        assert 0 < shares[-1] <= 1
        assert (group.explained_heldout <= 1).all()
        assert np.isfinite(group.drop(columns=["location", "target", "rank"]).to_numpy(float)).all()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_insides_tables_are_complete(family):
    """Every block in every table, with finite numbers; only rows that have no head lack one."""
    run = case(family, torch.float32).run
    for name in INSIDE:
        frame = getattr(run, name).frame
        assert sorted(set(frame.layer)) == list(range(tiny.N_LAYERS)), name
        assert list(frame) == list(specs()[name].columns)
        numbers = frame.select_dtypes("number").drop(columns="head", errors="ignore")
        if name == "shared_reach":  # after the MLP only what the linear fits say
            numbers = numbers[frame.location.isin(["mlp_in", "pre_mlp"])]
        assert np.isfinite(numbers.to_numpy(float)).all(), name
    heads = run.forced_reach.frame
    assert (heads["head"].notna() == (heads.location == "heads")).all()
    assert set(heads["head"].dropna()) == set(range(4))


def test_no_shared_sample_leaves_the_shared_tables_empty(llama_pair):
    """What is fitted before the MLP is gone; single tokens and the moments' tables are the same."""
    documents = tiny.make_documents(24)
    runs = [
        diagnose(llama_pair, documents, Options(new_tokens=2, shared_sample=n), show_progress=False)
        for n in (0, 64)
    ]
    without, with_one = runs
    assert without.inner_pair.frame.empty
    assert without.first_order_scale.frame.empty
    assert set(without.shared_reach.frame.location) <= {"post_mlp", "post_block"}
    assert len(with_one.shared_reach.frame) > len(without.shared_reach.frame)
    for name in ("reachability", "forced_reach", "normalisation", "mlp_fit", "weights"):
        frames = [getattr(run, name).frame for run in runs]
        pd.testing.assert_frame_equal(*frames)
        assert len(frames[0])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_half_precision_goes_through(family, tokenizer):
    """bfloat16 pairs get every table, near those of float32 and finite."""
    pairs = [tiny.make_pair(family, dtype, tokenizer) for dtype in (torch.bfloat16, torch.float32)]
    runs = [diagnose(pair, FEW, Options(new_tokens=2), show_progress=False) for pair in pairs]
    for name in (*INSIDE, "reachability"):
        ours, theirs = (getattr(run, name).frame for run in runs)
        assert len(ours) == len(theirs)
        assert (
            ours.select_dtypes("number").notna()
            == theirs[list(ours.select_dtypes("number"))].notna()
        ).all(axis=None)
    shares = [run.forced_reach.frame.query("location == 'post_mlp'").explained for run in runs]
    np.testing.assert_allclose(*shares, atol=0.05)


def test_a_parallel_block_has_no_path_through_the_mlp_and_says_why(tokenizer):
    """NeoX: no forced reach, no shared map at pre_mlp; the reason is among the checks."""
    run = case("neox", torch.float64).run
    assert run.forced_reach.frame.empty
    assert run.normalisation.frame.empty
    assert "pre_mlp" not in set(run.shared_reach.frame.location)
    assert len(run.reachability.frame)
    (check,) = [check for check in run.checks if check.name == "location tail"]
    assert check.status == "not applicable"
    assert "parallel" in check.detail


def test_experts_still_have_weights(tokenizer):
    """Mixtral has no dense MLP: nothing of the inside, but every linear module's change."""
    pair = tiny.make_pair("mixtral", torch.float32, tokenizer)
    run = diagnose(pair, FEW, Options(new_tokens=2), show_progress=False)
    for name in INSIDE:
        if name not in ("weights", "shared_reach"):
            assert getattr(run, name).frame.empty
    assert {"self_attn.q_proj", "self_attn.o_proj"} <= set(run.weights.frame.module)


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
    assert run.forced_reach.frame.empty
    assert run.inner_pair.frame.empty
    deltas = run.norms.frame.query("of in ('delta_free', 'delta_forced')")
    zero = [
        deltas.drop(columns=["layer", "of"]),
        run.spectrum.frame.drop(columns=["layer", "location", "mode", "n_tokens"]),
        run.linear_fit.frame[["explained_fit", "explained_heldout"]],
        run.first_order.frame.drop(columns="layer"),
        run.first_order_scale.frame.drop(columns=["layer", "scale", "n_tokens"]),
        run.shared_reach.frame[["explained_fit", "explained_heldout", "nonlinear_heldout"]],
        run.weights.frame.drop(columns=["layer", "module", "rows", "columns"]),
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
        ).tables.values()
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


def test_a_sketch_as_wide_as_the_states_changes_nothing_but_rounding(llama_pair):
    """And its check says what it saw; a sketch too narrow for the ranks is refused."""
    options, documents = Options(new_tokens=2, sample=1), tiny.make_documents(14)
    exact, sketched = (
        diagnose(llama_pair, documents, asked, show_progress=False)
        for asked in (options, replace(options, sketch=64))
    )
    for name in ("spectrum", "linear_fit"):
        ours, theirs = (getattr(run, name).frame for run in (sketched, exact))
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-6, atol=1e-7)
    check = next(check for check in sketched.checks if check.name == "sketched moments")
    assert check.status == "passed"
    assert "100.0%" in check.detail
    with pytest.raises(InputError, match="64 dimensions or more"):
        replace(options, sketch=8)

"""A diagnosis says what does not apply, refuses what it cannot do, and depends on no batching."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from tests.support import textbook, tiny
from tests.support.diagnosed import FAMILIES, FEW, INSIDE, ORACLE, case, of_candidate
from toolkit import InputError, ModelPair, Options, diagnose


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
    """NeoX: no forced reach; what is added at pre_mlp arrives. The reason is among the checks."""
    run = case("neox", torch.float64).run
    assert run.forced_reach.frame.empty
    assert run.normalisation.frame.empty
    before = run.shared_reach.frame.query("location == 'pre_mlp'")
    assert len(before)
    assert (before.nonlinear_heldout == before.explained_heldout).all()
    assert "block" not in set(run.steerability.frame.target)
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


def test_identical_models_differ_nowhere(tokenizer):
    """All tables are zero and hold no NaN, nothing is recommended, and every check agrees.

    But for candidates that generate side by side, in batches of another size than the tuned
    model's: their divergences are rounding.
    """
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
        run.sequential_kl.frame.query("kind == 'none'")[["kl_mean", "kl_sem"]],
        run.steerability.frame[["recovered", "recovered_sem"]],
    ]
    kl = [run.sequential_kl.frame[["kl_mean", "kl_sem"]], run.steerability.frame[["kl", "kl_sem"]]]
    assert all(frame.to_numpy(float).max() < 1e-15 for frame in kl)
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

"""A pair whose answer is known: tuned = base + a rank-2 edit of one down projection."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.support import textbook, tiny
from toolkit import ModelPair
from toolkit.adapters.collection import Adapters
from toolkit.analysis.divergence import recovered
from toolkit.analysis.linear_fit import RANKS
from toolkit.blocks.mlp import MLP, Change, MLPChange
from toolkit.blocks.parts import BlockParts
from toolkit.blocks.read import mlps
from toolkit.diagnosis.block_statistics import MLP_INPUT, SUBLAYER_STATES, BlockStatistics, Samples
from toolkit.diagnosis.mlp_statistics import MLPStatistics
from toolkit.diagnosis.survey import SurveyPlan, analyse, survey
from toolkit.documents.batches import make_batches
from toolkit.documents.tokens import encode_all
from toolkit.evaluation.candidates import NONE, ORACLE, Candidate
from toolkit.evaluation.compare import evaluate
from toolkit.fitting.spec import FitSpec
from toolkit.lockstep.march import March

EDITED = 1
SEQUENTIAL = FitSpec.linear("post_mlp", 2, "sequential")
FORCED = FitSpec.linear("post_block", 8, "forced")


def edited_pair(tokenizer, family="llama", linear=True, edited=EDITED):
    """ΔW_d = M W_d, so that Δ = M y is linear in y; or any rank-2 ΔW_d, where it is not."""
    base = tiny.make_model(family)
    tuned = tiny.copy_of(base)
    down = tiny.blocks_of(tuned)[edited].mlp.down_proj.weight
    generator = torch.Generator().manual_seed(3)
    n_in = tiny.D_MODEL if linear else tiny.D_FF
    left = torch.randn(tiny.D_MODEL, 2, generator=generator, dtype=down.dtype)
    right = torch.randn(2, n_in, generator=generator, dtype=down.dtype)
    down += 0.1 * left @ right @ down if linear else 0.1 * left @ right
    return ModelPair.from_models(base, tuned, tokenizer)


def make_march(pair, recipes=(), batch_tokens=300, **more):
    encoded = encode_all(tiny.make_documents(30), pair.tokenizer)
    batches = make_batches(encoded, batch_tokens=batch_tokens)
    steered = {recipe.name: recipe.location for recipe in recipes if recipe.fit == "sequential"}
    blocks = pair.base_runner, pair.tuned_runner
    return March(*blocks, batches, pair.branches, (MLP_INPUT,), steered=steered, **more)


def marched(pair, recipes, march=None):
    march = march or make_march(pair, recipes)
    plan = SurveyPlan(pair.branches, recipes, (2, 0))
    return survey(march, plan, parts_reader(pair), pair)


def parts_reader(pair):
    return [BlockParts(*parts) for parts in mlps(pair.base, pair.tuned)]


def deltas(pair, mode):
    """The delta of every counted token by (layer, location), `[n, d]`."""
    march, found = make_march(pair), {}
    for layer in march.layers():
        for step in march.steps(layer):
            for location in pair.branches:
                found.setdefault((layer, location), []).append(step.delta(mode, location))
        march.advance(layer, {})
    return {key: torch.cat(parts).numpy() for key, parts in found.items()}


def spectrum_of(delta):
    return np.linalg.svd(delta, compute_uv=False) ** 2


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rank_two_edit_gives_rank_two_delta_there_and_full_rank_after(tokenizer, family, linear):
    """Upstream deltas are bitwise zero; the next one has rank 2; one block later, full rank."""
    pair = edited_pair(tokenizer, family, linear)
    for mode in ("free", "forced"):
        for (layer, location), delta in deltas(pair, mode).items():
            if layer < EDITED or (layer, location) == (EDITED, "pre_mlp"):
                assert not delta.any()
            elif layer == EDITED:
                eigenvalues = spectrum_of(delta)
                assert eigenvalues[1] > 1e-4 * eigenvalues[0]
                assert eigenvalues[2] < 1e-12 * eigenvalues[0]
            elif mode == "free":
                assert spectrum_of(delta)[-1] > 1e-10 * spectrum_of(delta)[0]
            else:  # the edited block is the only one that contributes
                assert not delta.any()


def test_rank_two_edit_is_all_down(tokenizer):
    """The first-order term of W_d is the whole change at that block; elsewhere nothing changed."""
    for block in marched(edited_pair(tokenizer, linear=False), [FORCED]):
        (row,) = block.rows["first_order"]
        expected = float(block.layer == EDITED)
        assert row["down"] == pytest.approx(expected, abs=1e-10)
        assert row["gate"] == row["up"] == 0
        assert row["remainder"] < 1e-20


def test_a_linear_edit_is_recovered_at_its_rank_and_no_other(tokenizer):
    """Rank 2 at post_mlp of the edited block reproduces Δ = M y, and only part of ΔW_d m.

    The last block is edited: of an earlier one, later blocks attend to the first position, which
    is changed by tuning and never steered.
    """
    shares, last = {}, tiny.N_LAYERS - 1
    for linear in (True, False):
        pair = edited_pair(tokenizer, linear=linear, edited=last)
        adapters = {b.layer: b.adapters[SEQUENTIAL] for b in marched(pair, [SEQUENTIAL])}
        everywhere = Adapters("post_mlp", adapters, "sequential")
        candidates = [Candidate.of(everywhere, last), Candidate.of(everywhere)]
        prompts = [e.prompt_ids for e in encode_all(tiny.make_documents(30), tokenizer)][:8]
        evaluation = evaluate(pair, prompts, candidates, n_new=4)
        base = evaluation.divergences[NONE, "tuned"]
        for candidate in candidates:
            share = recovered(evaluation.divergences[candidate, "tuned"], base)[0]
            shares[linear, candidate.layers] = share
        assert recovered(evaluation.divergences[ORACLE, "tuned"], base)[0] == pytest.approx(1)
    assert shares[True, last] > 0.999
    assert shares[True, "all"] > 0.999
    assert 0 < shares[False, last] < 0.99


def test_explained_grows_to_one_with_rank_where_the_edit_is_linear(tokenizer):
    """explained is monotone in rank on the fit set, and 1 from rank 2 on up to the ridge."""
    rows = [b.rows["linear_fit"] for b in marched(edited_pair(tokenizer), [])][EDITED]
    for mode in ("free", "forced"):
        shares = {
            row["rank"]: row["explained_fit"]
            for row in rows
            if (row["source"], row["target"], row["mode"]) == ("post_mlp", "own", mode)
        }
        ordered = [shares[rank] for rank in RANKS if rank in shares]
        assert all(b >= a - 1e-12 for a, b in pairwise(ordered))
        assert shares[1] < 0.99 < 0.9999 < shares[2]


def test_an_interrupted_march_goes_on_to_identical_rows(llama_pair, tmp_path):
    """Two blocks, the third begun, and a new march in the same folder: the rows are the same."""
    recipes = [
        FitSpec.linear(location, 2, "sequential")
        for location in ("pre_mlp", "post_mlp", "post_block")
    ]
    whole = list(marched(llama_pair, [*recipes, FORCED]))
    march = make_march(llama_pair, recipes, folder=tmp_path)
    interrupted = marched(llama_pair, [*recipes, FORCED], march)
    first = [next(interrupted), next(interrupted)]
    next(march.steps(2))  # writes what leaves a batch, and no more
    again = make_march(llama_pair, recipes, folder=tmp_path, start=2)
    last = list(marched(llama_pair, [*recipes, FORCED], again))
    assert [b.rows for b in (*first, *last)] == [b.rows for b in whole]
    for ours, theirs in zip((*first, *last), whole, strict=True):
        for recipe in recipes:
            pairs = ours.adapters[recipe].state_dict(), theirs.adapters[recipe].state_dict()
            assert all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[0])


def test_statistics_survive_being_written_down(llama_pair):
    """A block's sums, rebuilt from their state, give the same rows."""
    kept = {}
    march = make_march(llama_pair)
    keep = lambda layer, sums: kept.update({layer: sums})  # noqa: E731
    plan = SurveyPlan(llama_pair.branches, [], (2, 0))
    found = list(survey(march, plan, parts_reader(llama_pair), llama_pair, keep=keep))
    for block in found:
        rebuilt = BlockStatistics.from_state(llama_pair.branches, kept[block.layer].state())
        assert analyse(block.layer, rebuilt).rows.items() <= block.rows.items()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_samples_are_states_of_the_streams_they_are_named_after(tokenizer, family):
    """h is the base's own; all else is the base block's on the *tuned* stream, by plain hooks."""
    pair = tiny.make_pair(family, torch.float64, tokenizer)
    encoded = encode_all(tiny.make_documents(8), tokenizer)
    book = textbook.Textbook(pair.base, pair.tuned, [(e.ids, e.held_out) for e in encoded])
    blocks = pair.base_runner, pair.tuned_runner
    batches = make_batches(encoded, batch_tokens=60)
    march = March(*blocks, batches, pair.branches, (MLP_INPUT,), forced_extra=SUBLAYER_STATES)
    for layer in march.layers():
        samples = Samples(10_000, 10_000)
        for step in march.steps(layer):
            samples.update(step)
        march.advance(layer, {})
        for sample, side in zip(samples.result(), (None, False, True), strict=True):
            forced = {
                name: book.states("forced", name, layer, side)
                for name in ("post_block", "post_mlp", "pre_mlp", "heads")
            }
            expected = {
                "h": book.states("base", "mlp_in", layer, side),
                "stream": forced["post_block"] - forced["post_mlp"],
                "attended": forced["pre_mlp"],
                "heads": forced["heads"],
                "forced_delta": book.delta("forced", "post_block", layer, side),
            }
            assert len(sample) == len(expected["h"])
            order = sample.h.numpy() @ np.arange(1, tiny.D_MODEL + 1)
            theirs = expected["h"] @ np.arange(1, tiny.D_MODEL + 1)
            for name, value in expected.items():  # each token's vectors stay together
                ours = getattr(sample, name).numpy()[order.argsort()]
                np.testing.assert_allclose(ours, value[theirs.argsort()], atol=1e-9, err_msg=name)


def test_samples_are_so_many_tokens_and_half_as_many_to_judge(llama_pair):
    """The same tokens in every block: by keys, which belong to the tokens."""
    march = make_march(llama_pair)
    for layer in march.layers():
        samples, keys, states = Samples(5, 20), [], []
        for step in march.steps(layer):
            samples.update(step)
            keys.append(step.batch.keys)
            states.append(step.base["mlp_in"])
        march.advance(layer, {})
        assert [len(sample) for sample in samples.result()] == [5, 20, 10]
        assert samples.result()[0].stream is None  # nobody asked for the tail's states
        smallest = torch.cat(keys).argsort()[:5]
        assert torch.equal(samples.result()[0].h, torch.cat(states)[smallest])


def test_a_linear_mlp_is_known_from_its_input(llama_pair):
    """σ the identity and no gate: ``mlp_in → mlp_out`` is 1, and ``down`` is a map of y."""
    (mlp, _), *_ = mlps(llama_pair.base, llama_pair.tuned)
    square = mlp.gate[: tiny.D_MODEL]
    zero = torch.zeros(tiny.D_MODEL, dtype=torch.float64)
    linear = MLP(lambda x: x * 1.0, square, zero, mlp.down[:, : tiny.D_MODEL], zero)
    dW = torch.outer(linear.down[:, 0], linear.down[0])
    nothing = Change((torch.zeros_like(square),), zero)
    sums = MLPStatistics(BlockParts(linear, MLPChange(nothing, Change((dW,), zero))))
    march = make_march(llama_pair)
    for step in march.steps(0):
        sums.update(step)
    rows = sums.rows()
    (first,) = rows["first_order"]
    assert (first["down"], first["gate"], first["up"]) == pytest.approx((1, 0, 0))
    whole = {(row["source"], row["rank"]): row for row in rows["mlp_fit"]}
    assert list(whole) == [("mlp_out", r) for r in (0, 1, 8, "full")] + [("mlp_in", "full")]
    for key in (("mlp_in", "full"), ("mlp_out", "full"), ("mlp_out", 1)):
        assert whole[key]["explained_heldout"] > 0.99
        assert whole[key]["explained_fit"] > 0.99
    assert whole["mlp_out", 0]["explained_fit"] < 0.5


def test_what_a_constant_gives_is_no_credit(llama_pair):
    """An MLP whose output is mostly a bias and else random in h: R² about the mean is low."""
    (mlp, change), *_ = mlps(llama_pair.base, llama_pair.tuned)
    wild = dataclasses.replace(
        mlp, activation=lambda x: torch.sin(1e3 * x), down_bias=mlp.down_bias + 100
    )
    sums = MLPStatistics(BlockParts(wild, change))
    march = make_march(llama_pair)
    for step in march.steps(0):
        sums.update(step)
    (row,) = [row for row in sums.rows()["mlp_fit"] if row["source"] == "mlp_in"]
    assert -0.5 < row["explained_heldout"] < 0.2
    assert 0 < row["explained_fit"] < 0.5

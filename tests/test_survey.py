"""A pair whose answer is known: tuned = base + a rank-2 edit of one down projection."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests import tiny
from toolkit import ModelPair
from toolkit.analysis.linear_fit import RANKS
from toolkit.analysis.sequential_kl import recovered
from toolkit.documents import encode_all, make_batches
from toolkit.lockstep import March
from toolkit.mlp import mlps
from toolkit.replacement import NONE, ORACLE, Candidate, evaluate
from toolkit.steering import Adapters
from toolkit.survey import MLP_INPUT, BlockSums, Recipe, analyse, survey

EDITED = 1
SEQUENTIAL = Recipe("post_mlp", 2, "sequential")
FORCED = Recipe("post_block", 8, "forced")


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


def make_march(pair, recipes=(), batch_tokens=300):
    encoded = encode_all(tiny.make_documents(30), pair.tokenizer)
    batches = make_batches(encoded, batch_tokens=batch_tokens)
    steered = {recipe.name: recipe.location for recipe in recipes if recipe.fit == "sequential"}
    blocks = pair.base_blocks, pair.tuned_blocks
    return March(*blocks, batches, pair.branches, (MLP_INPUT,), steered)


def marched(pair, recipes, march=None):
    march = march or make_march(pair, recipes)
    matrices = mlps(pair.base, pair.tuned)
    return survey(march, pair.branches, recipes, matrices, 2, pair.dtype)


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


def test_an_interrupted_march_goes_on_to_identical_rows(llama_pair):
    """Two blocks, the streams' state, and a new march: the third block's rows are the same."""
    recipes = [
        Recipe(location, 2, "sequential") for location in ("pre_mlp", "post_mlp", "post_block")
    ]
    whole = list(marched(llama_pair, [*recipes, FORCED]))
    march = make_march(llama_pair, recipes)
    interrupted = marched(llama_pair, [*recipes, FORCED], march)
    first = [next(interrupted), next(interrupted)]
    state = {name: tensor.clone() for name, tensor in march.state().items()}
    again = make_march(llama_pair, recipes)
    again.restore(2, state)
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
    matrices = mlps(llama_pair.base, llama_pair.tuned)
    keep = lambda layer, sums: kept.update({layer: sums})  # noqa: E731
    found = list(survey(march, llama_pair.branches, [], matrices, 2, torch.float64, keep=keep))
    for block in found:
        rebuilt = BlockSums.from_state(llama_pair.branches, kept[block.layer].state())
        assert analyse(block.layer, rebuilt).rows.items() <= block.rows.items()

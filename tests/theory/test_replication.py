"""Post-block steers that replicate post-MLP ones: exactly where they can, measured where not."""

import functools

import numpy as np
import pytest
import torch

from tests.support import textbook, tiny
from toolkit import InputError, ModelPair
from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.adapters.linear import Linear
from toolkit.adapters.vector import FixedVector
from toolkit.analysis.projection import AffineMap, energy_subspace, oblique_projection, overlap
from toolkit.documents.batches import make_batches
from toolkit.documents.tokens import encode_all
from toolkit.fitting.closed_form import fit_adapters
from toolkit.fitting.spec import FitSpec
from toolkit.models.locations import resolve
from toolkit.models.runner import BlockRunner
from toolkit.theory.replication import (
    MLP,
    OUT,
    SKIP,
    behind_block,
    best_guess,
    block_moments,
    matrix_of,
    measure,
    replicate,
)

D, LAYERS = tiny.D_MODEL, range(tiny.N_LAYERS)
# Embeddings and attention write into the first 7 of 16 dimensions, each MLP into 3 of its own.
FREE, EACH = 7, 3
DOCUMENTS = tiny.make_documents(60)
RANK = 2


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def batches_of(documents=DOCUMENTS):
    return make_batches(encode_all(documents, tiny.make_tokenizer()), batch_tokens=200)


# --- the constructed case


def constructed():
    """A model whose skip terms and MLP outputs share no dimension, in any block."""
    model = tiny.make_model("llama")
    model.get_input_embeddings().weight[:, FREE:] = 0
    for layer, block in enumerate(tiny.blocks_of(model)):
        block.self_attn.o_proj.weight[FREE:] = 0
        kept = range(FREE + EACH * layer, FREE + EACH * (layer + 1))
        block.mlp.down_proj.weight[[i for i in range(D) if i not in kept]] = 0
    return model


def adapters_behind_mlp():
    """Linear adapters that leave the dimensions of later MLPs alone."""
    by_layer = {}
    for layer in LAYERS:
        up, bias = 0.5 * draw(D, RANK), 0.5 * draw(D)
        up[FREE + EACH * (layer + 1) :] = 0
        bias[FREE + EACH * (layer + 1) :] = 0
        by_layer[layer] = Linear(up, 0.5 * draw(RANK, D), bias)
    return Adapters("post_mlp", by_layer, "trained")


def projected(model, adapters, documents=DOCUMENTS):
    """``A P`` in every block, P from the moments of the model as A steers it."""
    made = {}

    def steering(found):
        skip, mlp = (energy_subspace(found.fit.second_moment(name), 1) for name in (SKIP, MLP))
        assert (skip.shape[1], mlp.shape[1]) == (FREE + EACH * found.layer, EACH)
        projection = oblique_projection(mlp, skip)
        made[found.layer] = behind_block(adapters.by_layer[found.layer], linear_map(projection))
        return lambda y, _: adapters.by_layer[found.layer](y)

    for _ in block_moments(BlockRunner(model, resolve(model)), batches_of(documents), steering):
        pass
    return Adapters("post_block", made, "trained")


def linear_map(matrix):
    return AffineMap(matrix, torch.zeros(len(matrix), dtype=torch.float64))


@torch.no_grad()
def logits_of(model, adapters):
    ids = torch.randint(5, tiny.N_VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(0))
    with steer(model, adapters):
        return model(ids).logits


def gap(model, ours, theirs):
    return float((logits_of(model, ours) - logits_of(model, theirs)).abs().max())


def test_where_the_subspaces_meet_trivially_the_post_block_steer_is_the_post_mlp_steer():
    """In three blocks, with P from data: the same logits, and no more rank."""
    model, adapters = constructed(), adapters_behind_mlp()
    made = projected(model, adapters)
    assert gap(model, made, adapters) < 1e-10
    unsteered = Adapters("post_mlp", {0: FixedVector(torch.zeros(D))}, "trained")
    assert gap(model, unsteered, adapters) > 0.1
    for adapter in made.by_layer.values():
        assert torch.linalg.matrix_rank(matrix_of(adapter)) <= RANK
        assert adapter.rank == RANK


def test_leaning_subspaces_are_no_hindrance():
    """An MLP that writes into the skip term's dimensions too, but in no direction of theirs."""
    model, adapters = constructed(), adapters_behind_mlp()
    weight = tiny.blocks_of(model)[-1].mlp.down_proj.weight
    weight[:EACH] = 0.7 * weight[-EACH:]
    made = projected(model, adapters)
    assert gap(model, made, adapters) < 1e-10
    straight = torch.zeros(D, D, dtype=torch.float64)
    straight[-EACH:, -EACH:] = torch.eye(EACH)  # orthogonal, where the subspaces are not
    last = behind_block(adapters.by_layer[LAYERS[-1]], linear_map(straight))
    naive = Adapters("post_block", {**made.by_layer, LAYERS[-1]: last}, "trained")
    assert gap(model, naive, adapters) > 1e-3


def test_an_added_overlap_breaks_it_and_the_error_grows_with_the_overlap():
    """W_d gets a direction of the skip term: P is refused, and the old P is wrong in proportion."""
    adapters = adapters_behind_mlp()
    old = projected(constructed(), adapters)
    direction = draw(tiny.D_FF)
    errors = []
    for size in (0.0, 1e-4, 2e-4, 4e-4):
        model = constructed()
        tiny.blocks_of(model)[-1].mlp.down_proj.weight[0] = size * direction
        errors.append(gap(model, old, adapters))
        if size:
            with pytest.raises(AssertionError):  # the MLP writes more dimensions than before
                projected(model, adapters)
            found = list(block_moments(BlockRunner(model, resolve(model)), batches_of()))[-1].fit
            skip, mlp = (energy_subspace(found.second_moment(name), 1) for name in (SKIP, MLP))
            assert overlap(skip, mlp).meet
            with pytest.raises(ValueError, match="share a direction"):
                oblique_projection(mlp, skip)
    assert errors[0] < 1e-10
    assert errors[1] > 1e-6
    np.testing.assert_allclose(np.divide(errors[2:], errors[1:3]), 2, rtol=0.02)


@pytest.mark.parametrize("stream", ["base", "steered", "own"])
def test_the_best_affine_guess_is_exact_where_a_projection_is(stream):
    """Fitted on the unsteered stream too: steering stays in what that stream spans."""
    model, adapters = constructed(), adapters_behind_mlp()
    pair = ModelPair.from_models(model, tiny.tune(model), tiny.make_tokenizer())
    made = replicate(pair, DOCUMENTS, adapters, stream, relative_ridge=1e-13)
    assert min(made.info["r2"].values()) > 1 - 1e-9
    assert gap(model, made, adapters) < 1e-4
    assert made.info["stream"] == stream


def test_blocks_without_an_adapter_stay_without():
    model, adapters = constructed(), adapters_behind_mlp()
    last = Adapters("post_mlp", {LAYERS[-1]: adapters.by_layer[LAYERS[-1]]}, "trained")
    pair = ModelPair.from_models(model, tiny.tune(model), tiny.make_tokenizer())
    made = replicate(pair, DOCUMENTS, last, relative_ridge=1e-13)
    assert list(made.by_layer) == [LAYERS[-1]]
    assert gap(model, made, last) < 1e-4


# --- any model, against the textbook


@functools.cache
def pair_and_adapters():
    pair = tiny.make_pair("llama", torch.float64, tiny.make_tokenizer())
    plan = FitSpec("post_mlp", "linear", RANK, "sequential")
    return pair, fit_adapters(pair, DOCUMENTS, [plan])[plan]


def slow_states(pair, location, maps, layer, held_out):
    """Skip term and MLP output of block `layer`, unsteered there, while `maps` steer before it."""
    skips, outputs = [], []
    for document in encode_all(DOCUMENTS, pair.tokenizer):
        if document.held_out == held_out:
            seen = textbook.run(pair.base, document.ids, location=location, maps=maps).states
            skips.append((seen["post_block", layer] - seen["post_mlp", layer])[1:])
            outputs.append(seen["post_mlp", layer][1:])
    return np.vstack(skips), np.vstack(outputs)


def slow_replicas(pair, adapters, stream):
    """``A P* h + (A c + b)`` by block, and the held-out R² of A's steer."""
    location = "post_block" if stream == "own" else "post_mlp"
    maps, made, r2 = {}, {}, {}
    for layer in LAYERS:
        s, y = slow_states(pair, location, maps, layer, False)
        P, c = textbook.fit(s + y, y, "full")
        adapter = adapters.by_layer[layer]
        A, b = matrix_of(adapter).numpy(), adapter.bias.numpy()
        made[layer] = (A @ P, A @ c + b)
        s, y = slow_states(pair, location, maps, layer, True)
        missed, varied = (y - (s + y) @ P.T - c) @ A.T, (y - y.mean(0)) @ A.T
        r2[layer] = 1 - np.sum(missed**2) / np.sum(varied**2)
        maps |= {} if stream == "base" else {layer: made[layer] if stream == "own" else (A, b)}
    return made, r2


@pytest.mark.parametrize("stream", ["base", "steered", "own"])
def test_replicas_are_the_textbooks(stream):
    pair, adapters = pair_and_adapters()
    found = replicate(pair, DOCUMENTS, adapters, stream)
    expected, r2 = slow_replicas(pair, adapters, stream)
    assert (found.location, found.rank, found.fit) == ("post_block", RANK, "sequential")
    for layer, (A, b) in expected.items():
        ours = found.by_layer[layer]
        np.testing.assert_allclose(matrix_of(ours).numpy(), A, atol=1e-8 * np.abs(A).max())
        np.testing.assert_allclose(ours.bias.numpy(), b, atol=1e-8 * np.abs(b).max())
        assert found.info["r2"][layer] == pytest.approx(r2[layer], abs=1e-8)


def test_the_table_is_the_textbooks():
    pair, _ = pair_and_adapters()
    frame = measure(pair, DOCUMENTS).frame
    assert frame.layer.tolist() == list(LAYERS)
    for layer, row in zip(LAYERS, frame.itertuples(), strict=True):
        s, y = slow_states(pair, "post_mlp", None, layer, False)
        bases = {}
        for name, states in (("skip", s), ("mlp", y)):
            values, vectors = np.linalg.eigh(states.T @ states)
            shares = np.cumsum(values[::-1]) / values.sum()
            k = int(np.argmax(shares >= 0.9)) + 1
            assert getattr(row, f"{name}_90") == k
            bases[name] = vectors[:, ::-1][:, :k]
        cosines = np.linalg.svd(bases["skip"].T @ bases["mlp"], compute_uv=False)
        angles = np.degrees(np.arccos(np.clip(cosines, -1, 1)))
        assert row.smallest_90 == pytest.approx(angles.min(), abs=1e-5)
        assert row.median_90 == pytest.approx(np.median(angles), abs=1e-5)
        P, c = textbook.fit(s + y, y, "full")
        for held_out, ours, n in (
            (False, row.r2_fit, row.n_fit),
            (True, row.r2_heldout, row.n_heldout),
        ):
            s, y = slow_states(pair, "post_mlp", None, layer, held_out)
            missed, varied = y - (s + y) @ P.T - c, y - y.mean(0)
            assert ours == pytest.approx(1 - np.sum(missed**2) / np.sum(varied**2))
            assert n == len(y)
        assert row.skip_99 + row.mlp_99 > D or row.smallest_99 > 0
        assert np.isnan(row.r2_oblique_99) == (row.skip_99 + row.mlp_99 > D)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_moments_split_the_block_output(family):
    """h = s + y, whether a norm stands behind the MLP or not."""
    model = tiny.make_model(family)
    for found in block_moments(BlockRunner(model, resolve(model)), batches_of()):
        both = found.fit.mean[SKIP] + found.fit.mean[MLP]
        assert torch.allclose(found.fit.mean[OUT], both, atol=1e-10)
        guess = best_guess(found.fit)
        assert torch.allclose(
            guess.matrix @ found.fit.mean[OUT] + guess.offset, found.fit.mean[MLP], atol=1e-10
        )


def test_a_full_rank_adapter_is_composed_too():
    guess = AffineMap(draw(D, D), draw(D))
    adapter = Linear(draw(D, D), None, draw(D))
    made, h = behind_block(adapter, guess), draw(5, D)
    assert made.rank == "full"
    assert torch.allclose(made(h), adapter(h @ guess.matrix.T + guess.offset), atol=1e-10)


# --- what has no counterpart


@pytest.mark.parametrize("location", ["post_block", "post_mlp"])
def test_only_linear_adapters_behind_the_mlp_have_a_counterpart(location):
    pair, _ = pair_and_adapters()
    linear = Linear(draw(D, D), None, None)
    adapter = linear if location == "post_block" else FixedVector(draw(D))
    adapters = Adapters(location, dict.fromkeys(LAYERS, adapter), "trained")
    with pytest.raises(InputError, match=f"adapters at {location}: linear ones at post_mlp"):
        replicate(pair, DOCUMENTS, adapters)


def test_only_adapters_of_all_tokens_have_a_counterpart():
    pair, _ = pair_and_adapters()
    adapters = Adapters.identity("linear", "post_mlp", LAYERS, D, "last_prompt", rank=RANK)
    with pytest.raises(InputError, match="these adapters steer last_prompt tokens"):
        replicate(pair, DOCUMENTS, adapters)


@pytest.mark.parametrize(("family", "location"), [("neox", "resid_mid"), ("granite", "post_mlp")])
def test_a_family_whose_output_is_no_such_sum_is_refused(family, location):
    """Parallel branches have no state between them; Granite multiplies what it adds."""
    pair = tiny.make_pair(family, torch.float64, tiny.make_tokenizer())
    with pytest.raises(InputError, match=f"this family has no '{location}': "):
        measure(pair, DOCUMENTS)

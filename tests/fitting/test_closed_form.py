"""Fits block by block against whole models run again from the first token, and least squares."""

import functools
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from tests.support import textbook, tiny
from tests.support.properties import restores
from tests.support.textbook.modules import heads_matrix
from toolkit import InputError, ModelPair
from toolkit.adapters.attach import steer
from toolkit.adapters.linear import Linear
from toolkit.adapters.loreft import LoReFT
from toolkit.adapters.nonlinear import NonLinear
from toolkit.adapters.vector import FixedVector
from toolkit.diagnosis.survey import SurveyPlan, survey
from toolkit.documents.batches import make_batches
from toolkit.documents.tokens import encode_all
from toolkit.evaluation.allocation import allocated
from toolkit.fitting.closed_form import fit_adapters
from toolkit.fitting.regression import HELD_BACK, Tokens, match
from toolkit.fitting.spec import FitSpec
from toolkit.lockstep.march import March

LOCATIONS = ("heads", "pre_mlp", "post_mlp", "post_block")
DOCUMENTS = tiny.make_documents(24)
LAYERS = range(tiny.N_LAYERS)
# Gemma's norms compute in float32 whatever the weights.
DIGITS = {"llama": 1e-9, "gemma3": 2e-4}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


@functools.cache
def book_of(family):
    pair = tiny.make_pair(family, torch.float64, tiny.make_tokenizer())
    documents = [(e.ids, e.held_out) for e in encode_all(DOCUMENTS, pair.tokenizer)]
    return pair, textbook.Textbook(pair.base, pair.tuned, documents)


def run_steered(model, ids, location, maps):
    """The textbook's pass, with maps on the heads' outputs too."""
    if location != "heads":
        return textbook.run(model, ids, location=location, maps=maps)

    def hook_of(A, b):
        def hook(_module, args):
            (z,) = args
            z = z.clone()
            z[:, 1:] = z[:, 1:] + z[:, 1:] @ torch.from_numpy(A).T + torch.from_numpy(b)
            return (z,)

        return hook

    with ExitStack() as stack:
        for layer, map_ in maps.items():
            projection = textbook.attention_projection(tiny.blocks_of(model)[layer])
            handle = projection.register_forward_pre_hook(hook_of(*map_))
            stack.callback(handle.remove)
        return textbook.run(model, ids)


def slow_maps(book, location, ranks, fit, blend=1.0):
    """What each block is to supply, gathered by whole passes, and its least squares fit."""
    target = book.arrives_at(location)
    maps = {}
    for layer in LAYERS:
        X = book.states("forced", location, layer, False)
        T = own = book.delta("forced", target, layer, False)
        if fit != "forced":
            steered = book.of["base"]
            if maps:
                steered = [run_steered(book.base, ids, location, maps) for ids, _ in book.documents]
            X = book.rows(steered, location, layer, False)
            reached = book.rows(steered, target, layer, False)
            missing = book.states("tuned", target, layer, False) - reached
            T = missing if fit == "sequential" else own + blend * (missing - own)
        maps[layer] = fitted(book, location, layer, X, T, ranks[layer])
    return maps


def fitted(book, location, layer, X, T, rank):
    """Least squares; at the heads through the output projection, within what it can add."""
    if location != "heads":
        return textbook.fit(X, T, rank)
    matrix, factor = heads_matrix(tiny.blocks_of(book.base)[layer], X)
    inverse = np.linalg.pinv(matrix, rcond=1e-4)
    A, b = textbook.fit(X, (factor * T) @ (matrix @ inverse).T, rank)
    return inverse @ A, inverse @ b


def matrices(adapter):
    """``A`` and ``b`` of a vector or a linear adapter, from the states 0 and e_i."""
    width = len(adapter.bias) if isinstance(adapter, FixedVector) else len(adapter.up)
    with torch.no_grad():
        b = adapter(torch.zeros(1, width, dtype=torch.float64))
        A = adapter(torch.eye(width, dtype=torch.float64)) - b
    return A.T.numpy(), b[0].numpy()


def assert_maps(adapters, expected, digits):
    assert sorted(adapters.by_layer) == sorted(expected)
    for layer, (A, b) in expected.items():
        ours = matrices(adapters.by_layer[layer])
        scale = max(np.abs(A).max(), np.abs(b).max())
        np.testing.assert_allclose(ours[0], A, rtol=0, atol=digits * scale)
        np.testing.assert_allclose(ours[1], b, rtol=0, atol=digits * scale)


@pytest.mark.parametrize("fit", ["forced", "sequential"])
@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_fits_are_the_textbooks(family, location, fit):
    """Vectors, rank 2, full rank and a rank for each block, all in one march."""
    pair, book = book_of(family)
    plans = {
        FitSpec(location, "vector", 0, fit): (0, 0, 0),
        FitSpec(location, "linear", 2, fit): (2, 2, 2),
        FitSpec(location, "linear", "full", fit): ("full",) * 3,
        FitSpec(location, "linear", (1, 5, 2), fit): (1, 5, 2),
    }
    with restores(pair.base), restores(pair.tuned):
        found = fit_adapters(pair, DOCUMENTS, list(plans), batch_tokens=100)
    assert list(found) == list(plans)
    for plan, ranks in plans.items():
        adapters = found[plan]
        assert_maps(adapters, slow_maps(book, location, ranks, fit), DIGITS[family])
        assert (adapters.location, adapters.fit) == (location, fit)
        assert tuple(a.rank for a in adapters.by_layer.values()) == ranks
        assert adapters.kind == plan.kind


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("location", LOCATIONS)
def test_blended_is_between_the_blocks_own_and_all_that_is_missing(location, blend):
    pair, book = book_of("llama")
    plans = [FitSpec(location, "linear", 2, fit, blend) for fit in ("blended", "sequential")]
    found = fit_adapters(pair, DOCUMENTS, plans)
    assert_maps(found[plans[0]], slow_maps(book, location, (2, 2, 2), "blended", blend), 1e-9)
    sequential = {k: matrices(a) for k, a in found[plans[1]].by_layer.items()}
    if blend == 1:
        assert_maps(found[plans[0]], sequential, 1e-9)
    else:
        with pytest.raises(AssertionError):
            assert_maps(found[plans[0]], sequential, 1e-3)


@pytest.mark.parametrize("positions", ["response", "last"])
def test_positions_say_which_tokens_are_fitted(positions):
    """A vector in block 0, forced, is the mean delta over them."""
    pair, book = book_of("llama")
    plan = FitSpec("post_mlp", "vector", 0, "forced")
    found = fit_adapters(pair, DOCUMENTS, [plan], positions=positions)[plan]
    deltas = []
    for row, encoded in enumerate(encode_all(DOCUMENTS, pair.tokenizer)):
        tuned, forced = (book.of[of][row].states["post_block", 0] for of in ("tuned", "forced"))
        if not encoded.held_out:
            counted = np.array(encoded.counted(positions))
            deltas.append((tuned - forced)[counted])
    np.testing.assert_allclose(found.by_layer[0].bias, np.concatenate(deltas).mean(0), atol=1e-10)


@pytest.mark.parametrize("kind", ["vector", "linear", "loreft", "nonlinear"])
@pytest.mark.parametrize("location", LOCATIONS)
def test_a_tuned_model_that_is_the_base_needs_nothing(tokenizer, kind, location):
    base = tiny.make_model("llama")
    pair = ModelPair.from_models(base, tiny.copy_of(base), tokenizer)
    plans = [FitSpec(location, kind, 2, fit) for fit in ("forced", "sequential")]
    plain = base(IDS).logits
    for adapters in fit_adapters(pair, DOCUMENTS, plans).values():
        with steer(base, adapters):
            assert torch.allclose(base(IDS).logits, plain, atol=1e-8)


def test_sequential_fits_bring_the_model_to_the_tuned_ones_states():
    """Full rank behind the block: nearer than forced ones, which know nothing of earlier errors."""
    pair, _ = book_of("llama")
    plans = [FitSpec("post_block", "linear", "full", fit) for fit in ("forced", "sequential")]
    found = fit_adapters(pair, DOCUMENTS, plans)
    ids = [e.ids for e in encode_all(DOCUMENTS, pair.tokenizer) if not e.held_out]
    errors = []
    for adapters in (None, *found.values()):
        maps = {k: matrices(a) for k, a in adapters.by_layer.items()} if adapters else {}
        gaps = [
            textbook.run(pair.base, i, location="post_block", maps=maps).states["post_block", 2]
            - textbook.run(pair.tuned, i).states["post_block", 2]
            for i in ids
        ]
        errors.append(np.mean([np.sum(gap[1:] ** 2) for gap in gaps]))
    assert errors[2] < errors[1] < errors[0]


# --- non-linear fits


def gathered(location, layer):
    """The tokens that a forced fit of a block is made on."""
    _, book = book_of("llama")
    states = book.states("forced", location, layer, False)
    target = book.delta("forced", book.arrives_at(location), layer, False)
    if location == "heads":
        matrix, _ = heads_matrix(tiny.blocks_of(book.base)[layer], states)
        target = target @ np.linalg.pinv(matrix, rcond=1e-4).T
    return Tokens(*map(torch.from_numpy, (states, target)))


def held_back(tokens, seed):
    """The tokens that `match` stops by, and the rest: the first eighth of a seeded order."""
    n = len(tokens.states)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    cut = n // HELD_BACK
    return order[:cut], order[cut:]


def error(adapter, tokens, rows):
    with torch.no_grad():
        return float((adapter(tokens.states[rows]) - tokens.targets[rows]).square().sum())


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_matched_adapter_is_no_worse_than_the_linear_fit_on_tokens_held_back(location, rank):
    pair, _ = book_of("llama")
    plans = [FitSpec(location, kind, rank, "forced") for kind in ("linear", "nonlinear")]
    linear, nonlinear = fit_adapters(pair, DOCUMENTS, plans, seed=4).values()
    better = 0
    for layer in LAYERS:
        tokens = gathered(location, layer)
        # The march's tokens are in its own order, so `match` is called on those of the textbook.
        matched = match(linear.by_layer[layer], tokens, seed=4)
        back, used = held_back(tokens, 4)
        ours, theirs = (error(a, tokens, back) for a in (matched, linear.by_layer[layer]))
        assert ours <= theirs * (1 + 1e-9)
        better += ours < 0.9999 * theirs
        everything = torch.cat([back, used])
        found = nonlinear.by_layer[layer]
        assert isinstance(found, NonLinear)
        assert found.rank == rank
        whole = error(found, tokens, everything), error(linear.by_layer[layer], tokens, everything)
        assert whole[0] < 1.1 * whole[1]
    assert better  # and somewhere it is better


@pytest.mark.parametrize("seed", range(3))
def test_a_linear_map_is_matched_by_itself(seed):
    """Nothing is to be gained, and nothing is lost: the straight part of a SiLU is the fit."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    linear = Linear(draw(6, 2), draw(2, 6), draw(6))
    states = 3 * draw(400, 6) + 5
    tokens = Tokens(states, linear(states))
    matched = match(linear, tokens, seed)
    scale = float(tokens.targets.square().sum())
    assert error(matched, tokens, torch.arange(400)) < 1e-16 * scale


def test_a_bent_map_is_matched_better_than_any_linear_one():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2000, 6, generator=generator, dtype=torch.float64)
    bent = torch.nn.functional.silu(3 * states[:, :1]) @ torch.ones(1, 6, dtype=torch.float64)
    A, b = textbook.fit(states.numpy(), bent.numpy(), 1)
    U, s, Vt = np.linalg.svd(A)
    parts = (U[:, :1] * s[0], Vt[:1], b)
    linear = Linear(*map(torch.from_numpy, parts))
    tokens = Tokens(states, bent)
    back, used = held_back(tokens, 0)
    matched = match(linear, tokens)
    for rows in (back, used):
        assert error(matched, tokens, rows) < 0.97 * error(linear, tokens, rows)


@pytest.mark.parametrize("kind", ["vector", "linear", "loreft", "nonlinear"])
def test_half_precision_models_get_adapters_of_their_precision(tokenizer, kind):
    pair = tiny.make_pair("llama", torch.bfloat16, tokenizer)
    plan = FitSpec("post_mlp", kind, 2, "sequential")
    found = fit_adapters(pair, DOCUMENTS, [plan])[plan]
    parameters = list(found.modules.parameters())
    # torch keeps no rows orthonormal in a half precision.
    assert {p.dtype for p in parameters} == {torch.float32 if kind == "loreft" else torch.bfloat16}
    assert all(p.isfinite().all() and not p.requires_grad for p in parameters)


# --- LoReFT


@pytest.mark.parametrize("location", ["heads", "post_block"])
def test_loreft_at_full_rank_is_the_linear_fit(location):
    """Its rows then span everything: ``Rᵀ(W y + b − R y)`` can be any affine map."""
    pair, book = book_of("llama")
    plans = [FitSpec(location, "loreft", r, "sequential") for r in ("full", 2)]
    found = fit_adapters(pair, DOCUMENTS, plans)
    expected = slow_maps(book, location, ("full",) * 3, "sequential")
    states = torch.randn(5, tiny.D_MODEL, dtype=torch.float64)
    for layer, (A, b) in expected.items():
        adapter = found[plans[0]].by_layer[layer]
        assert isinstance(adapter, LoReFT)
        change = states.numpy() @ A.T + b
        scale = np.abs(change).max()
        with torch.no_grad():
            np.testing.assert_allclose(adapter(states).numpy(), change, atol=1e-8 * scale)
            narrow = found[plans[1]].by_layer[layer](states)
        assert torch.linalg.matrix_rank(narrow) == 2  # a constant included


def test_free_fits_are_those_of_a_diagnosis(tokenizer):
    """The post's linearised oracle: both models on their own states."""
    pair = tiny.make_pair("llama", torch.float64, tokenizer)
    plan = FitSpec("post_block", "linear", 4, "free")
    found = fit_adapters(pair, DOCUMENTS, [plan])[plan]
    batches = make_batches(encode_all(DOCUMENTS, tokenizer), "all", 2048, 0, "cpu", 0)
    march = March(pair.base_runner, pair.tuned_runner, batches, pair.branches)
    blocks = survey(march, SurveyPlan(pair.branches, [plan]), None, pair)
    states = torch.randn(5, tiny.D_MODEL, dtype=torch.float64)
    for block in blocks:
        torch.testing.assert_close(
            found.by_layer[block.layer](states), block.adapters[plan](states)
        )


# --- ranks


def test_allocated_ranks_go_where_tuning_changed_most(tokenizer):
    """One block changed ten times as much as the others gets the most; the total is kept."""
    base = tiny.make_model("llama")
    tuned = tiny.tune(base, 0.02)
    for ours, theirs in zip(
        tiny.blocks_of(tuned)[1].parameters(), tiny.blocks_of(base)[1].parameters(), strict=True
    ):
        ours.data += 10 * (ours - theirs)
    pair = ModelPair.from_models(base, tuned, tokenizer)
    plan = allocated(pair, DOCUMENTS, FitSpec("post_block", "linear", 4, "sequential"))
    assert sum(plan.rank) == 12
    assert plan.rank[1] == max(plan.rank) > 4
    assert min(plan.rank) >= 1
    found = fit_adapters(pair, DOCUMENTS, [plan])[plan]
    assert tuple(a.rank for a in found.by_layer.values()) == plan.rank


# --- what cannot be fitted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("post_mlp", "cubic", 2, "forced"), "kind is 'cubic'"),
        (("post_mlp", "head_vector", 2, "forced"), "kind is 'head_vector'"),
        (("post_mlp", "linear", 2, "magic"), "fit is 'magic'"),
        (("mlp_in", "linear", 2, "forced"), "location is 'mlp_in'"),
        (("nowhere", "linear", 2, "forced"), "location is 'nowhere'"),
        (("post_mlp", "linear", -1, "forced"), "rank is -1"),
        (("post_mlp", "linear", None, "forced"), "rank is None"),
        (("post_mlp", "nonlinear", 0, "forced"), "rank is 0"),
        (("post_mlp", "loreft", (2, 0, 2), "forced"), "rank is 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        FitSpec(*arguments)


def test_plans_that_do_not_fit_the_models_are_refused():
    pair, _ = book_of("llama")
    for rank, message in (((2, 2), "2 ranks for 3 blocks"), (17, "rank 17 is more than the 16")):
        with restores(pair.base), pytest.raises(InputError, match=message):
            fit_adapters(pair, DOCUMENTS, [FitSpec("post_block", "linear", rank, "forced")])
    with pytest.raises(InputError, match="whole number above 0"):
        allocated(pair, DOCUMENTS, FitSpec("post_block", "linear", "full", "forced"))


def test_a_location_that_the_family_lacks_is_refused(llama_pair):
    llama_pair.unavailable = {"heads": "the reason"}
    plan = FitSpec("heads", "linear", 2, "forced")
    for fit in (fit_adapters, allocated):
        argument = plan if fit is allocated else [plan]
        with pytest.raises(InputError, match="no 'heads': the reason"):
            fit(llama_pair, DOCUMENTS, argument)

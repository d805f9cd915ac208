"""What steering behind a rank-deficient MLP can learn, and what no adapter there can."""

import functools

import pytest
import torch

from tests.support.properties import restores
from toolkit import InputError
from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.adapters.linear import Linear
from toolkit.adapters.nonlinear import NonLinear
from toolkit.models.hooks import capture, replace
from toolkit.models.locations import mlp_projections, resolve
from toolkit.theory.deficient_mlp import (
    D_MODEL,
    N_TOKENS,
    judge,
    limit_rank,
    one_block_model,
    permutation_rows,
    spread_of,
    steers,
    train_adapter,
)
from toolkit.training.examples import NOT_SUPERVISED
from toolkit.training.methods import Method
from toolkit.training.trainer import TrainingOptions

BIAS = {"bias": True}
OPTIONS = TrainingOptions(0.1, batch_size=32, max_steps=100)
ROWS = permutation_rows(OPTIONS.max_steps * OPTIONS.batch_size, seed=0)
HELD_OUT = permutation_rows(128, seed=1000)
VECTOR = Method("vector", "vector", "post_block")
POST_BLOCK = Method("post-block", "linear", "post_block", "full", options=BIAS)
POST_MLP = {
    "linear": Method("linear", "linear", "post_mlp", "full", options=BIAS),
    "nonlinear": Method("non-linear", "nonlinear", "post_mlp", "full", options=BIAS),
    "loreft": Method("LoReFT", "loreft", "post_mlp", 8),
}
TOLERANCE = 0.02  # nats, between two trainings that search the same functions


@functools.cache
def trained(rank, name):
    model = one_block_model(rank)
    method = {"vector": VECTOR, "post_block": POST_BLOCK, **POST_MLP}[name]
    with restores(model):
        return model, train_adapter(model, method, ROWS, OPTIONS)


def loss(rank, name):
    return judge(*trained(rank, name), HELD_OUT).loss


def live_steers(rank, name):
    """What is added after the MLP in a forward pass of the steered model, at the steered tokens."""
    model, adapters = trained(rank, name)
    site = {"y": resolve(model).at["post_mlp", 0]}
    ids = torch.tensor([row["input_ids"] for row in HELD_OUT])
    with torch.no_grad():
        with capture(site) as plain:
            model(ids)
        with steer(model, adapters), capture(site) as steered:
            model(ids)
    return (steered["y"] - plain["y"])[:, 1:].flatten(0, 1)


# --- W_d = 0


@pytest.mark.parametrize("kind", POST_MLP)
def test_without_a_down_projection_a_post_mlp_steer_is_one_vector(kind):
    """Trained to depend on the token, it is the same at every steered token, bit for bit."""
    found = live_steers(0, kind)
    assert torch.equal(found, found[:1].expand_as(found))
    assert found[0].abs().max() > 0.1
    assert torch.equal(found, steers(*trained(0, kind), HELD_OUT))
    assert spread_of(trained(0, kind)[0], found).dimensions == 0


@pytest.mark.parametrize("kind", POST_MLP)
def test_without_a_down_projection_post_mlp_learns_what_a_vector_learns(kind):
    """Its held-out loss is no better than the fixed vector's; the post-block steer's is."""
    assert loss(0, kind) > loss(0, "vector") - TOLERANCE
    assert loss(0, "post_block") < loss(0, "vector") - 2
    assert judge(*trained(0, "post_block"), HELD_OUT).accuracy > 0.9
    assert judge(*trained(0, kind), HELD_OUT).accuracy < 3 / N_TOKENS


# --- the assumption broken: some of the rank is back


@pytest.mark.parametrize("kind", POST_MLP)
def test_one_restored_direction_makes_the_steer_vary(kind):
    """Along a line where the adapter is linear, along a curve where it is not."""
    found = live_steers(1, kind)
    assert not torch.allclose(found, found[:1].expand_as(found), atol=0.1)
    dimensions = spread_of(trained(1, kind)[0], found).dimensions
    assert (dimensions > 1) if kind == "nonlinear" else (dimensions == 1)


def test_steers_vary_in_as_many_dimensions_as_the_mlp_writes():
    for rank in (2, 4):
        found = live_steers(rank, "linear")
        assert spread_of(trained(rank, "linear")[0], found).dimensions == rank


def test_restored_rank_is_learned_from():
    """With more of W_d's rank a post-MLP steer gets ahead of the fixed vector."""
    gains = [loss(rank, "vector") - loss(rank, "linear") for rank in (0, 4, D_MODEL)]
    assert abs(gains[0]) < TOLERANCE
    assert 0.1 < gains[1] < gains[2]


def test_a_steer_may_point_out_of_what_the_mlp_writes():
    """What it depends on is limited to W_d's columns; where it points is not."""
    spread = spread_of(trained(1, "linear")[0], live_steers(1, "linear"))
    assert spread.outside > 0.5


def double_adapter(kind):
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
    d = D_MODEL
    if kind == "linear":
        return Linear(draw(d, d), None, draw(d))
    return NonLinear(draw(d, d), draw(d, d), draw(d), draw(d))


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_directions_in_the_null_space_of_the_down_projection_are_not_seen(kind):
    """m moved within it: the same steer at every token. m moved out of it: another steer."""
    model = one_block_model(4, dtype=torch.float64)
    adapters = Adapters("post_mlp", {0: double_adapter(kind)}, "identity")
    act = resolve(model).at["mlp_act", 0]
    vh = torch.linalg.svd(mlp_projections(model)[0]["down"].weight).Vh

    def moved(direction):
        with replace(act, lambda m: m + torch.randn_like(m[..., :1]) * direction):
            return steers(model, adapters, HELD_OUT)

    plain = steers(model, adapters, HELD_OUT)
    scale = float(plain.abs().max())
    assert torch.allclose(moved(vh[4:].sum(0)), plain, rtol=0, atol=1e-12 * scale)
    assert not torch.allclose(moved(vh[3]), plain, rtol=0, atol=1e-2 * scale)


# --- the model and its task


def test_an_outcome_is_read_from_the_steered_logits():
    """Token by token: what the vector makes of the logits behind each token but the first."""
    model, adapters = trained(4, "vector")
    nats, right = [], []
    for row in HELD_OUT[:20]:
        with torch.no_grad():
            inner = model.model.layers[0](
                model.model.embed_tokens(torch.tensor([row["input_ids"]])),
                position_embeddings=model.model.rotary_emb(
                    torch.zeros(1), torch.arange(len(row["input_ids"]))[None]
                ),
            )
            inner[:, 1:] += adapters.by_layer[0].bias
            logits = model.lm_head(model.model.norm(inner))[0]
        for place, label in enumerate(row["labels"][2:], 1):
            nats.append(-float(logits[place].double().log_softmax(0)[label]))
            right.append(int(logits[place].argmax()) == label)
    found = judge(model, adapters, HELD_OUT[:20])
    assert found.loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert found.accuracy == pytest.approx(sum(right) / len(right))


def test_the_down_projection_is_the_best_approximation_of_its_rank():
    full = one_block_model(D_MODEL).get_parameter("model.layers.0.mlp.down_proj.weight")
    singular = torch.linalg.svdvals(full)
    for rank in (0, 1, 5):
        model = one_block_model(rank)
        weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
        expected = torch.cat([singular[:rank], torch.zeros(D_MODEL - rank)])
        assert torch.allclose(torch.linalg.svdvals(weight), expected, atol=1e-5)
        assert torch.allclose((full - weight).norm(), singular[rank:].norm(), atol=1e-5)
        same = [n for n, p in model.named_parameters() if not n.endswith("down_proj.weight")]
        other = one_block_model(D_MODEL)
        assert all(torch.equal(model.get_parameter(n), other.get_parameter(n)) for n in same)


@pytest.mark.parametrize("rank", [-1, D_MODEL + 1])
def test_a_rank_that_no_down_projection_has_is_refused(rank):
    with pytest.raises(InputError, match=f"rank is {rank}: expected a whole number from 0 to 48"):
        limit_rank(one_block_model(D_MODEL), rank)


def test_the_task_asks_for_one_permutation_and_nothing_behind_the_first_token():
    images = {}
    for row in ROWS + HELD_OUT:
        assert row["labels"][:2] == [NOT_SUPERVISED] * 2
        for token, label in zip(row["input_ids"][1:], row["labels"][2:], strict=False):
            assert images.setdefault(token, label) == label
    assert sorted(images) == sorted(images.values()) == list(range(N_TOKENS))
    seen = {tuple(row["input_ids"]) for row in ROWS}
    assert not any(tuple(row["input_ids"]) in seen for row in HELD_OUT)

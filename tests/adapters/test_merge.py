"""Adapters merged into the weights: the steered model's logits, or a refusal."""

import copy

import pytest
import torch

from tests.support import tiny
from tests.support.kinds import CASES, randomised
from tests.support.properties import restores
from tests.support.steered import batch_of, steered_logits
from tests.support.steering import PROMPTS, generate
from toolkit.adapters.attach import steer
from toolkit.adapters.merge import merge_into_weights

AFFINE = ("vector", "linear", "loreft")
MERGED = [(kind, "post_mlp") for kind in AFFINE] + [
    ("vector", "post_block"),
    ("linear", "pre_mlp"),
    ("linear", "heads"),
    ("head_vector", "heads"),
    ("head_affine", "heads"),
    ("gated_heads", "heads"),
]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
@pytest.mark.parametrize(("kind", "location"), MERGED)
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt2"])
def test_the_merged_model_is_the_steered_one(family, kind, location, dtype, tolerance):
    """In a padded batch and in generation; OPT and GPT-2 have biases, GPT-2 matrices lie on their
    side."""
    model = tiny.make_model(family, dtype)
    adapters = randomised(model, kind, location, "every")
    tokens = batch_of()["attention_mask"].bool()
    bare = model(**batch_of()).logits
    expected = steered_logits(model, adapters)
    with steer(model, adapters):
        said = generate(model)
    merged = copy.deepcopy(model)
    with restores(model):
        merge_into_weights(merged, adapters)
    logits = merged(**batch_of()).logits
    assert torch.allclose(logits[tokens], expected[tokens], rtol=0, atol=tolerance)
    assert not torch.allclose(logits, bare, atol=1e-2)
    if dtype == torch.float64:
        assert torch.equal(generate(merged), said)
    assert not any(parameter.requires_grad for parameter in merged.parameters())


@pytest.mark.parametrize("kind", AFFINE)
def test_some_blocks_alone(kind):
    """The others' weights are bit for bit what they were."""
    model = tiny.make_model("llama")
    adapters = randomised(model, kind, "post_mlp", "every")
    del adapters.by_layer[1]
    ids = torch.tensor(PROMPTS[:1])
    with steer(model, adapters):
        expected = model(ids).logits
    before = {k: v.clone() for k, v in model.state_dict().items()}
    merge_into_weights(model, adapters)
    assert torch.allclose(model(ids).logits, expected, rtol=0, atol=1e-12)
    changed = {
        k for k, v in model.state_dict().items() if k not in before or (v != before[k]).any()
    }
    assert {name.rsplit(".", 1)[0] for name in changed} == {
        f"model.layers.{layer}.mlp.down_proj" for layer in (0, 2)
    }


def refused(model, adapters, message):
    with restores(model), pytest.raises(ValueError, match=message):
        merge_into_weights(model, adapters)


@pytest.mark.parametrize("positions", ["all", "last_prompt", "first_last(2)"])
def test_other_positions_are_refused(positions):
    """Weights act on every token, the first one too."""
    model = tiny.make_model("llama")
    adapters = randomised(model, "linear", "post_mlp", positions)
    refused(model, adapters, "weights act on every token")


@pytest.mark.parametrize("kind", ["linear", "loreft"])
def test_what_reads_the_residual_stream_is_refused(kind):
    model = tiny.make_model("llama")
    adapters = randomised(model, kind, "post_block", "every")
    refused(model, adapters, f"a {kind} adapter at post_block reads the residual stream")


@pytest.mark.parametrize("location", [where for kind, where in CASES if kind == "nonlinear"])
def test_the_kind_that_is_no_affine_map_is_refused(location):
    model = tiny.make_model("llama")
    adapters = randomised(model, "nonlinear", location, "every")
    refused(model, adapters, "a nonlinear adapter is no affine map")


@pytest.mark.parametrize(
    ("family", "location"),
    [
        *[(family, "post_mlp") for family in ("gemma2", "gemma3", "olmo2")],
        *[(family, "pre_mlp") for family in ("gemma2", "gemma3", "olmo2")],
        *[(family, "post_block") for family in ("gemma2", "gemma3", "olmo2", "granite")],
    ],
)
def test_families_with_something_after_the_matrix_are_refused(family, location):
    """Gemma's and OLMo 2's norm; Granite scales what its branches add to the stream."""
    model = tiny.make_model(family)
    adapters = randomised(model, "vector", location, "every")
    refused(model, adapters, f"a norm or a scale stands between it and {location}")


def test_experts_are_refused():
    model = tiny.make_model("mixtral")
    adapters = randomised(model, "linear", "post_mlp", "every")
    refused(model, adapters, "this model has no 'mlp_act'")


def test_one_block_that_cannot_be_merged_leaves_all_as_they_were():
    model = tiny.make_model("llama")
    adapters = randomised(model, "linear", "post_mlp", "every")
    adapters.by_layer[2] = randomised(model, "nonlinear", "post_mlp", "every").by_layer[2]
    refused(model, adapters, "no affine map")


def test_merged_twice_is_added_twice():
    """Adapters stay what they are, and can be merged into another copy."""
    model = tiny.make_model("llama")
    adapters = randomised(model, "loreft", "post_mlp", "every")
    states = {k: v.clone() for k, v in adapters.modules.state_dict().items()}
    twins = [copy.deepcopy(model) for _ in range(2)]
    for twin in twins:
        merge_into_weights(twin, adapters)
    ids = torch.tensor(PROMPTS[:1])
    assert torch.equal(twins[0](ids).logits, twins[1](ids).logits)
    assert all(torch.equal(v, states[k]) for k, v in adapters.modules.state_dict().items())

"""Steering a live model: in forward passes, in batches, in generation with a cache."""

import pytest
import torch

from tests.support import textbook, tiny
from tests.support.properties import restores
from tests.support.steering import N_NEW, PROMPTS, generate, random_adapters
from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.adapters.linear import Linear
from toolkit.adapters.vector import FixedVector
from toolkit.models.generation import make_prompts
from toolkit.models.hooks import capture
from toolkit.models.locations import resolve
from toolkit.models.runner import BlockRunner

LOCATIONS = ("pre_mlp", "post_mlp", "post_block")


def maps_of(adapters):
    """The adapters as matrices: A and b by layer."""
    d, maps = tiny.D_MODEL, {}
    for layer, adapter in adapters.by_layer.items():
        A = torch.zeros(d, d, dtype=torch.float64)
        if isinstance(adapter, Linear):
            A = adapter.up if adapter.down is None else adapter.up @ adapter.down
        maps[layer] = A.numpy(), adapter.bias.numpy()
    return maps


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "gpt2", "neox", "phi3", "opt"])
def test_batched_cached_generation_is_the_textbooks(family, location):
    """Left-padded prompts with a key-value cache say what each says alone, reread every time.

    The textbook applies ``h + A h + b`` by hand to every position but the first.
    """
    model, adapters = tiny.make_model(family), random_adapters(location)
    plain = generate(model)
    with restores(model), steer(model, adapters):
        said = generate(model)
    assert not torch.equal(said, plain)

    def steered(ids):
        return textbook.run(model, ids, location=location, maps=maps_of(adapters)).logits

    for ids, prompt in zip(said.tolist(), PROMPTS, strict=True):
        expected, _ = textbook.greedy(steered, prompt, N_NEW, {tiny.EOS})
        assert ids == expected + [tiny.PAD] * (N_NEW - len(expected))


@pytest.mark.parametrize("kind", ["vector", "linear", "full"])
@pytest.mark.parametrize("location", LOCATIONS)
def test_a_forward_pass_is_the_textbooks(kind, location):
    """All kinds, in some blocks only."""
    model, adapters = tiny.make_model("llama"), random_adapters(location, kind, layers=(0, 2))
    ids = PROMPTS[0]
    with steer(model, adapters):
        logits = model(torch.tensor([ids])).logits[0]
    expected = textbook.run(model, ids, location=location, maps=maps_of(adapters)).logits
    assert torch.allclose(logits, torch.from_numpy(expected), atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_token_and_padding_are_never_steered(side):
    """Their states are bitwise what they are without steering; every other token's are not."""
    model = tiny.make_model("llama")
    prompts = make_prompts(PROMPTS, tiny.PAD)
    ids, mask = prompts.ids, prompts.mask
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    sites = {"out": resolve(model).at["post_block", 0]}
    arguments = {"input_ids": ids, "attention_mask": mask.long()}
    with capture(sites) as plain:
        model(**arguments)
    with steer(model, random_adapters("post_block", "vector")), capture(sites) as steered:
        model(**arguments)
    same = (plain["out"] == steered["out"]).all(-1)
    first = mask & (mask.cumsum(1) == 1)
    assert torch.equal(same, first | ~mask)


def test_embeddings_may_be_given_instead_of_ids():
    model, adapters = tiny.make_model("llama"), random_adapters("post_mlp")
    ids = torch.tensor(PROMPTS[:1])
    with steer(model, adapters):
        from_ids = model(ids).logits
        embeddings = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeddings).logits, from_ids)


def test_a_location_that_a_family_lacks_is_refused_with_the_reason():
    model = tiny.make_model("neox")
    adapters = Adapters("resid_mid", random_adapters("post_mlp").by_layer, "free")
    with (
        restores(model),
        pytest.raises(ValueError, match=r"no 'resid_mid': .+"),
        steer(model, adapters),
    ):
        pass


def test_steering_adds_up():
    """Two vectors at one location, attached one inside the other, are their sum."""
    model = tiny.make_model("llama")
    one = random_adapters("post_block", "vector")
    two = Adapters(
        "post_block", {k: FixedVector(2 * a.bias) for k, a in one.by_layer.items()}, "free"
    )
    three = {k: FixedVector(3 * a.bias) for k, a in one.by_layer.items()}
    ids = torch.tensor(PROMPTS[:1])
    with steer(model, one), steer(model, two):
        nested = model(ids).logits
    with steer(model, Adapters("post_block", three, "free")):
        assert torch.allclose(model(ids).logits, nested, atol=1e-12)


def test_sites_may_be_handed_in():
    model, adapters = tiny.make_model("gpt2"), random_adapters("post_mlp")
    sites = BlockRunner(model, resolve(model)).sites
    ids = torch.tensor(PROMPTS[:1])
    with steer(model, adapters):
        expected = model(ids).logits
    with steer(model, adapters, sites):
        assert torch.equal(model(ids).logits, expected)

"""What holds of every kind of adapter, at every location that suits it."""

import json

import pytest
import torch

from tests.support import textbook, tiny
from tests.support.kinds import CASES, identical, randomised
from tests.support.properties import assert_identity_at_start, restores
from tests.support.steered import batch_of, steered_logits
from tests.support.steering import N_NEW, PROMPTS, generate
from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.models.hooks import capture
from toolkit.models.locations import resolve

every_kind = pytest.mark.parametrize(("kind", "location"), CASES)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_identity_at_the_start(kind, location, dtype):
    """Adapters whose output is rounded to the model's precision change no bit."""
    model = tiny.make_model("llama", dtype)
    adapters = identical(model, kind, location)
    assert_identity_at_start(model, lambda: steer(model, adapters), **batch_of())


@every_kind
@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_the_identity_at_the_start_in_other_families(kind, location, family):
    model = tiny.make_model(family)
    adapters = identical(model, kind, location)
    assert_identity_at_start(model, lambda: steer(model, adapters), **batch_of())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_was_trained_comes_back_from_disk(kind, location, dtype, tmp_path):
    """The same logits bit for bit, arguments, positions and number of parameters."""
    model = tiny.make_model("llama", dtype)
    saved = randomised(model, kind, location, positions="first_last(2)")
    expected = steered_logits(model, saved)
    assert not torch.allclose(expected, model(**batch_of()).logits, atol=1e-3)
    saved.save_pretrained(tmp_path)
    loaded = Adapters.from_pretrained(tmp_path)
    assert torch.equal(steered_logits(model, loaded), expected)
    for name in ("kind", "location", "positions", "parameters", "rank", "fit"):
        assert getattr(loaded, name) == getattr(saved, name)
    for layer, adapter in saved.by_layer.items():
        assert loaded.by_layer[layer].config == adapter.config
        assert type(loaded.by_layer[layer]) is type(adapter)
        json.dumps(adapter.config)


@every_kind
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_batched_generation_says_what_each_prompt_alone_says(kind, location, family):
    """Left-padded with a cache, by transformers' own `generate`."""
    model = tiny.make_model(family)
    adapters = randomised(model, kind, location)
    plain = generate(model)
    with steer(model, adapters):
        said = generate(model)
        for row, prompt in zip(said, PROMPTS, strict=True):
            alone = model.generate(**batch_of([prompt]), max_new_tokens=N_NEW, do_sample=False)
            alone = alone[0, len(prompt) :]
            assert torch.equal(row[: len(alone)], alone)
    assert not torch.equal(said, plain)


@every_kind
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_attention_implementations_agree(kind, location, family, monkeypatch):
    """At every token that is no padding, to 1e-10.

    Eager attention takes its softmax in float32, whatever the model's precision: in float64 that
    is coarse, and a mask of its least number overflows. Here it keeps its input's precision.
    """
    softmax = torch.nn.functional.softmax
    same_precision = lambda scores, dim, dtype=None: softmax(scores, dim)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "softmax", same_precision)
    model = tiny.make_model(family)
    adapters = randomised(model, kind, location)
    tokens = batch_of()["attention_mask"].bool()
    found = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        found[implementation] = steered_logits(model, adapters)[tokens]
        assert model.config._attn_implementation == implementation
    assert torch.allclose(found["eager"], found["sdpa"], rtol=0, atol=1e-10)


@every_kind
def test_the_model_is_as_it_was_behind_the_context(kind, location):
    """Also where the caller, or the forward pass itself, breaks off."""
    model = tiny.make_model("llama")
    adapters = randomised(model, kind, location)
    bare = model(**batch_of()).logits
    with restores(model):
        steered_logits(model, adapters)
    with restores(model), pytest.raises(ZeroDivisionError), steer(model, adapters):
        _ = 1 / 0
    with restores(model), pytest.raises(IndexError), steer(model, adapters):
        model(torch.tensor([[10**6]]))
    assert torch.equal(model(**batch_of()).logits, bare)


@every_kind
def test_adapters_for_blocks_that_a_model_lacks_leave_nothing_behind(kind, location):
    """A wrong index ends in an error after the first hooks were registered."""
    model = tiny.make_model("llama")
    right = randomised(model, kind, location)
    wrong = Adapters(location, {0: right.by_layer[0], 99: right.by_layer[1]}, "free")
    with restores(model), pytest.raises(ValueError, match="99"), steer(model, wrong):
        pass


@every_kind
def test_gradients_reach_every_parameter_and_none_of_the_models(kind, location):
    model = tiny.make_model("llama")
    adapters = randomised(model, kind, location)
    adapters.modules.requires_grad_(True)
    with restores(model):
        steered_logits(model, adapters).square().mean().backward()
    for name, parameter in adapters.modules.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in model.parameters())


@every_kind
def test_new_and_loaded_adapters_are_in_evaluation_mode(kind, location, tmp_path):
    """What draws at random in training must not do so where nobody trains."""
    model = tiny.make_model("llama")
    adapters = identical(model, kind, location)
    adapters.save_pretrained(tmp_path)
    for some in (adapters, Adapters.from_pretrained(tmp_path)):
        adapters_alone = (a.modules() for a in some.by_layer.values())
        assert not any(module.training for modules in adapters_alone for module in modules)


@pytest.mark.filterwarnings("ignore")  # dynamo's own, about what it does not trace
def test_a_model_compiled_inside_the_context_is_steered():
    """torch.compile sees the hooks that are there when it traces."""
    model = tiny.make_model("llama")
    adapters = randomised(model, "linear", "post_mlp")
    inputs = batch_of()
    expected = steered_logits(model, adapters)
    torch._dynamo.reset()
    try:
        with steer(model, adapters):
            compiled = torch.compile(model, backend="aot_eager")
            assert torch.allclose(compiled(**inputs).logits, expected, rtol=0, atol=1e-10)
            shorter = batch_of([[5, 6, 7], [8]])  # another mask, another shape
            assert torch.allclose(
                compiled(**shorter).logits, model(**shorter).logits, rtol=0, atol=1e-10
            )
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_adapters_at_several_locations_are_all_done(family, order):
    """Nested either way: each acts on what the ones before it in the block have changed."""
    model, layer = tiny.make_model(family), 1
    block = tiny.blocks_of(model)[layer]
    made = [
        randomised(model, "linear", "pre_mlp"),
        randomised(model, "nonlinear", "post_mlp"),
        randomised(model, "loreft", "post_block"),
    ]
    alone = [Adapters(a.location, {layer: a.by_layer[layer]}, a.fit) for a in made]
    at = resolve(model).at
    ids = torch.tensor(PROMPTS[:1])
    with capture({"in": at["post_block", layer - 1], "pre_mlp": at["pre_mlp", layer]}) as bare:
        model(ids)
    with (
        steer(model, alone[order[0]]),
        steer(model, alone[order[1]]),
        steer(model, alone[order[2]]),
        capture({"out": at["post_block", layer]}) as seen,
    ):
        model(ids)

    def steered(adapters, state):
        change = adapters.by_layer[layer](state)
        change[0] = 0  # each sequence's first token
        return state + change

    mid = bare["in"][0] + steered(alone[0], bare["pre_mlp"][0])
    inner = textbook.sublayer(block, mid) - mid
    by_hand = steered(alone[2], mid + steered(alone[1], inner))
    assert torch.allclose(seen["out"][0], by_hand, atol=1e-12)

"""Mistakes that published implementations made, a test each."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import textbook, tiny
from tests.support.kinds import randomised
from tests.support.steering import PROMPTS
from toolkit import InputError
from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.adapters.kinds import KINDS
from toolkit.adapters.nonlinear import NonLinear
from toolkit.models.hooks import capture
from toolkit.models.locations import resolve

LAYER = 1


def one_block(family, location):
    """A model, adapters in one block, and what they change in a stream `[n, d]`, by hand."""
    model = tiny.make_model(family)
    adapters = randomised(model, "nonlinear", location)
    adapters = Adapters(location, {LAYER: adapters.by_layer[LAYER]}, "free")

    def change(state):
        delta = adapters.by_layer[LAYER](state)
        delta[0] = 0  # each sequence's first token
        return delta

    return model, adapters, change


def enters_and_leaves(model, adapters):
    """The stream before and behind the block, steered, and its output without steering."""
    block, at = tiny.blocks_of(model)[LAYER], resolve(model).at
    ids = torch.tensor(PROMPTS[:1])
    sites = {"in": at["post_block", LAYER - 1], "out": at["post_block", LAYER]}
    with capture(sites) as bare:
        model(ids)
    with steer(model, adapters), capture(sites) as steered:
        model(ids)
    assert torch.equal(bare["in"], steered["in"])
    return block, steered["in"][0], steered["out"][0], bare["out"][0]


def read_off(module, run):
    """The module's output in ``run()``, by a hook of the test's own."""
    seen = []
    handle = module.register_forward_hook(
        lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        run()
    finally:
        handle.remove()
    return seen[0][0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "olmo2"])
def test_pre_mlp_is_what_attention_adds_to_the_stream(family):
    """Trap: one name, two places.

    `post_attention_layernorm` is the norm in front of the MLP in Llama and Qwen, and the norm on
    the attention's output in Gemma and OLMo 2. A hook on that name would steer the MLP's input
    alone in the former. Here, in both, what changes is the attention's addition to the stream:
    the MLP and the skip around it see the change.
    """
    model, adapters, change = one_block(family, "pre_mlp")
    block, x, steered, bare = enters_and_leaves(model, adapters)
    added_by = {
        "llama": block.self_attn,
        "qwen3": block.self_attn,
        "gemma2": block.post_attention_layernorm,
        "gemma3": block.post_attention_layernorm,
        "olmo2": block.post_attention_layernorm,
    }[family]
    added = read_off(added_by, lambda: model(torch.tensor(PROMPTS[:1])))
    assert torch.allclose(textbook.sublayer(block, x + added), bare, atol=1e-12)
    assert torch.allclose(textbook.sublayer(block, x + added + change(added)), steered, atol=1e-12)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_post_mlp_is_behind_the_post_norm(family):
    """Trap: in families with post-norms the MLP module's output is not what is added.

    Steering there would be normalised away. Here the adapter reads what the post-norm gives, and
    what it says is added behind it; steering the raw MLP would give another output.
    """
    model, adapters, change = one_block(family, "post_mlp")
    block, x, steered, bare = enters_and_leaves(model, adapters)
    run = lambda: model(torch.tensor(PROMPTS[:1]))  # noqa: E731
    raw = read_off(block.mlp, run)
    normed = read_off(block.post_feedforward_layernorm, run)
    mid = bare - normed
    assert torch.allclose(mid, x + read_off(block.post_attention_layernorm, run), atol=1e-12)
    assert torch.allclose(mid + normed + change(normed), steered, atol=1e-12)
    mistaken = mid + block.post_feedforward_layernorm(raw + change(raw))
    assert not torch.allclose(mistaken, steered, atol=1e-2)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_a_non_linear_adapter_is_loaded_as_one(activation, tmp_path):
    """Trap: the kind was a flag that was not saved; linear adapters ran through a non-linearity."""
    model = tiny.make_model("llama")
    states = torch.randn(4, tiny.D_MODEL, dtype=torch.float64)
    saved = Adapters.identity(
        "nonlinear", "post_block", range(2), tiny.D_MODEL, rank=3, activation=activation
    )
    saved.modules.to(model.dtype)
    for parameter in saved.modules.parameters():
        parameter.data = torch.randn_like(parameter)
    saved.save_pretrained(tmp_path)
    loaded = Adapters.from_pretrained(tmp_path)
    for layer, adapter in saved.by_layer.items():
        found = loaded.by_layer[layer]
        assert isinstance(found, NonLinear)
        assert found.activation == activation
        inner = states @ adapter.down.T
        by_hand = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
                   "relu": torch.relu}[activation](inner) @ adapter.up.T  # fmt: skip
        assert torch.allclose(found(states), by_hand, atol=1e-12)
        assert not torch.allclose(found(states), inner @ adapter.up.T, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_with_missing_keys_are_refused(kind, tmp_path):
    """Trap: missing keys were ignored, and what was drawn at random stood in for them."""
    model = tiny.make_model("llama")
    location = "heads" if "head" in kind else "post_block"
    randomised(model, kind, location).save_pretrained(tmp_path)
    path = tmp_path / "adapters.safetensors"
    tensors = load_file(path)
    for name in tensors:
        save_file({k: v for k, v in tensors.items() if k != name}, path)
        with pytest.raises(InputError, match="is missing"):
            Adapters.from_pretrained(tmp_path)
    save_file(tensors, path)
    Adapters.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["kind", "location", "positions", "layers", "fit", "info"])
def test_a_config_without_what_rebuilds_them_is_refused(key, tmp_path):
    """Trap: a default stood in for what was not saved."""
    model = tiny.make_model("llama")
    randomised(model, "linear", "post_mlp").save_pretrained(tmp_path)
    path = tmp_path / "adapters.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"no known adapter: '{key}'"):
        Adapters.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("kind", "linearr"), ("location", "attention"), ("positions", "some")]
)
def test_a_config_of_unknown_words_is_refused(key, value, tmp_path):
    model = tiny.make_model("llama")
    randomised(model, "linear", "post_mlp").save_pretrained(tmp_path)
    path = tmp_path / "adapters.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=value):
        Adapters.from_pretrained(tmp_path)


def test_the_config_says_another_kind_than_the_weights(tmp_path):
    """Linear weights under a non-linear config, or the reverse, differ in their names."""
    model = tiny.make_model("llama")
    randomised(model, "linear", "post_mlp").save_pretrained(tmp_path)
    path = tmp_path / "adapters.json"
    config = json.loads(path.read_text()) | {"kind": "nonlinear"}
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"'0\.inner_bias' is missing"):
        Adapters.from_pretrained(tmp_path)

"""The format gguf: files by the ``gguf`` reader under llama.cpp's rules, and llama.cpp itself."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from tests.support import gguf_model, tiny
from tests.support.kinds import CASES, randomised
from tests.support.steered import batch_of, steered_logits
from tests.support.steering import PROMPTS
from toolkit import Adapters, InputError
from toolkit.export import FORMATS, Base, export

IDS = PROMPTS[0]
# A Python that has xllamacpp (2026.10.11549 was tried), which carries llama.cpp.
LLAMA_CPP = "ORACLE_LLAMA_CPP_PYTHON"
MATRICES = {"ffn_down": "mlp.down_proj", "attn_output": "self_attn.o_proj"}


@pytest.fixture(scope="module")
def base():
    return Base(tiny.make_model("llama"), tiny.make_tokenizer(), "base")


def made(base, kind, location, positions="every"):
    """Adapters without what llama.cpp has no place for: block 0's vector, or a constant."""
    adapters = randomised(base.model, kind, location, positions)
    if location == "post_block":
        later = {layer: adapter for layer, adapter in adapters.by_layer.items() if layer}
        return replace(adapters, by_layer=later)
    for adapter in adapters.by_layer.values():
        if getattr(adapter, "bias", None) is not None:
            adapter.bias.data.zero_()
    return adapters


def read(folder, name):
    """Tensors and texts of a file, as the reader package gives them."""
    file = GGUFReader(folder / name)
    fields = {key: field.contents() for key, field in file.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in file.tensors}


def llama_cpp_steers(model, folder):
    """Logits under the reader's rules: direction.N after block N, and W + alpha/r B A."""
    twin = tiny.copy_of(model)
    if (folder / "control_vector.gguf").exists():
        _, tensors = read(folder, "control_vector.gguf")
        hooks = {int(name.removeprefix("direction.")): values for name, values in tensors.items()}
        assert min(hooks) > 0  # an error in llama.cpp
        for layer, values in hooks.items():
            block = twin.model.layers[layer]
            vector = torch.tensor(values, dtype=torch.float64)
            block.register_forward_hook(lambda *call, v=vector: call[2] + v)
        return twin(**batch_of()).logits
    fields, tensors = read(folder, "lora.gguf")
    for name in {name.rpartition(".")[0] for name in tensors}:
        a, b = (torch.tensor(tensors[f"{name}.lora_{side}"]).double() for side in "ab")
        _, layer, matrix, _ = name.split(".")
        weight = twin.model.layers[int(layer)].get_submodule(MATRICES[matrix]).weight
        weight += fields["adapter.lora.alpha"] / b.shape[1] * b @ a
    return twin(**batch_of()).logits


HELD = [("vector", "post_block"), ("linear", "post_mlp"), ("loreft", "post_mlp"),
        ("linear", "heads"), ("linear", "pre_mlp")]  # fmt: skip


@pytest.mark.parametrize(("kind", "location"), HELD)
def test_the_readers_rules_give_our_steered_logits(base, kind, location, tmp_path):
    adapters = made(base, kind, location)
    assert export(adapters, "gguf", tmp_path / "out", base)["fidelity"] == "exact"
    found = llama_cpp_steers(base.model, tmp_path / "out")
    expected = steered_logits(base.model, adapters)
    tokens = batch_of()["attention_mask"].bool()
    assert not torch.allclose(expected, base.model(**batch_of()).logits, atol=1e-3)
    torch.testing.assert_close(found[tokens], expected[tokens], rtol=0, atol=1e-6)


def test_the_fields_are_llama_cpps(base, tmp_path):
    export(made(base, "vector", "post_block"), "gguf", tmp_path / "vector", base)
    fields, tensors = read(tmp_path / "vector", "control_vector.gguf")
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == tiny.N_LAYERS
    assert {name: (v.dtype, v.shape) for name, v in tensors.items()} == {
        f"direction.{layer}": (np.float32, (tiny.D_MODEL,)) for layer in (1, 2)
    }
    export(made(base, "linear", "post_mlp"), "gguf", tmp_path / "lora", base)
    fields, tensors = read(tmp_path / "lora", "lora.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter"
    assert (fields["adapter.type"], fields["adapter.lora.alpha"]) == ("lora", 3)
    assert tensors["blk.0.ffn_down.weight.lora_a"].shape == (3, tiny.D_FF)
    assert tensors["blk.0.ffn_down.weight.lora_b"].shape == (tiny.D_MODEL, 3)


def test_block_0_and_the_first_token_are_approximations(base):
    found = FORMATS["gguf"].fidelity(randomised(base.model, "vector", "post_block", "all"), base)
    assert (found.level, str(found.held.positions)) == ("approximate", "every")
    assert set(found.held.by_layer) == {1, 2}
    assert "no direction for block 0" in found.reason
    assert "first token" in found.reason
    lora = FORMATS["gguf"].fidelity(made(base, "linear", "post_mlp", "all"), base)
    assert lora.level == "approximate"
    assert "first token" in lora.reason


def why(kind, location):
    """Why a cell of the table is refused; None where it is held."""
    if kind == "vector":
        return None if location == "post_block" else "LoRAs have no biases"
    if location == "post_block":
        return "control vectors are constants"
    return "no affine map" if kind == "nonlinear" else "LoRAs have no biases"


@pytest.mark.parametrize(("kind", "location"), [cell for cell in CASES if why(*cell)])
def test_what_llama_cpp_cannot_hold_is_refused(base, kind, location, tmp_path):
    """Constants among them: these adapters all have one."""
    adapters = randomised(base.model, kind, location, "every")
    with pytest.raises(
        InputError, match=f"gguf cannot hold these adapters: .*{why(kind, location)}"
    ):
        export(adapters, "gguf", tmp_path / "out", base, approximate=True)


def test_a_vector_of_block_0_alone_and_prompt_positions_are_refused(base):
    adapters = randomised(base.model, "vector", "post_block", "every")
    first = replace(adapters, by_layer={0: adapters.by_layer[0]})
    assert "block 0" in FORMATS["gguf"].fidelity(first, base).reason
    at_the_end = randomised(base.model, "vector", "post_block", "last_prompt")
    assert FORMATS["gguf"].fidelity(at_the_end, base).level == "refused"


@pytest.mark.skipif(LLAMA_CPP not in os.environ, reason=f"{LLAMA_CPP} names no Python")
@pytest.mark.parametrize(("kind", "location"), HELD)
def test_llama_cpp_gives_our_steered_logits(base, kind, location, tmp_path):
    adapters = made(base, kind, location)
    export(adapters, "gguf", tmp_path / "out", base)
    gguf_model.write(base.model, tmp_path / "model.gguf")
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    name = "control_vector.gguf" if location == "post_block" else "lora.gguf"
    script = sys.modules[gguf_model.__name__].__file__.replace("gguf_model", "llama_cpp")
    command = [os.environ[LLAMA_CPP], script, tmp_path / "model.gguf", tmp_path / "ids.json",
               tmp_path / "logits.npy", tmp_path / "out" / name]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    plain, steered = torch.tensor(np.load(tmp_path / "logits.npy")).double()
    ids = torch.tensor([IDS])
    torch.testing.assert_close(plain, base.model(ids).logits[0], rtol=0, atol=2e-5)
    expected = steered_logits(base.model, adapters)[0]
    torch.testing.assert_close(steered, expected, rtol=0, atol=2e-5)
    assert (steered - plain).abs().max() > 1e-2


def test_adapters_that_change_nothing_and_unknown_families_are_refused(base):
    """Before anything is written: a LoRA without a matrix, a vector of a family without a name."""
    nothing = Adapters.identity("vector", "post_mlp", [1], tiny.D_MODEL, "every")
    assert "change nothing" in FORMATS["gguf"].fidelity(nothing, base).reason
    unknown = Base(tiny.make_model("opt"), base.tokenizer)
    vector = randomised(unknown.model, "vector", "post_block", "every")
    assert "the family opt" in FORMATS["gguf"].fidelity(vector, unknown).reason


def test_a_block_that_changes_nothing_has_no_tensors(base, tmp_path):
    """Both gates of a head may be closed, and llama.cpp reads no empty tensor."""
    adapters = made(base, "gated_heads", "heads")
    for adapter in adapters.by_layer.values():
        adapter.vector.data.zero_()
    adapters.by_layer[1].gates.data.fill_(-9.0)
    assert export(adapters, "gguf", tmp_path / "out", base)["fidelity"] == "exact"
    _, tensors = read(tmp_path / "out", "lora.gguf")
    assert {name.split(".")[1] for name in tensors} == {"0", "2"}
    found = llama_cpp_steers(base.model, tmp_path / "out")
    tokens = batch_of()["attention_mask"].bool()
    expected = steered_logits(base.model, adapters)[tokens]
    torch.testing.assert_close(found[tokens], expected, rtol=0, atol=1e-6)

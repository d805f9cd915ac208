"""A folder with code of its own: every position, padding, caches, precisions; never loaded here."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import tiny
from tests.support.kinds import randomised
from tests.support.steered import batch_of
from tests.support.steering import PROMPTS, generate
from toolkit import InputError
from toolkit.adapters.attach import steer
from toolkit.export import Base, export
from toolkit.models.loading import load_model


def exported(model, adapters, folder, dtype=torch.float64):
    base = Base(model, tiny.make_tokenizer(), "base")
    assert export(adapters, "folder", folder, base)["fidelity"] == "exact"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True)


@pytest.mark.parametrize("positions", ["all", "every", "last_prompt", "first_last(2)"])
def test_all_positions_are_exact(positions, tmp_path):
    """Alone, padded on the left and on the right, and with a dynamic or a static cache."""
    model = tiny.make_model("llama")
    adapters = randomised(model, "linear", "pre_mlp", positions)
    loaded = exported(model, adapters, tmp_path / f"positions-{positions[:4]}")
    left = batch_of()
    right = {
        "input_ids": torch.tensor([p + [tiny.PAD] * (10 - len(p)) for p in PROMPTS]),
        "attention_mask": torch.tensor([[1] * len(p) + [0] * (10 - len(p)) for p in PROMPTS]),
    }
    for batch in (left, right, {"input_ids": left["input_ids"][:1]}):
        tokens = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        with steer(model, adapters):
            expected = model(**batch).logits[tokens]
        torch.testing.assert_close(loaded(**batch).logits[tokens], expected, rtol=0, atol=1e-10)
    static = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    with steer(model, adapters):
        said, still = generate(model), model.generate(**left, **static)
    assert torch.equal(generate(loaded), said)
    assert torch.equal(loaded.generate(**left, **static), still)
    assert torch.equal(generate(copy.deepcopy(loaded)), said)


def test_half_precision_keeps_the_adapters_precise(tmp_path):
    model = tiny.make_model("llama", torch.bfloat16)
    adapters = randomised(model, "linear", "post_block", "all")
    adapters.modules.float()
    loaded = exported(model, adapters, tmp_path / "half", torch.bfloat16)
    assert {p.dtype for p in loaded.steering.parameters()} == {torch.float32}
    with steer(model, adapters):
        expected = model(**batch_of()).logits
    assert torch.equal(loaded(**batch_of()).logits, expected)


def test_what_the_code_cannot_tell_is_an_error(tmp_path):
    model = tiny.make_model("llama")
    adapters = randomised(model, "vector", "post_block", "last_prompt")
    loaded = exported(model, adapters, tmp_path / "untold")
    ids = torch.tensor([PROMPTS[0][:6]])
    with pytest.raises(ValueError, match="where there are labels"):
        loaded(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="several sequences in one row"):
        loaded(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


def test_nothing_is_loaded_without_trust(tmp_path):
    """Neither by transformers nor by us: an unsteered model would be taken for a steered one."""
    model = tiny.make_model("llama", torch.float32)
    exported(model, randomised(model, "vector", "post_block"), tmp_path / "trust", torch.float32)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "trust", trust_remote_code=False)
    with pytest.raises(InputError, match="contains custom code"):
        load_model(tmp_path / "trust")


def test_a_folder_that_holds_an_export_is_left_alone(tmp_path):
    model = tiny.make_model("llama")
    adapters = randomised(model, "vector", "post_block")
    exported(model, adapters, tmp_path / "once")
    with pytest.raises(InputError, match="holds an export already"):
        exported(model, adapters, tmp_path / "once")


def test_experts_keep_their_names(tmp_path):
    """Transformers renames a mixture's tensors in files: not those of a class it does not know."""
    model = tiny.make_model("mixtral", torch.float32)
    adapters = randomised(model, "linear", "post_block")
    loaded = exported(model, adapters, tmp_path / "experts", torch.float32)
    with steer(model, adapters):
        expected = model(**batch_of()).logits
    tokens = batch_of()["attention_mask"].bool()
    torch.testing.assert_close(
        loaded(**batch_of()).logits[tokens], expected[tokens], rtol=0, atol=1e-6
    )

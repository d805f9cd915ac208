"""Parameter counts: the published ones, and those of real modules."""

import pytest
import torch
from transformers import LlamaConfig

from tests.support import tiny
from tests.support.kinds import CASES, method_of
from toolkit.models.locations import resolve
from toolkit.theory.published import CONFIGS
from toolkit.training.counts import adapter_parameters, lora_parameters, model_parameters
from toolkit.training.methods import Method, new_adapters, with_lora

LLAMA_1B, GEMMA3_1B, QWEN3_4B = (
    CONFIGS[name] for name in ("Llama-3.2-1B", "gemma-3-1b", "Qwen3-4B")
)
LINEAR_8 = Method("linear", "linear", "post_block", rank=8)


@pytest.mark.parametrize(
    ("config", "linear", "lora"),
    [
        (LLAMA_1B, 524_288, 5_636_096),
        (QWEN3_4B, 1_474_560, 16_515_072),
        (GEMMA3_1B, 479_232, 6_522_880),
    ],
    ids=["Llama-3.2-1B", "Qwen3-4B", "gemma-3-1b"],
)
def test_published_counts_at_rank_8(config, linear, lora):
    assert adapter_parameters(config, LINEAR_8) == linear
    assert lora_parameters(config, 8) == lora


def test_smaller_adapters():
    rank_1 = Method("linear", "linear", "post_block", rank=1)
    assert adapter_parameters(LLAMA_1B, rank_1) == 65_536
    assert adapter_parameters(LLAMA_1B, Method("vector", "vector", "post_block")) == 32_768


@pytest.mark.parametrize(
    ("config", "linear", "lora"),
    [(LLAMA_1B, 0.0424, 0.456), (GEMMA3_1B, 0.048, 0.652)],
    ids=["Llama-3.2-1B", "gemma-3-1b"],
)
def test_published_shares(config, linear, lora):
    """Percent of all parameters, to the digits that were printed."""
    whole = model_parameters(config)
    assert 100 * adapter_parameters(config, LINEAR_8) / whole == pytest.approx(linear, abs=5e-4)
    assert 100 * lora_parameters(config, 8) / whole == pytest.approx(lora, abs=5e-4)


def test_the_models_own_size():
    """What the model card says: 1.24 billion, tied embeddings counted once."""
    assert model_parameters(LLAMA_1B) == 1_235_814_400
    untied = LlamaConfig(**{**LLAMA_1B.to_dict(), "tie_word_embeddings": False})
    assert model_parameters(untied) == 1_235_814_400 + 128256 * 2048


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_counts_are_those_of_real_modules(family):
    """Every kind at every location that suits it, LoRA and the model, with weights in memory."""
    model = tiny.make_model(family)
    config, sites = model.config, resolve(model)
    assert model_parameters(config) == sum(p.numel() for p in model.parameters())
    for kind, location in CASES:
        method = method_of(kind, location)
        if location not in sites.unavailable:
            adapters = new_adapters(model, method, sites)
            assert adapter_parameters(config, method) == adapters.parameters
    joint = Method("joint", "joint", "post_block", rank=3)
    linear = Method("linear", "linear", "post_block", rank=3)
    assert adapter_parameters(config, joint) == adapter_parameters(config, linear)
    if family != "gpt2":  # peft says of its Conv1D that it sets an option by itself
        trained = [p.numel() for p in with_lora(model, 3).parameters() if p.requires_grad]
        assert lora_parameters(config, 3) == sum(trained)


def test_counting_draws_no_random_number():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    adapter_parameters(LLAMA_1B, Method("loreft", "loreft", "post_mlp", rank=4))
    model_parameters(tiny.FAMILIES["llama"]())
    assert torch.equal(torch.rand(1), expected)

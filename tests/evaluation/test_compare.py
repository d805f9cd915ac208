"""Maps in the oracle's place: the oracle itself, nothing, and one block alone."""

import pytest
import torch

from tests.support import tiny
from tests.support.properties import restores
from tests.support.steering import random_adapters
from toolkit import ModelPair
from toolkit.adapters.collection import Adapters
from toolkit.adapters.vector import FixedVector
from toolkit.errors import InputError
from toolkit.evaluation.candidates import NONE, ORACLE, Candidate
from toolkit.evaluation.compare import FORCINGS, evaluate

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20], [30, 31, 32, 33], [7, 7, 40]]
FAMILIES = ["llama", "gemma2", "gemma3", "olmo2", "qwen3", "phi3", "gpt2", "neox", "opt", "falcon"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_leaves_nothing(family, tokenizer):
    """KL < 1e-10 at every token, under both forcings, while no steering leaves much."""
    # Gemma-2's attention takes its softmax in float32, where float64's padding mask is infinite.
    dtype = torch.float32 if family == "gemma2" else torch.float64
    pair = tiny.make_pair(family, dtype, tokenizer)
    with restores(pair.base), restores(pair.tuned):
        evaluation = evaluate(pair, PROMPTS, [], n_new=5, forcings=FORCINGS)
    for forcing in ("tuned", "own"):
        assert evaluation.divergences[ORACLE, forcing].nats.max() < 1e-10
        assert evaluation.divergences[NONE, forcing].mean > 1e-2


@pytest.mark.parametrize("changed", ["norm", "head"])
def test_the_oracle_floor_is_the_change_behind_the_last_block(changed, tokenizer):
    """Fine-tuning that changed the final norm or the head too leaves what no block can supply."""
    base = tiny.make_model("llama")
    tuned = tiny.tune(base)
    weight = tuned.model.norm.weight if changed == "norm" else tuned.lm_head.weight
    weight *= 1 + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    pair = ModelPair.from_models(base, tuned, tokenizer)
    assert evaluate(pair, PROMPTS, [], n_new=5).divergences[ORACLE, "tuned"].mean > 1e-3


def test_adapters_that_add_nothing_are_no_steering(llama_pair):
    zero = {i: FixedVector(torch.zeros(tiny.D_MODEL).double()) for i in range(tiny.N_LAYERS)}
    candidate = Candidate.of(Adapters("post_mlp", zero, "free"))
    found = evaluate(llama_pair, PROMPTS, [candidate], n_new=5, forcings=FORCINGS)
    for forcing in ("tuned", "own"):
        pair = found.divergences[candidate, forcing], found.divergences[NONE, forcing]
        assert torch.equal(pair[0].nats, pair[1].nats)


@pytest.mark.parametrize("location", ["pre_mlp", "post_mlp", "post_block"])
@pytest.mark.parametrize("layer", range(tiny.N_LAYERS))
def test_one_block_alone_is_adapters_of_that_block_only(llama_pair, location, layer):
    """Starting at the steered block gives what steering it in the whole model gives."""
    adapters = random_adapters(location)
    alone = Candidate.of(adapters, layer)
    one = Adapters(location, {layer: adapters.by_layer[layer]}, "free")
    found = evaluate(
        llama_pair, PROMPTS, [alone, Candidate.of(one)], n_new=5, forcings=FORCINGS
    ).divergences
    nats = [found[c, "tuned"].nats for c in (alone, Candidate.of(one))]
    assert torch.allclose(*nats, atol=1e-10)
    assert (alone, "own") not in found
    assert alone.parameters == adapters.parameters // tiny.N_LAYERS


def test_batches_of_prompts_change_nothing(llama_pair):
    """One prompt at a time or all together: the same divergences in the same order."""
    candidate = Candidate.of(random_adapters("post_mlp"))
    one, together = (
        evaluate(llama_pair, PROMPTS, [candidate], 5, batch_size=n, forcings=FORCINGS)
        for n in (1, 16)
    )
    assert one.tokens == together.tokens
    for key, divergences in together.divergences.items():
        counted = divergences.counted
        assert torch.equal(one.divergences[key].counted, counted)
        ours, theirs = one.divergences[key].nats[counted], divergences.nats[counted]
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_candidates_of_one_key_are_refused_and_no_steering_is_there_once(llama_pair):
    """Prompts of two lengths make two batches: what is found stays each prompt's own."""
    prompts = [[5 + k % 40 for k in range(n)] for n in (300, 4, 290)]
    expected = evaluate(llama_pair, prompts, [], 3).divergences[NONE, "tuned"]
    found = evaluate(llama_pair, prompts, [NONE], 3).divergences[NONE, "tuned"]
    assert torch.equal(found.nats, expected.nats)
    same = [Candidate.of(random_adapters("post_block")) for _ in range(2)]
    with pytest.raises(InputError, match="two candidates have the key"):
        evaluate(llama_pair, prompts, same, 3)


def test_kept_tokens_of_the_tuned_model_are_not_generated_again(llama_pair, monkeypatch):
    kept = {}
    whole = evaluate(llama_pair, PROMPTS, [], 3, kept=kept)
    monkeypatch.setattr("toolkit.evaluation.reference.greedy", None)
    again = evaluate(
        llama_pair, PROMPTS, [Candidate.of(random_adapters("post_block"))], 3, kept=kept
    )
    assert again.tokens[None] == whole.tokens[None]

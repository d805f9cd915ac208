"""Many prompts need the memory of one batch of them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.support import tiny
from tests.support.live_bytes import LiveBytes
from toolkit import ModelPair
from toolkit.adapters.collection import Adapters
from toolkit.adapters.vector import FixedVector
from toolkit.evaluation.candidates import Candidate
from toolkit.evaluation.compare import FORCINGS, evaluate
from toolkit.evaluation.reference import Reference

N_VOCABULARY, N_NEW = 4000, 4


@pytest.fixture(scope="module")
def pair():
    config = LlamaConfig(
        vocab_size=N_VOCABULARY,
        hidden_size=tiny.D_MODEL,
        intermediate_size=tiny.D_FF,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,
        eos_token_id=tiny.EOS,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return ModelPair.from_models(base, tiny.tune(base), tiny.make_tokenizer())


def prompts(n):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, tiny.N_VOCABULARY, (n, 4), generator=generator).tolist()


def compared(pair, asked):
    vector = FixedVector(torch.full((tiny.D_MODEL,), 0.1))
    candidate = Candidate.of(Adapters("post_block", {0: vector}, "forced"))
    found = evaluate(pair, asked, [candidate], N_NEW, forcings=FORCINGS)
    return found.divergences[candidate, "tuned"].nats


def read(pair, asked):
    return Reference(pair.tuned, pair.tokenizer, asked, N_NEW).divergence(pair.base).nats


@pytest.mark.parametrize("work", [compared, read])
def test_memory_does_not_grow_with_prompts(pair, work):
    """But for what each prompt gives: tokens and nats, far less than a row of the vocabulary."""
    live, found = {}, {}
    for n in (16, 256):
        with LiveBytes() as live[n]:
            found[n] = work(pair, prompts(n))
    assert torch.equal(found[256][:16], found[16])
    assert live[16].peak > 16 * N_NEW * N_VOCABULARY * 8  # it sees what a batch needs
    grown = live[256].peak - live[16].peak
    assert grown < 240 * N_NEW * 200

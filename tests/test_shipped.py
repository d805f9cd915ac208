"""The pair that ships, on the real model: its weights come from the package index, once."""

import pytest
import torch

from toolkit import ModelPair, read_documents
from toolkit.documents.tokens import encode_all
from toolkit.evaluation.candidates import NONE, ORACLE
from toolkit.evaluation.compare import evaluate
from toolkit.runtime.shipped import ADAPTER, BASE, PROMPTS, shipped


@pytest.fixture(scope="module")
def pair():
    return ModelPair.load(BASE, shipped(ADAPTER))


def test_every_proof_passes(pair):
    assert {check.status for check in pair.checks} == {"passed"}
    assert not pair.unavailable


def test_adapter_costs_no_second_copy_and_off_is_the_base_bit_for_bit(pair):
    base, tuned = (blocks.model for blocks in (pair.base_runner, pair.tuned_runner))
    ours = base.model.layers[3].mlp.up_proj.weight
    theirs = tuned.model.layers[3].mlp.up_proj.base_layer.weight
    assert ours.data_ptr() == theirs.data_ptr()
    ids = torch.arange(100, 140)[None]
    plain = base(input_ids=ids).logits
    assert not torch.equal(tuned(input_ids=ids).logits, plain)
    with pair.tuned.disable_adapter():
        assert torch.equal(tuned(input_ids=ids).logits, plain)


def test_oracle_reproduces_the_tuned_model(pair):
    """Far apart without steering, and at rounding with the oracle at every block output."""
    encoded = encode_all(read_documents(shipped(PROMPTS)), pair.tokenizer)
    prompts = [e.prompt_ids for e in encoded if e.held_out][:2]
    evaluation = evaluate(pair, prompts, [], n_new=8)
    assert evaluation.divergences[NONE, "tuned"].mean > 0.1
    assert evaluation.divergences[ORACLE, "tuned"].mean < 1e-6

"""What blocks leave and what it costs, against the tables of a diagnosis and hooks of one's own."""

import numpy as np
import pytest
import torch

from tests.support import tiny
from toolkit import ModelPair, diagnose
from toolkit.diagnosis.options import Options
from toolkit.documents.batches import make_batches
from toolkit.documents.tokens import encode_all
from toolkit.evaluation.allocation import block_errors, probe_batch

DOCUMENTS = tiny.make_documents(40)


@pytest.fixture(scope="module")
def pair(tokenizer):
    return tiny.make_pair("llama", torch.float64, tokenizer)


@pytest.fixture(scope="module")
def errors(pair):
    return block_errors(pair, DOCUMENTS)


def test_what_is_left_is_what_the_linear_fit_does_not_explain(pair, errors):
    """By rank, of rank 0's: the table's held-out shares of the forced delta of the block."""
    run = diagnose(pair, DOCUMENTS, Options(new_tokens=2), show_progress=False)
    rows = run.linear_fit.frame.query(
        "source == 'post_block' and target == 'block' and mode == 'forced'"
    )
    for layer, shares in enumerate(errors.left):
        of_layer = rows[rows.layer == layer].set_index("rank").explained_heldout
        for rank in (1, 2, 4, 8):
            theirs = (1 - of_layer[rank]) / (1 - of_layer[0])
            assert shares[rank] / shares[0] == pytest.approx(theirs, rel=1e-9)


def test_gains_fall_and_sum_to_what_the_full_map_explains(pair, errors):
    for gains in errors.gains:
        assert (np.diff(gains) <= 1e-12).all()
        assert len(gains) == tiny.D_MODEL
        assert 0 < sum(gains) < 1


def test_a_block_that_did_not_change_leaves_and_costs_nothing(tokenizer):
    base = tiny.make_model("llama")
    tuned = tiny.copy_of(base)
    block = tuned.model.layers[1]
    block.mlp.down_proj.weight += 0.2 * torch.randn_like(block.mlp.down_proj.weight)
    found = block_errors(ModelPair.from_models(base, tuned, tokenizer), DOCUMENTS)
    for layer in (0, 2):
        assert max(map(abs, found.left[layer])) < 1e-20
    assert found.costs[0] == 0
    assert found.left[1][0] > 1e-4 < found.costs[1]


def test_costs_are_of_the_error_that_the_map_makes(pair, errors):
    """A tuned model twice as far away makes larger errors, which cost about as much a unit."""
    further = tiny.make_pair("llama", torch.float64, pair.tokenizer, size=0.3)
    found = block_errors(further, DOCUMENTS)
    for ours, theirs, near, far in zip(
        errors.left, found.left, errors.costs, found.costs, strict=True
    ):
        assert theirs[0] > ours[0]
        assert 0.4 < far / near < 2.5


def test_probe_is_of_fit_documents_and_about_the_size_asked_for(tokenizer):
    encoded = encode_all(DOCUMENTS, tokenizer, 64)
    batches = make_batches(encoded, "all", 200, 0, "cpu", 0)
    probe = probe_batch(batches, 50)
    assert not probe.held_out
    assert 0 < probe.mask.sum() <= 50
    assert len(probe.keys) == probe.counted.sum()

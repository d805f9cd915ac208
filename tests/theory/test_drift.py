"""Where steered states go, against whole models with hooks of one's own."""

import numpy as np
import pytest
import torch

from tests.support import tiny
from tests.support.properties import restores
from toolkit import ModelPair
from toolkit.adapters.collection import Adapters
from toolkit.adapters.vector import FixedVector
from toolkit.documents.batches import make_batches
from toolkit.documents.tokens import encode_all
from toolkit.fitting.closed_form import fit_adapters
from toolkit.fitting.spec import FitSpec
from toolkit.theory.drift import drift

DOCUMENTS = tiny.make_documents(40)


def _batches(tokenizer):
    encoded = [d for d in encode_all(DOCUMENTS, tokenizer) if d.held_out]
    return make_batches(encoded, "all", 60, 0, "cpu")


def test_no_steering_stays_at_the_base_model(llama_pair, tokenizer):
    zero = {k: FixedVector(torch.zeros(tiny.D_MODEL).double()) for k in range(tiny.N_LAYERS)}
    for row in drift(llama_pair, Adapters("post_block", zero, "identity"), _batches(tokenizer)):
        assert (row.moved, row.missed) == (0, 1)


def test_models_that_agree_have_no_way_to_go(tokenizer):
    base = tiny.make_model("llama")
    pair = ModelPair.from_models(base, tiny.copy_of(base), tokenizer)
    push = {1: FixedVector(torch.ones(tiny.D_MODEL).double())}
    rows = drift(pair, Adapters("post_block", push, "identity"), _batches(tokenizer))
    assert [row.moved for row in rows] == [0, np.inf, np.inf]


def test_textbook(llama_pair, tokenizer):
    """Vectors after every block, one document at a time, with hooks on the whole model."""
    torch.manual_seed(3)
    vectors = torch.randn(tiny.N_LAYERS, tiny.D_MODEL, dtype=torch.float64)
    adapters = Adapters(
        "post_block", {k: FixedVector(v) for k, v in enumerate(vectors)}, "identity"
    )
    with restores(llama_pair.base):
        found = drift(llama_pair, adapters, _batches(tokenizer))
    sums = np.zeros((tiny.N_LAYERS, 3))
    for document in (d for d in encode_all(DOCUMENTS, tokenizer) if d.held_out):
        base, tuned = (_states(m, document.ids) for m in (llama_pair.base, llama_pair.tuned))
        steered = _states(llama_pair.base, document.ids, vectors)
        for layer in range(tiny.N_LAYERS):
            b, t, s = base[layer], tuned[layer], steered[layer]
            sums[layer] += [((x - y) ** 2).sum() for x, y in ((t, b), (s, b), (s, t))]
    whole, moved, missed = sums.T
    np.testing.assert_allclose([row.moved for row in found], np.sqrt(moved / whole))
    np.testing.assert_allclose([row.missed for row in found], np.sqrt(missed / whole))


def test_the_free_fit_overshoots_where_the_forced_one_does_not(tokenizer):
    """One change in block 0, which later blocks pass on: the free fit adds it in every block.

    And more than that: its maps read states that were moved already.
    """
    base = tiny.make_model("llama")
    for block in base.model.layers[1:]:  # blocks that hand on what they get, nearly
        block.self_attn.o_proj.weight *= 0.02
        block.mlp.down_proj.weight *= 0.02
    tuned = tiny.copy_of(base)
    tuned.model.layers[0].mlp.down_proj.weight *= 1.5
    pair = ModelPair.from_models(base, tuned, tokenizer)
    moved = {}
    for fit in ("free", "forced"):
        plan = FitSpec("post_block", "linear", 8, fit)
        adapters = fit_adapters(pair, DOCUMENTS, [plan])[plan]
        moved[fit] = [row.moved for row in drift(pair, adapters, _batches(tokenizer))]
    assert moved["free"][0] == pytest.approx(1, rel=0.1)
    assert moved["free"][1] > 1.8
    assert moved["free"][2] > 2.7
    assert moved["forced"] == pytest.approx([1, 1, 1], rel=0.1)


def _states(model, ids, vectors=None):
    """The states behind every block, without the first token, which is not steered."""
    kept, handles = [], []
    for layer, block in enumerate(model.model.layers):

        def hook(_module, _args, output, layer=layer):
            output = output.clone()
            if vectors is not None:
                output[:, 1:] += vectors[layer]
            kept.append(output[0, 1:].numpy())
            return output

        handles.append(block.register_forward_hook(hook))
    model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return kept

"""Errors put into a model, against hooks of one's own; gains against dense Jacobians."""

import pytest
import torch

from tests.support import tiny
from tests.support.properties import restores
from toolkit import ModelPair
from toolkit.documents.batches import make_batches
from toolkit.documents.tokens import encode_all
from toolkit.evaluation.injection import Propagation
from toolkit.models.edits import steerable
from toolkit.theory.block_gain import weight_bounds
from toolkit.theory.error_growth import first_document, measure_growth, operator_norm, worst_gain

BOUNDED = ["llama", "qwen3", "gemma2", "gemma3", "olmo2"]


def _batch(tokenizer, n=4, longest=12):
    encoded = encode_all(tiny.make_documents(n, longest), tokenizer, 64)
    return make_batches(encoded, "all", 500, 0, "cpu", 0)[0]


@pytest.fixture(params=BOUNDED)
def pair(request, tokenizer):
    return tiny.make_pair(request.param, torch.float64, tokenizer)


def test_no_error_changes_nothing(llama_pair, tokenizer):
    batch = _batch(tokenizer)
    passed = Propagation(llama_pair.tuned_runner, batch)
    growth = passed.inject(1, "post_block", torch.zeros_like(passed.leaving[1]))
    assert growth.errors == (0.0, 0.0)
    assert growth.kl == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("location", ["pre_mlp", "post_mlp", "post_block"])
def test_textbook(llama_pair, tokenizer, location):
    """The whole model once more, with a hook that adds the error."""
    batch, layer = _batch(tokenizer), 0
    model = llama_pair.tuned
    with restores(model):
        passed = Propagation(llama_pair.tuned_runner, batch)
        error = passed.random_error(layer, torch.Generator().manual_seed(0), 0.1)
        growth = passed.inject(layer, location, error)
    block = model.model.layers[layer]
    module = {"pre_mlp": block.self_attn, "post_mlp": block.mlp, "post_block": block}[location]
    kept = error * steerable(batch.mask)[..., None]

    def add(_module, _args, output):
        return (output[0] + kept, *output[1:]) if isinstance(output, tuple) else output + kept

    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
    clean = model(**inputs, output_hidden_states=True)
    handle = module.register_forward_hook(add)
    steered = model(**inputs, output_hidden_states=True)
    handle.remove()
    # What enters block 2: the library keeps a block's output before a hook of ours changes it, and
    # the last one behind the final norm.
    ours, theirs = (x.hidden_states[2][batch.counted] for x in (steered, clean))
    assert growth.errors[1] == pytest.approx(float((ours - theirs).norm() / theirs.norm()))
    p, q = (x.logits[batch.counted].log_softmax(-1) for x in (clean, steered))
    assert growth.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-9)


def test_errors_after_the_mlp_and_after_the_block_are_one(llama_pair, tokenizer):
    """Both are added to the stream behind the block; before the MLP it is another matter."""
    frame = measure_growth(llama_pair, _batch(tokenizer)).set_index(["layer", "location"])
    for layer in range(tiny.N_LAYERS):
        before, after, behind = (
            frame.loc[(layer, name), "kl"] for name in ("pre_mlp", "post_mlp", "post_block")
        )
        assert after == pytest.approx(behind, rel=1e-6)
        assert abs(before - behind) > 1e-3 * behind


def test_small_errors_cost_squares(llama_pair, tokenizer):
    passed = Propagation(llama_pair.tuned_runner, _batch(tokenizer))
    error = passed.random_error(0, torch.Generator().manual_seed(0), 1e-3)
    once, twice = (passed.inject(0, "post_block", k * error) for k in (1, 2))
    assert twice.kl / once.kl == pytest.approx(4, rel=0.02)
    assert twice.errors[0] / once.errors[0] == pytest.approx(2)


def test_operator_norm_is_the_dense_one():
    matrix = torch.randn(5, 5, dtype=torch.float64)
    x = torch.randn(1, 3, 5, dtype=torch.float64)
    where = torch.tensor([False, True, True])[None, :, None]
    found = operator_norm(lambda v: v @ matrix.T, x, where, 200)
    assert found == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-6)
    nothing = operator_norm(lambda v: v * ~where, x, where, 2)
    assert nothing == 0


def test_bound_holds_where_its_assumptions_do(pair, tokenizer):
    """Worst case by power iteration = the dense Jacobian's 2-norm <= the bound; in every block."""
    document = first_document(_batch(tokenizer, 4, 8))
    blocks = pair.tuned_runner
    bounds = weight_bounds(pair, document)
    passed = Propagation(blocks, document)
    for layer, bound in enumerate(bounds):
        entering = passed.entering[layer]
        dense = _dense(blocks, layer, document, entering)
        assert worst_gain(blocks, layer, document, entering, 80) == pytest.approx(dense, rel=1e-3)
        assert dense <= bound.block
        assert bound.mlp > 0 < bound.attention


def test_bound_is_of_these_states_alone(llama_pair, tokenizer):
    """Its assumption broken: in front of a norm, smaller states are enlarged more than it says."""
    document = first_document(_batch(tokenizer, 4, 8))
    blocks = llama_pair.tuned_runner
    bound = weight_bounds(llama_pair, document)[2]
    entering = Propagation(blocks, document).entering[2]
    assert _dense(blocks, 2, document, entering) <= bound.block
    assert _dense(blocks, 2, document, entering * 1e-4) > bound.block


def test_families_that_the_bound_is_not_written_for_say_why(tokenizer):
    pair = tiny.make_pair("gpt2", torch.float64, tokenizer)
    frame = measure_growth(pair, _batch(tokenizer))
    assert "q_proj" in frame.attrs["no_bound"]
    assert frame.bound.isna().all()
    assert frame.worst.notna().sum() == tiny.N_LAYERS


def test_a_model_that_passes_errors_on_unchanged(tokenizer):
    """Blocks whose branches are cut off: every gain is 1."""
    base = tiny.make_model("llama")
    for block in base.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    pair = ModelPair.from_models(base, tiny.copy_of(base), tokenizer)
    rows = measure_growth(pair, _batch(tokenizer)).query("location == 'post_block'")
    assert rows.end_gain.tolist() == pytest.approx([1] * tiny.N_LAYERS)
    assert rows.worst.tolist() == pytest.approx([1] * tiny.N_LAYERS)
    assert rows.bound.tolist() == pytest.approx([1] * tiny.N_LAYERS)


def _dense(blocks, layer, document, entering):
    """The 2-norm of the block's dense Jacobian, of changes at all tokens but the first."""
    call = blocks.call(layer, document)

    def block(state):
        return blocks.run(layer, call, state, ())[0]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(block, entering)
    n = entering.numel()
    seen = steerable(document.mask)[0].repeat_interleave(entering.shape[-1])
    return float(torch.linalg.matrix_norm(jacobian.reshape(n, n)[:, seen], 2))

"""The noise of the precision: of a state, of a block, and what a run says of it."""

import pytest
import torch

from tests.support import tiny
from toolkit import InputError, ModelPair, Options, diagnose
from toolkit.diagnosis.noise import NoFloat32, measure_noise, some_of
from toolkit.documents.batches import make_batches
from toolkit.documents.tokens import encode_all
from toolkit.models.hooks import capture, constant, replace
from toolkit.tables.table import Table

FAMILIES = ("llama", "gpt2", "gemma3", "opt", "neox", "mixtral")
HALVES = (torch.bfloat16, torch.float16)
OPTIONS = Options(new_tokens=2, sample=1, shared_sample=8, max_prompts=2)


def measured(pair):
    few = some_of(encode_all(tiny.make_documents(8), pair.tokenizer), "all")
    (batch,) = make_batches(few)
    return batch, measure_noise(pair.base_runner, batch, pair.branches)


def whole_pass(pair, batch, dtype):
    """By location and layer, the states of the counted tokens in a whole pass of the base model.

    It begins with the embeddings in the pair's own precision.
    """
    model = tiny.copy_of(pair.base).to(dtype)
    sites = ModelPair.from_models(model, model, pair.tokenizer).base_runner.sites
    embedded = pair.base_runner.embed(batch).to(dtype)
    with (
        torch.no_grad(),
        replace(sites.inputs["0"], constant(embedded)),
        capture(sites.at) as states,
    ):
        model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
    return {place: batch.of_counted(state).double() for place, state in states.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", HALVES)
def test_free_noise_is_the_difference_of_whole_passes(family, dtype, tokenizer):
    pair = tiny.make_pair(family, dtype, tokenizer)
    batch, noise = measured(pair)
    coarse, fine = (whole_pass(pair, batch, d) for d in (dtype, torch.float32))
    # Rotary embeddings, which noise takes as given, are rounded in one of the two passes.
    tolerance = 1e-3 if family in ("gpt2", "opt") else 0.15
    rows = noise.table.frame.query("mode == 'free'")
    assert len(rows) == tiny.N_LAYERS * len(pair.branches)
    for row in rows.itertuples():
        reference = fine[row.location, row.layer]
        error = coarse[row.location, row.layer] - reference
        rms = error.square().sum(1).mean().sqrt()
        assert row.n_tokens == len(error)
        assert row.noise_rms == pytest.approx(float(rms), rel=tolerance)
        size = reference.square().sum(1).mean().sqrt()
        assert row.noise_relative == pytest.approx(float(rms / size), rel=tolerance)
        assert row.noise_norm == pytest.approx(float(error.norm(dim=1).mean()), rel=tolerance)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_noise_is_near_its_epsilon(family, tokenizer):
    """Within a factor of 10 either way, of the half precision and of float32."""
    for dtype in (torch.bfloat16, torch.float32):
        _, noise = measured(tiny.make_pair(family, dtype, tokenizer))
        relative = noise.table.frame.noise_relative / torch.finfo(dtype).eps
        assert relative.between(0.05, 20).all()


def test_forced_noise_is_of_one_block_alone(tokenizer):
    """In the first block both modes are one; later ones gather, where single blocks do not."""
    pair = tiny.make_pair("llama", torch.bfloat16, tokenizer)
    frame = measured(pair)[1].table.frame
    free, forced = (
        frame[frame["mode"] == mode].set_index(["layer", "location"]).noise_rms
        for mode in ("free", "forced")
    )
    assert (free.loc[0] == forced.loc[0]).all()
    assert (free.loc[1:] > forced.loc[1:]).all()


def test_norms_that_ask_for_float32_are_given_float64(tokenizer):
    """Otherwise float32's noise would be measured against float32's."""
    norm = tiny.blocks_of(tiny.make_model("llama"))[0].input_layernorm
    state = torch.randn(5, tiny.D_MODEL, dtype=torch.float64)
    textbook = state / (state.square().mean(1, keepdim=True) + norm.variance_epsilon).sqrt()
    with torch.no_grad(), NoFloat32():
        found = norm(state) / norm.weight
    assert torch.allclose(found, textbook, rtol=1e-13)
    with torch.no_grad():
        assert not torch.allclose(norm(state) / norm.weight, textbook, rtol=1e-9)


def test_states_that_overflow_are_named(tokenizer):
    base = tiny.make_model("llama", torch.float16)
    tiny.blocks_of(base)[1].mlp.down_proj.weight.data.fill_(6e4)
    pair = ModelPair.from_models(base, tiny.copy_of(base), tokenizer)
    with pytest.raises(InputError, match=r"float16 in block 1.*--dtype"):
        measured(pair)


def test_in_float64_what_is_left_is_norms_in_float32(tokenizer):
    _, noise = measured(tiny.make_pair("gpt2", torch.float64, tokenizer))
    assert noise.table.frame.empty
    assert "float64" in noise.reason
    _, noise = measured(tiny.make_pair("llama", torch.float64, tokenizer))
    assert noise.table.frame.noise_relative.between(1e-9, 1e-6).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_run_in_half_precision_is_the_exact_one_within_its_noise(dtype, tokenizer):
    """rms(delta) moves by at most the sum of both models' noise."""
    pair = tiny.make_pair("llama", dtype, tokenizer)
    run = diagnose(pair, tiny.make_documents(20), OPTIONS, show_progress=False)
    models = (model.float() for model in (pair.base, pair.tuned))
    exact = diagnose(
        ModelPair.from_models(*models, tokenizer),
        tiny.make_documents(20),
        OPTIONS,
        show_progress=False,
    )
    keys = ["layer", "location", "mode"]
    rows = run.spectrum.frame.merge(exact.spectrum.frame, on=keys, suffixes=("", "_exact"))
    rows = rows.merge(run.noise.frame, on=keys, suffixes=("", "_noise"))
    assert len(rows) == len(run.spectrum.frame)
    moved = (rows.rms - rows.rms_exact).abs()
    assert (moved <= 3 * rows.noise_rms).all()
    assert (moved > 0).any()
    check = next(c for c in run.checks if c.name.startswith("noise"))
    assert check.status == "passed"


def test_a_run_of_rounding_alone_is_told(tokenizer):
    base = tiny.make_model("llama", torch.float32)
    tuned = tiny.copy_of(base)
    for parameter in tiny.blocks_of(tuned).parameters():
        parameter.data *= 1 + 1e-7
    pair = ModelPair.from_models(base, tuned, tokenizer)
    run = diagnose(pair, tiny.make_documents(20), OPTIONS, show_progress=False)
    check = next(c for c in run.checks if c.name.startswith("noise"))
    assert check.status == "failed"
    assert run.info["noise_floor"]["precision"] == "float32"


def test_a_run_from_before_there_was_noise_has_none():
    table = Table.absent("noise")
    assert not table.measured
    assert table.frame.empty
    words = [text.get_text() for text in table.plot().axes[0].texts]
    assert words == ["not measured in this run"]

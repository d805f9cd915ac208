"""Float8 checkpoints: the intervals that were rounded, and the noise of it beside the real one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import tiny
from toolkit import ModelPair, Options, diagnose
from toolkit.diagnosis.noise import quantisation_rows, some_of
from toolkit.models.loading import load_model
from toolkit.models.quantised import FLOAT8, cells

FLOAT8_CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128]}
OPTIONS = Options(new_tokens=3, sample=1, shared_sample=0)


def store_as_float8(folder):
    """Put float8 matrices with one scale each in place of the blocks' weights."""
    path = folder / "model.safetensors"
    stored = {}
    for name, weight in load_file(path).items():
        stored[name] = weight
        if weight.ndim == 2 and "layers" in name:
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[name.replace("weight", "weight_scale_inv")] = scale.reshape(1, 1)
    save_file(stored, path, {"format": "pt"})
    config = folder / "config.json"
    known = json.loads(config.read_text()) | {"quantization_config": FLOAT8_CONFIG}
    config.write_text(json.dumps(known))


@pytest.mark.parametrize("block", [None, (8, 16)])
def test_cells_hold_what_was_rounded(block):
    """Every weight lies within its cell, and the error is spread over it evenly."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 48, generator=generator)
    rows, columns = block or weight.shape
    stored = weight.clone()
    for i in range(0, 16, rows):
        for j in range(0, 48, columns):
            part = (slice(i, i + rows), slice(j, j + columns))
            scale = weight[part].abs().max() / 448
            stored[part] = (weight[part] / scale).to(torch.float8_e4m3fn).float() * scale
    width = cells(stored, block)
    error = (stored - weight) / width
    # A weight that was rounded up to a power of two comes from a cell half as wide: none is wider.
    assert float(error.abs().max()) <= 0.5 + 1e-5
    assert float(error.square().mean()) == pytest.approx(1 / 12, rel=0.15)


def test_other_weights_are_on_no_grid():
    plain = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert cells(plain, None) is None
    plain[0, 0] = 1e6
    assert cells(plain, None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [2.0**-9, 1.1 / 448 * 0.02, 0.00037])
def test_any_scale_is_found(dtype, scale):
    """Powers of two, a scale with room above the largest weight, any other; in every precision."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.005 * torch.randn(256, 192, generator=generator)
    stored = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    width = cells(stored.to(dtype), (128, 128))
    error = ((stored - weight) / width.float()).abs()
    assert float((error <= 0.55).float().mean()) > 0.98  # but those below the least normal number
    assert float(error[error <= 0.55].square().mean()) == pytest.approx(1 / 12, rel=0.15)
    experts = cells(torch.stack([stored, stored]).to(dtype), (128, 128))
    assert torch.equal(experts[1], width)


def test_two_matrices_that_were_joined_have_a_scale_each():
    generator = torch.Generator().manual_seed(0)
    halves = []
    for scale in (0.001, 0.00037):
        weight = torch.randn(32, 48, generator=generator)
        halves.append((weight / scale / 20).to(torch.float8_e4m3fn).float() * scale)
    width = cells(torch.cat(halves), None)
    assert torch.equal(width, torch.cat([cells(half, None) for half in halves]))


@pytest.fixture
def folders(tmp_path):
    """A base whose blocks are float8, the model that it was made from, and a fine-tune."""
    folder = tiny.save_request(tmp_path, n_documents=24)
    (folder / "original").mkdir()
    for path in (folder / "base").iterdir():
        (folder / "original" / path.name).write_bytes(path.read_bytes())
    store_as_float8(folder / "base")
    return folder


def test_the_noise_is_as_large_as_what_storing_the_weights_really_did(folders):
    pair = ModelPair.load(folders / "base", folders / "original")
    assert FLOAT8[pair.base_runner.model] == (128, 128)
    corpus = pair.corpus(tiny.make_documents(24))
    batch = corpus.together(some_of(corpus.encoded, "all"))
    rows, share = quantisation_rows(pair.base_runner, batch, ("post_mlp", "post_block"))
    assert share == 1
    assert len(rows) == 2 * 2 * tiny.N_LAYERS
    spectrum = diagnose(pair, tiny.make_documents(24), OPTIONS, show_progress=False).spectrum.frame
    for row in rows:
        mode = row["mode"].removesuffix("_quantised")
        labels = f"layer == {row['layer']} and location == {row['location']!r} and mode == {mode!r}"
        (real,) = spectrum.query(labels).relative_rms
        assert row["noise_relative"] == pytest.approx(real, rel=0.5), row


def test_a_run_says_whether_its_deltas_stand_above_it(folders):
    """Against the model that it was made from the whole delta is that noise."""
    pair = ModelPair.load(folders / "base", folders / "original")
    run = diagnose(pair, tiny.make_documents(24), OPTIONS, show_progress=False)
    (found,) = [c for c in run.checks if c.name == "quantisation of the base"]
    assert found.status == "failed"
    assert set(run.tables["noise"].frame["mode"]) == {
        "free", "forced", "free_quantised", "forced_quantised"
    }  # fmt: skip
    assert "float8" in run.tables["noise"].finding()
    drawn = [
        artist.get_label() for axes in run.spectrum.plot(run.noise).axes
        for artist in axes.get_children()
    ]  # fmt: skip
    assert "noise of float8 weights" in drawn
    run.tables["noise"].plot()


def test_a_fine_tune_of_the_same_float8_weights_is_not_touched(folders):
    """Some matrix is as it was: that noise is in both models."""
    base = load_model(folders / "base", torch.float32)
    base.model.layers[0].mlp.down_proj.weight.data += 0.1
    base.save_pretrained(folders / "began")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folders / "began" / name).write_bytes((folders / "base" / name).read_bytes())
    pair = ModelPair.load(folders / "base", folders / "began")
    run = diagnose(pair, tiny.make_documents(24), OPTIONS, show_progress=False)
    assert not [c for c in run.checks if c.name == "quantisation of the base"]


def test_weights_on_no_grid_are_said(folders):
    pair = ModelPair.load(folders / "original", folders / "tuned")
    FLOAT8[pair.base_runner.model] = (128, 128)
    run = diagnose(pair, tiny.make_documents(24), OPTIONS, show_progress=False)
    (found,) = [c for c in run.checks if c.name == "quantisation of the base"]
    assert found.status == "not applicable"
    assert "no grid" in found.detail


def test_plain_models_have_none(tmp_path):
    folder = tiny.save_request(tmp_path, n_documents=24)
    pair = ModelPair.load(folder / "base", folder / "tuned")
    run = diagnose(pair, tiny.make_documents(24), OPTIONS, show_progress=False)
    assert not [c for c in run.checks if c.name == "quantisation of the base"]
    assert set(run.tables["noise"].frame["mode"]) == {"free", "forced"}

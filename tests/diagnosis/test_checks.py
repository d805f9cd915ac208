"""Checks of a run: the noise of the precision, enough tokens, blocks before the first change."""

import pandas as pd
import pytest

from tests.support import tiny
from toolkit import ModelPair
from toolkit.diagnosis.checks import check_noise, check_tokens, check_upstream, first_changed_block


def spectra(relative_rms, rms=1.0, location="post_mlp", mode="forced"):
    rows = [
        {"layer": i, "location": location, "mode": mode, "rms": rms, "relative_rms": r}
        for i, r in enumerate(relative_rms)
    ]
    return pd.DataFrame(rows)


def test_a_delta_near_the_noise_fails():
    noise = spectra([0.1, 0.1]).assign(noise_relative=1e-3).drop(columns=["rms", "relative_rms"])
    assert check_noise(spectra([0.1, 0.1]), noise).status == "passed"
    failed = check_noise(spectra([0.1, 0.002]), noise)
    assert failed.status == "failed"
    for words in ("2 times", "block 1", "post_mlp", "forced", "1 of 2"):
        assert words in failed.detail
    assert check_noise(spectra([0.0, 0.0], rms=0.0), noise).status == "not applicable"
    said = check_noise(spectra([0.1]), noise[:0], "no kernel")
    assert (said.status, said.detail) == ("not applicable", "no kernel")


def test_ten_tokens_a_dimension():
    assert check_tokens(160, 16).status == "passed"
    assert check_tokens(159, 16).status == "failed"


@pytest.mark.parametrize("layer", range(tiny.N_LAYERS))
def test_the_first_changed_block_is_found(layer, tokenizer):
    base = tiny.make_model("llama")
    tuned = tiny.copy_of(base)
    assert first_changed_block(ModelPair.from_models(base, tuned, tokenizer)) is None
    for block in tiny.blocks_of(tuned)[layer:]:
        block.mlp.up_proj.weight[0, 0] += 1e-9
    pair = ModelPair.from_models(base, tuned, tokenizer)
    assert first_changed_block(pair) == layer
    tuned.get_input_embeddings().weight[3, 3] += 1
    assert first_changed_block(pair) == -1


def test_upstream_must_be_zero():
    frame = spectra([0.0, 0.1], location="post_block", mode="free").assign(rms=[0.0, 1.0])
    assert check_upstream(frame, 1).status == "passed"
    assert check_upstream(frame.assign(rms=[1e-9, 1.0]), 1).status == "failed"
    assert check_upstream(frame, 0).status == "not applicable"
    assert check_upstream(frame, -1).status == "not applicable"
    assert check_upstream(frame, None).status == "failed"
    assert check_upstream(frame.assign(rms=0.0), None).status == "passed"

"""Checks of a run: the noise of the precision, enough tokens, blocks before the first change."""

import pandas as pd
import pytest
import torch

from tests import tiny
from toolkit import ModelPair
from toolkit.documents import encode_all, make_batches
from toolkit.validity import (
    check_noise,
    check_tokens,
    check_upstream,
    first_changed_block,
    noise_floor,
)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_noise_of_half_precision_is_near_its_epsilon(family, tokenizer):
    """Within a factor of 10 either way; that of float32 is 10⁴ times smaller and not nothing."""
    floors = {}
    for dtype in (torch.bfloat16, torch.float32):
        pair = tiny.make_pair(family, dtype, tokenizer)
        batch = make_batches(encode_all(tiny.make_documents(8), tokenizer))[0]
        floors[dtype] = noise_floor(pair.base_blocks, batch)
    assert len(floors[torch.bfloat16]) == tiny.N_LAYERS
    for coarse, fine in zip(*floors.values(), strict=True):
        assert 0.1 < coarse / torch.finfo(torch.bfloat16).eps < 10
        assert 0 < fine < 1e-3 * coarse


def spectra(relative_rms, rms=1.0):
    rows = [
        {"layer": i, "location": "post_block", "mode": "free", "rms": rms, "relative_rms": r}
        for i, r in enumerate(relative_rms)
    ]
    return pd.DataFrame(rows)


def test_a_delta_near_the_noise_fails():
    floor = [1e-3, 1e-3]
    assert check_noise(spectra([0.1, 0.1]), floor).status == "passed"
    failed = check_noise(spectra([0.1, 0.002]), floor)
    assert failed.status == "failed"
    assert "2 times" in failed.detail
    assert "block 1" in failed.detail
    assert check_noise(spectra([0.0, 0.0], rms=0.0), floor).status == "not applicable"


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
    frame = spectra([0.0, 0.1]).assign(rms=[0.0, 1.0])
    assert check_upstream(frame, 1).status == "passed"
    assert check_upstream(frame.assign(rms=[1e-9, 1.0]), 1).status == "failed"
    assert check_upstream(frame, 0).status == "not applicable"
    assert check_upstream(frame, -1).status == "not applicable"
    assert check_upstream(frame, None).status == "failed"
    assert check_upstream(frame.assign(rms=0.0), None).status == "passed"

"""Check that what is read of a block is what its modules compute, or is not read."""

import pytest
import torch
from torch import nn

from tests.support import families, tiny
from toolkit import ModelPair, Options, diagnose
from toolkit.blocks.parts import BlockPartsReader

TEXTS = [" ".join(f"w{5 + (3 * i * j) % 50}" for j in range(8 + i)) for i in range(1, 9)]


class Multiplied(nn.Module):
    """An activation with a factor that no configuration names."""

    def forward(self, x):
        return 1.01 * nn.functional.silu(x)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_an_mlp_that_is_not_what_its_matrices_say_is_found(llama_pair, side):
    batch = llama_pair.corpus(TEXTS).fit_batches[0]
    assert BlockPartsReader(llama_pair, batch).has_sublayers
    getattr(llama_pair, side).model.layers[1].mlp.act_fn = Multiplied()
    with pytest.raises(
        ValueError, match=r"MLP of block 1 \(LlamaMLP\) is not .* difference .*e-03"
    ):
        BlockPartsReader(llama_pair, batch)


@pytest.mark.parametrize("family", ["apertus", "bitnet"])
def test_tables_of_such_mlps_are_left_out(family, tmp_path):
    """A learned activation; a norm before the down projection."""
    families.save_pair(family, tmp_path, vectors=0.3)
    pair = ModelPair.load(tmp_path / "base", tmp_path / "tuned")
    options = Options(new_tokens=3, sample=2, shared_sample=8, max_prompts=2)
    run = diagnose(pair, TEXTS, options, show_progress=False)
    assert run.first_order.frame.empty
    (said,) = [check for check in run.checks if check.name == "location mlp"]
    assert said.status == "not applicable"
    assert "as read" in said.detail


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "neox", "phi3", "opt"])
def test_mlps_of_plain_families_are_read(family, tokenizer):
    pair = tiny.make_pair(family, torch.float32, tokenizer)
    BlockPartsReader(pair, pair.corpus(TEXTS).fit_batches[0])

"""Blocks read from disk when they are reached: the same bits, with one block in memory."""

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.support import tiny
from toolkit import InputError, ModelPair, Options, diagnose
from toolkit.models.weight_files import WeightFiles

OPTIONS = Options(new_tokens=3, sample=1, shared_sample=8, max_prompts=2)
DOCUMENTS = tiny.make_documents(14)
FAMILIES = ("llama", "gemma3", "qwen3", "gpt2", "neox", "mixtral")  # its experts lie one by one


def save_pair(folder, family, dtype=torch.float32):
    """The pair's folders, as `ModelPair.load` takes them."""
    tiny.save_pair(folder, family, dtype)
    return folder / "base", folder / "tuned"


def with_adapter(folder):
    base = save_pair(folder, "llama")[0]
    model = tiny.make_model("llama", torch.float32)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    lora.peft_config["default"].base_model_name_or_path = str(base)
    lora.save_pretrained(folder / "lora")
    return base, folder / "lora"


def blocks_on_meta(blocks):
    """By block, whether none of its stored weights is in memory."""
    named = [dict(block.named_parameters()) for block in blocks.sites.blocks]
    return [
        all(p.is_meta for name, p in parameters.items() if "lora_" not in name)
        for parameters in named
    ]


def assert_same_run(pair, offloaded):
    assert pair.hashes == offloaded.hashes
    ours, theirs = (diagnose(p, DOCUMENTS, OPTIONS, show_progress=False) for p in (offloaded, pair))
    for a, b in zip(ours.tables.values(), theirs.tables.values(), strict=True):
        # Weights that come from disk are not changed, and a check says so.
        kept = b.frame[b.frame.kind != "lora"] if "kind" in b.frame else b.frame
        frames = a.frame, kept.reset_index(drop=True)
        pd.testing.assert_frame_equal(*frames, check_exact=True, obj=a.name)
    checks = [c.status for c in ours.checks if c.name != "location lora"]
    assert checks == [c.status for c in theirs.checks]
    assert len(checks) == len(ours.checks) - 1
    for blocks in (offloaded.base_runner, offloaded.tuned_runner):
        assert all(blocks_on_meta(blocks))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_from_disk_is_the_run_from_memory(tmp_path, family):
    folders = save_pair(tmp_path, family)
    assert_same_run(*(ModelPair.load(*folders, offload=offload) for offload in (False, True)))


def test_half_precision_files_run_in_float32(tmp_path):
    folders = save_pair(tmp_path, "llama", torch.bfloat16)
    assert_same_run(*(ModelPair.load(*folders, offload=offload) for offload in (False, True)))


def test_an_adapter_and_its_base_read_the_same_tensors(tmp_path):
    folders = with_adapter(tmp_path)
    pair = ModelPair.load(*folders, offload=True)
    assert_same_run(ModelPair.load(*folders), pair)
    with pair.resident(1):
        ours = dict(pair.base_runner.sites.blocks[1].named_parameters())
        for name, theirs in pair.tuned_runner.sites.blocks[1].named_parameters():
            plain = name.replace(".base_layer", "")
            if plain in ours:
                assert theirs.data_ptr() == ours[plain].data_ptr()


def test_one_block_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """In whole passes each block's own weights; in the march both models' block, read once."""
    pair = ModelPair.load(*save_pair(tmp_path, "llama"), offload=True)
    reads, most = [], 0
    original = WeightFiles.__getitem__

    def read(self, name):
        nonlocal most
        reads.append(name)
        resident = [blocks_on_meta(b) for b in (pair.base_runner, pair.tuned_runner)]
        most = max(most, *(n_layers - sum(found) for found, n_layers in
                           ((found, len(found)) for found in resident)))  # fmt: skip
        return original(self, name)

    monkeypatch.setattr(WeightFiles, "__getitem__", read)
    diagnose(pair, DOCUMENTS, OPTIONS, show_progress=False)
    assert most == 1
    reads.clear()
    with pair.resident(0):
        n_once = len(reads)
        pair.base_runner.run(0, *_call(pair), ())
        assert len(reads) == n_once > 0


def _call(pair):
    from toolkit.documents.batches import make_batches
    from toolkit.documents.tokens import encode_all

    batch = make_batches(encode_all(DOCUMENTS, pair.tokenizer))[0]
    return pair.base_runner.call(0, batch), pair.base_runner.embed(batch)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    base, tuned = save_pair(tmp_path, "llama")
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    kept = {n: t for n, t in tensors.items() if n != name}
    save_file(kept, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=name):
        ModelPair.load(base, tuned, offload=True)
    (base / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        ModelPair.load(base, tuned, offload=True)

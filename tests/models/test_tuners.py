"""Every kind of adapter that PEFT has, found from the package: right, or refused in one line."""

from dataclasses import fields

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file

from tests.support import tiny
from toolkit import InputError, ModelPair
from toolkit.diagnosis.weight_rows import weight_rows
from toolkit.models.loading import load_model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WANTED = {
    "task_type": "CAUSAL_LM", "target_modules": LINEAR, "r": 4, "feedforward_modules": [],
    "num_virtual_tokens": 3, "token_indices": [8, 9], "total_step": 10, "adapter_len": 2,
    "adapter_layers": 2, "oft_block_size": 0, "boft_block_size": 4, "n_frequency": 20,
    "block_size": 4, "group_size": 8, "num_vectors": 8, "vector_length": 8,
    "encoder_hidden_size": 8, "num_tasks": 1, "theta_d_length": 32,
}  # fmt: skip
OWN = {
    "VERA": {"target_modules": ["q_proj", "o_proj"]},
    "PVERA": {"target_modules": ["q_proj", "o_proj"]},
    "OFT": {"r": 0, "oft_block_size": 8},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"]},
}
REFUSED = {
    "ADAPTION_PROMPT", "PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING",
    "CPT", "CARTRIDGE", "LILY", "POLY", "SHADOW", "XLORA",
}  # fmt: skip
NOT_OFFLOADED = {"FROD", "OSF", "PSOFT", "TINYLORA"}  # made of the weights of their base
IDS = torch.tensor([[8, 9, 10, 11, 12, 13]])


def made(kind, base):
    """`base` with a random adapter of a kind; skips what this PEFT cannot make of it."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {field.name for field in fields(config)}
    options = {k: v for k, v in {**WANTED, **OWN.get(kind.value, {})}.items() if k in known}
    try:
        tuned = get_peft_model(base, config(**options))
    except Exception as error:  # whatever a kind asks for beside
        pytest.skip(f"PEFT makes no {kind.value} here: {error}")
    generator = torch.Generator().manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return tuned


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(PEFT_TYPE_TO_CONFIG_MAPPING), ids=lambda kind: kind.value)
def test_every_kind_is_right_or_refused(kind, tmp_path):
    """Logits are those of PEFT on its own, the base is as it was, and its weights have rows."""
    folders = tiny.save_request(tmp_path)
    tuned = made(kind, load_model(folders / "base", torch.float32))
    tuned.peft_config["default"].base_model_name_or_path = str(folders / "base")
    tuned.save_pretrained(folders / "adapter")
    if kind.value in REFUSED:
        with pytest.raises(InputError):
            ModelPair.load(folders / "base", folders / "adapter")
        return
    pair = ModelPair.load(folders / "base", folders / "adapter")
    if kind.value not in NOT_OFFLOADED:
        offloaded = ModelPair.load(folders / "base", folders / "adapter", offload=True)
        for ours, theirs in ((pair.base, offloaded.base), (pair.tuned, offloaded.tuned)):
            assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    else:
        with pytest.raises(InputError, match="offload"):
            ModelPair.load(folders / "base", folders / "adapter", offload=True)
    plain = PeftModel.from_pretrained(load_model(folders / "base"), folders / "adapter").eval()
    assert torch.allclose(pair.tuned(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-5)
    stored = load_file(folders / "base" / "model.safetensors")
    assert all(torch.equal(dict(pair.base.named_parameters())[k], v) for k, v in stored.items())
    assert weight_rows(pair.base_runner, pair.tuned_runner)

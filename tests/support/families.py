"""Tiny random models of many families, and what the toolkit makes of each.

    python -m tests.support.families

writes docs/families.md: a row for each, with the versions that it was made with.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support import tiny
from toolkit import InputError, ModelPair
from toolkit.models.loading import auto_class
from toolkit.models.locations import BRANCHES, of_blocks
from toolkit.runtime.provenance import versions

HEAD = """# Families

What loading a tiny random pair of each family gives; the proofs at load run on it. *Works*: every
location. *In part*: without the locations that are named; deltas and adapters after the block are
always served. *Refused*: in one line, with this reason. Models of images and text load as the
language models in them.

Made by `python -m tests.support.families` with torch {torch}, transformers {transformers}.
"""
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
SMALL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.1,
    "max_position_embeddings": 128, "sliding_window": 8, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_chunk_size": 8, "shared_intermediate_size": 16, "state_size": 8,
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention"]
OWN: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "rwkv": {"attention_hidden_size": 32},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3},
    "granite": {"residual_multiplier": 0.5},
    "gptj": {"rotary_dim": 4},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "gemma3n_text": {"num_hidden_layers": 4, "intermediate_size": [64] * 4,
                     "num_kv_shared_layers": 2, "layer_types": SLIDING * 2,
                     "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 60,
                     "laurel_rank": 4, "altup_num_inputs": 2,
                     "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": SLIDING * 2,
                    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 60},
    "t5": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
}  # fmt: skip
TEXT = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3",
    "granite", "smollm3", "glm4", "stablelm", "starcoder2", "gpt2", "gpt_neox", "gptj", "opt",
    "bloom", "mpt", "falcon", "mixtral", "qwen3_moe", "mamba", "mamba2", "jamba",
    "modernbert-decoder", "recurrent_gemma", "rwkv", "gemma3n_text", "gemma4_text", "t5",
)  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
          "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
WRAPPED = {"gemma3": ("gemma3_text", "siglip_vision_model"), "mistral3": ("mistral", "pixtral"),
           "llava": ("llama", "clip_vision_model")}  # fmt: skip


def config_of(name: str) -> Any:
    """Make a tiny configuration of a family."""
    if name in WRAPPED:
        text, vision = WRAPPED[name]
        parts = {
            "text_config": config_of(text),
            "vision_config": CONFIG_MAPPING[vision](**VISION),
            "image_token_index": 59,
        }
        if name == "gemma3":
            parts["mm_tokens_per_image"] = 1
        return CONFIG_MAPPING[name](**parts)
    kind = CONFIG_MAPPING[name]
    default = kind()
    known = getattr(kind, "attribute_map", {})
    fields = {k: v for k, v in SMALL.items() if of_blocks(default, k) or k in known}
    fields = {k: v for k, v in fields.items() if not isinstance(getattr(kind, k, None), property)}
    if "qk_rope_head_dim" in fields and "qk_nope_head_dim" in fields:
        fields.pop("head_dim", None)
    fields |= OWN.get(name, {})
    return kind(
        **{k: v for k, v in fields.items() if v is not None or getattr(default, k, 0) is None}
    )


def save_pair(name: str, folder: Path, vectors: float = 0.0) -> None:
    """Save a random base model of a family, and one beside it with other blocks, in `folder`.

    `vectors` is how far norms, biases and factors are moved from where they start.
    """
    config = config_of(name)
    auto = AutoModelForSeq2SeqLM if name == "t5" else auto_class(config)
    torch.manual_seed(0)
    model = auto.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.ndim < 2 and vectors:
            parameter.data += vectors * torch.randn_like(parameter)
    tokenizer = tiny.make_tokenizer()
    for side in ("base", "tuned"):
        model.save_pretrained(folder / side)
        tokenizer.save_pretrained(folder / side)
        for path, parameter in model.named_parameters():
            if re.search(r"\.(layers|h|blocks|block)\.\d+\.", path) and "vision" not in path:
                spread = parameter.std() if parameter.numel() > 1 else parameter.abs()
                parameter.data += 0.1 * spread * torch.randn_like(parameter)


def outcome(name: str, folder: Path) -> tuple[str, str]:
    """Load the family's pair: it works, in part or is refused, and what it lacks or why."""
    save_pair(name, folder)
    try:
        pair = ModelPair.load(folder / "base", folder / "tuned")
    except InputError as error:
        return "refused", " ".join(str(error).replace(f"{folder}/", "").split())
    lacking = [place for place in ("heads", *BRANCHES, "mlp_in") if place in pair.unavailable]
    anew = any(c.name.startswith("cached") and c.status != "passed" for c in pair.checks)
    notes = [f"without {', '.join(lacking)}"] if lacking else []
    notes += ["every token is read anew, without a cache"] if anew else []
    return ("in part" if lacking else "works"), "; ".join(notes)


def rows() -> list[tuple[str, str, str]]:
    """Return every family with its outcome and the reason."""
    found = []
    for name in (*TEXT, *WRAPPED):
        with tempfile.TemporaryDirectory() as folder:
            found.append((name, *outcome(name, Path(folder))))
    return found


def page() -> str:
    """Return the page docs/families.md."""
    lines = [HEAD.format(**versions()), "| family | outcome | what |", "|---|---|---|"]
    lines += [f"| `{name}` | {kind} | {what} |" for name, kind, what in rows()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

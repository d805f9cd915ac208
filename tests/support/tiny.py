"""Tiny real architectures from configs, tokenizers in memory, and documents for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from toolkit import ModelPair

PAD, EOS, UNKNOWN = 0, 1, 2
N_VOCABULARY, N_LAYERS, D_MODEL, D_FF = 60, 3, 16, 40
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user> ' if message.role == 'user' else '<assistant> ' }}{{ message.content }} "
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)

_SHARED = {
    "vocab_size": N_VOCABULARY,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_MODERN = {
    **_SHARED,
    "hidden_size": D_MODEL,
    "intermediate_size": D_FF,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_HEADS = {**_MODERN, "head_dim": 8}
_LOCAL = {
    **_HEADS,
    "sliding_window": 8,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
}
_GPT2 = {"n_embd": D_MODEL, "n_inner": D_FF, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 128}
_NEOX = {k: v for k, v in _MODERN.items() if k != "num_key_value_heads"}
_OPT = {k: v for k, v in _NEOX.items() if k not in ("intermediate_size", "initializer_range")}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_MODERN),
    "gemma2": lambda: Gemma2Config(**_LOCAL, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(**_LOCAL, query_pre_attn_scalar=8),
    "qwen3": lambda: Qwen3Config(**_HEADS),
    "olmo2": lambda: Olmo2Config(**_MODERN),
    "phi3": lambda: Phi3Config(**_MODERN),
    "gpt2": lambda: GPT2Config(**_SHARED, **_GPT2),
    "neox": lambda: GPTNeoXConfig(**_NEOX),
    "opt": lambda: OPTConfig(**_OPT, ffn_dim=D_FF, word_embed_proj_dim=D_MODEL, init_std=0.2),
    "falcon": lambda: FalconConfig(**_NEOX, parallel_attn=True, alibi=False),
    "mixtral": lambda: MixtralConfig(**_MODERN, num_local_experts=3, num_experts_per_tok=2),
    "granite": lambda: GraniteConfig(**_MODERN, residual_multiplier=0.5),
}


def make_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.nn.Module:
    """A random model whose biases and norms are random too, so that nothing cancels by luck."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval().requires_grad_(False)


def blocks_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The model's blocks, by the first of the names that families give them."""
    for path in ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers"):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(type(model).__name__)


def tune(model: torch.nn.Module, size: float = 0.25, seed: int = 1) -> torch.nn.Module:
    """A copy of `model` with every weight of its blocks changed by `size` of its own spread."""
    tuned = copy_of(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in blocks_of(tuned).parameters():
        change = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        spread = parameter.double().std() if parameter.ndim > 1 else 0.1
        parameter.data += (size * spread * change).to(parameter.dtype)
    return tuned


def copy_of(model: torch.nn.Module) -> torch.nn.Module:
    """A model of its own with the same weights."""
    twin = type(model)(model.config).to(model.dtype)
    twin.load_state_dict(model.state_dict())
    return twin.eval().requires_grad_(False)


def make_pair(family: str, dtype: torch.dtype, tokenizer: Any, **change: Any) -> ModelPair:
    base = make_model(family, dtype)
    return ModelPair.from_models(base, tune(base, **change), tokenizer)


def save_pair(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    names: tuple[str, str] = ("base", "tuned"),
) -> Path:
    """A pair's two folders in `folder`, with a tokenizer each."""
    tokenizer, base = make_tokenizer(), make_model(family, dtype)
    for name, model in zip(names, (base, tune(base)), strict=True):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def save_request(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    n_documents: int = 20,
    names: tuple[str, str] = ("base", "tuned"),
) -> Path:
    """What a command needs: `save_pair`, and documents."""
    lines = [json.dumps(document) for document in make_documents(n_documents)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return save_pair(folder, family, dtype, names)


def make_tokenizer(chat: bool = False, n_tokens: int = N_VOCABULARY) -> PreTrainedTokenizerFast:
    """Words w5, w6, ... for tokens 5, 6, ...; without special tokens at either end."""
    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
    words = special + [f"w{i}" for i in range(len(special), n_tokens)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def random_text(rng: np.random.Generator, n_words: int) -> str:
    return " ".join(f"w{i}" for i in rng.integers(5, N_VOCABULARY, n_words))


def make_documents(n: int = 30, longest: int = 24, seed: int = 0) -> list[dict[str, str]]:
    """Texts, and prompts with responses, of various lengths."""
    rng = np.random.default_rng(seed)
    documents: list[dict[str, str]] = []
    for index in range(n):
        first, second = rng.integers(3, longest // 2 + 1, 2)
        if index % 3:
            documents.append({"text": random_text(rng, first + second)})
        else:
            pair = {"prompt": random_text(rng, first), "response": random_text(rng, second)}
            documents.append(pair)
    return documents

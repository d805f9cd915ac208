"""Makes data/published/parameter_counts.csv: sizes of the post's methods, from configurations.

python recipes/parameter_counts.py
"""

from pathlib import Path

import pandas as pd
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

from toolkit.training.counts import adapter_parameters, lora_parameters, model_parameters
from toolkit.training.methods import Method

OUT = Path(__file__).parent.parent / "data" / "published" / "parameter_counts.csv"
CONFIGS = {
    "Llama-3.2-1B": LlamaConfig(
        num_hidden_layers=16,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "gemma-3-1b": Gemma3TextConfig(
        num_hidden_layers=26,
        hidden_size=1152,
        intermediate_size=6912,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=262144,
    ),
    "Qwen3-4B": Qwen3Config(
        num_hidden_layers=36,
        hidden_size=2560,
        intermediate_size=9728,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
}
METHODS = {
    "ReFT": Method("ReFT", "loreft", "post_mlp", 8),
    "post-block non-linear": Method("non-linear", "nonlinear", "post_block", 8),
    "post-block linear": Method("linear", "linear", "post_block", 8),
    "post-block vector": Method("vector", "vector", "post_block"),
    "post-block r=1": Method("linear", "linear", "post_block", 1),
}


def main() -> None:
    rows = []
    for model, config in CONFIGS.items():
        whole = model_parameters(config)
        counts = {"SFT": whole, "LoRA": lora_parameters(config, 8)}
        counts |= {name: adapter_parameters(config, method) for name, method in METHODS.items()}
        rows += [
            {"model": model, "method": name, "parameters": n, "percent": round(100 * n / whole, 4)}
            for name, n in counts.items()
        ]
    pd.DataFrame(rows).to_csv(OUT, index=False, lineterminator="\n")


if __name__ == "__main__":
    main()

"""Makes data/published/parameter_counts.csv: sizes of the post's methods, from configurations.

python data/recipes/parameter_counts.py
"""

from pathlib import Path

import pandas as pd

from toolkit.theory.published import CONFIGS
from toolkit.training.counts import adapter_parameters, lora_parameters, model_parameters
from toolkit.training.methods import Method

OUT = Path(__file__).parent.parent / "published" / "parameter_counts.csv"
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

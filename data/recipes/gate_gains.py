"""Makes data/gate-gains: how large ``|σ'(a_g) ⊙ a_u|`` and ``|σ(a_g)|`` are in two families.

    python data/recipes/gate_gains.py --out data/gate-gains

The base models SmolLM2-135M-Instruct (Llama's blocks, SiLU) and Gemma-3-270m (GELU) read the first
documents of gsm8k-demo.jsonl; every neuron of every block counts once at every token but each
document's first. Written are histogram.csv (sizes by block and quantity, in bins of a tenth of a
power of ten; a bin without counts has no row), quantiles.csv (read off these bins) and
provenance.json. A minute and a half on one core.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from toolkit.blocks.read import mlps
from toolkit.documents.batches import Batch, make_batches
from toolkit.documents.documents import read_documents
from toolkit.documents.tokens import encode_all
from toolkit.models.hooks import capture
from toolkit.models.loading import load_model, load_tokenizer
from toolkit.models.locations import resolve
from toolkit.runtime.console import quiet_transformers
from toolkit.runtime.provenance import stamp
from toolkit.runtime.records import write_json
from toolkit.runtime.shipped import BASE, PROMPTS, shipped
from toolkit.statistics import SizeCounts
from toolkit.statistics.gate_gains import QUANTITIES, gate_gains

BASES = {"smollm2": BASE, "gemma3": "gemma-3-270m"}
QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
BATCH_TOKENS = 512

Counts = dict[tuple[int, str], SizeCounts]


@torch.no_grad()
def count(model: torch.nn.Module, batches: list[Batch]) -> Counts:
    """The gains of every block of `model`, by (layer, quantity)."""
    sites = resolve(model)
    blocks = [mlp for mlp, _ in mlps(model, model)]
    found = {(layer, name): SizeCounts() for layer in range(len(blocks)) for name in QUANTITIES}
    inputs = {str(layer): sites.at["mlp_in", layer] for layer in range(len(blocks))}
    for batch in batches:
        with capture(inputs) as states:
            model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
        for layer, mlp in enumerate(blocks):
            a_g, a_u = mlp.inner(states[str(layer)][batch.counted])
            for name, sizes in gate_gains(*mlp.slopes(a_g), a_u).items():
                found[layer, name].update(sizes)
    return found


def histogram_rows(family: str, counts: Counts) -> list[dict[str, Any]]:
    """A row for each bin with counts; a bin is ``[10 ** log10_low, 10 ** log10_high)``."""
    rows = []
    for (layer, name), sizes in counts.items():
        histogram = sizes.result()
        bounds = [-np.inf, *histogram.edges, np.inf]
        rows += [
            {
                "family": family,
                "layer": layer,
                "quantity": name,
                "log10_low": bounds[bin_],
                "log10_high": bounds[bin_ + 1],
                "count": histogram.counts[bin_],
            }
            for bin_ in np.flatnonzero(histogram.counts)
        ]
    return rows


def quantile_rows(family: str, counts: Counts) -> list[dict[str, Any]]:
    rows = []
    for (layer, name), sizes in counts.items():
        histogram = sizes.result()
        row = {"family": family, "layer": layer, "quantity": name}
        rows.append(row | {q: histogram.quantile(share) for q, share in QUANTILES.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the files")
    parser.add_argument("--documents", type=int, default=12)
    args = parser.parse_args()
    documents = read_documents(shipped(PROMPTS))[: args.documents]
    histogram, quantiles, tokens = [], [], {}
    started = time.perf_counter()
    for family, base in BASES.items():
        with quiet_transformers():
            model, tokenizer = load_model(base, torch.float32), load_tokenizer(base)
        encoded = encode_all(documents, tokenizer)
        batches = make_batches(encoded, "all", BATCH_TOKENS, tokenizer.pad_token_id or 0)
        counts = count(model, batches)
        tokens[family] = sum(int(batch.counted.sum()) for batch in batches)
        histogram += histogram_rows(family, counts)
        quantiles += quantile_rows(family, counts)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "bases": BASES,
        "data": Path(PROMPTS).name,
        "documents": len(documents),
        "tokens": tokens,
        **stamp(started),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("histogram", histogram), ("quantiles", quantiles)):
        path = args.out / f"{name}.csv"
        pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
    write_json(record, (args.out / "provenance.json"))


if __name__ == "__main__":
    main()

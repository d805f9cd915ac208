"""Makes data/theory/learning-rates: does distillation's rate, 1.6 over the width, hold as d grows?

    python data/recipes/learning_rates.py --out data/theory/learning-rates

Models of two blocks with random weights, of widths 160 to 4,096, each with a tuned model: the same
with a random change of rank 2 to every down projection. Adapters of rank 8 after the block are
distilled from the identity, for as many steps at every rate, and judged on held-out documents.

Written are OUT.csv, a row for each width and rate, and OUT.json. About half an hour on two
cores for the widest, ten minutes for the others.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toolkit.adapters.attach import steer
from toolkit.documents.corpus import Corpus
from toolkit.models.locations import mlp_projections
from toolkit.models.pair import ModelPair
from toolkit.runtime.progress import progress
from toolkit.runtime.provenance import stamp
from toolkit.runtime.records import write_json
from toolkit.training.distillation import RATE, distil, divergences, rows_of
from toolkit.training.examples import collate
from toolkit.training.methods import Method
from toolkit.training.trainer import TrainingOptions

WIDTHS = (160, 512, 1024, 2048, 4096)
FACTORS = (1 / 9, 1 / 3, 1, 3, 9)  # of the default rate
N_WORDS, LENGTH, N_DOCUMENTS = 256, 33, 200
STEPS, BATCH = 50, 8
CHANGE = 0.5  # over the root of 2, of a down projection in the Frobenius norm
METHOD = Method("post-block linear r=8", "linear", "post_block", 8)


def random_model(d: int, seed: int) -> nn.Module:
    """Make a Llama of two blocks whose states keep their scale from matrix to matrix."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=N_WORDS, hidden_size=d, intermediate_size=2 * d, num_hidden_layers=2,
        num_attention_heads=d // 32, max_position_embeddings=LENGTH, initializer_range=d**-0.5,
        bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@torch.no_grad()
def tuned_of(base: nn.Module, d: int, seed: int) -> nn.Module:
    """Return a copy whose down projections have another ``U V W_d`` of rank 2 added."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    for projections in mlp_projections(tuned):
        weight: Any = projections["down"].weight
        u, v = (torch.linalg.qr(torch.randn(d, 2, generator=generator))[0] for _ in range(2))
        weight += CHANGE * weight.norm() / 2**0.5 * u @ (v.T @ weight) / (v.T @ weight).norm()
    return tuned


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of the words w0 to w253 and an end."""
    words = {"</s>": 0, "<pad>": 1} | {f"w{i}": i + 2 for i in range(N_WORDS - 2)}
    made = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")


def documents(seed: int) -> list[str]:
    """Draw documents of random words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(N_WORDS - 2, (N_DOCUMENTS, LENGTH), generator=generator)
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


@torch.no_grad()
def kl(pair: ModelPair, corpus: Corpus) -> float:
    """Measure KL(tuned ‖ base) in nats a token on held-out documents."""
    rows = rows_of([d for d in corpus.encoded if d.held_out])
    batch = collate(rows, corpus.pad_id)
    return float(divergences(pair.tuned, pair.base, batch)[0].mean())


def rows_at(d: int, factors: list[float], seed: int, step_on: Any) -> list[dict[str, Any]]:
    """Distil at every rate at width `d`, and return a row for each."""
    base = random_model(d, seed)
    pair = ModelPair.from_models(base, tuned_of(base, d, seed), tokenizer())
    corpus = pair.corpus(documents(seed))
    before, found = kl(pair, corpus), []
    for factor in factors:
        rate = factor * RATE / d
        options = TrainingOptions(rate, batch_size=BATCH, max_steps=STEPS, seed=seed, patience=99)
        done = distil(pair, corpus, METHOD, options, sampled=())
        with steer(pair.base, done.adapters):
            left = kl(pair, corpus)
        numbers = {"kl_base": before, "kl": left, "recovered": 1 - left / before}
        found.append({"d": d, "factor": factor, "rate": rate, **numbers})
        step_on()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="path of the files, no suffix")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started, rows = time.perf_counter(), []
    with progress("distilling", len(args.widths) * len(args.factors)) as advance:
        for d in args.widths:
            rows += rows_at(d, args.factors, args.seed, advance)
    table = pd.DataFrame(rows)
    record = {
        "command": " ".join(["python", *sys.argv]),
        **stamp(started),
        "documents": {"words": LENGTH, "number": N_DOCUMENTS},
        "training": {"steps": STEPS, "batch_size": BATCH, "default_rate": f"{RATE} / d"},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out.with_suffix(".csv"), index=False, float_format="%.6g")
    write_json(record, args.out.with_suffix(".json"))
    print(table.pivot(index="d", columns="factor", values="recovered").round(3).to_string())


if __name__ == "__main__":
    main()

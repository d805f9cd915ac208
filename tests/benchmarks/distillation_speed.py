"""Distillation of adapters beside the training of a LoRA, per token.

    python tests/benchmarks/distillation_speed.py [--steps 3] [--rounds 3]

Steps of the same batches in turn, forwards, backwards and Adam: PEFT's LoRA of rank 8 on all linear
modules, on the task's loss as users train it, and on the KL to the tuned model, as distillation has
it; adapters of rank 8 after every block on that KL, as `oracle steer distil` trains them. Memory is
the most that a step takes beyond what stands before the first.
"""

import argparse
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from record import write
from watch import watched

from toolkit import ModelPair
from toolkit.documents.documents import read_documents
from toolkit.models.loading import load_model
from toolkit.runtime.shipped import ADAPTER, BASE, PROMPTS, shipped
from toolkit.training.distillation import Student, divergences, rows_of
from toolkit.training.examples import collate
from toolkit.training.methods import Method, adapted

BATCH = 4


def steps_of(parameters, loss_of, batches):
    """Train on `batches`, and return the seconds."""
    optimiser = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-5)
    started = time.perf_counter()
    for batch in batches:
        loss_of(batch).backward()
        optimiser.step()
        optimiser.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pair = ModelPair.load(BASE, shipped(ADAPTER))
    corpus = pair.corpus(read_documents(shipped(PROMPTS)))
    rows = rows_of(corpus.fit)[: args.steps * BATCH]
    batches = [collate(rows[i : i + BATCH], corpus.pad_id) for i in range(0, len(rows), BATCH)]
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = get_peft_model(load_model(BASE, torch.float32), config).train()
    method = Method("post-block", "linear", "post_block", 8)
    with adapted(pair.base, method, pair.base_runner.sites) as found:
        student = Student(found.trainee, pair.tuned)
        ways = {
            "LoRA (PEFT), task loss": (lora, lambda b: lora(**b).loss),
            "LoRA (PEFT), KL": (lora, lambda b: divergences(pair.tuned, lora, b)[0].mean()),
            "adapters, KL": (student, lambda b: student(**b).loss),
        }
        seconds, peaks = {name: [] for name in ways}, {name: [] for name in ways}
        trained = {
            name: sum(p.numel() for p in model.parameters() if p.requires_grad)
            for name, (model, _) in ways.items()
        }
        for model, loss_of in ways.values():
            steps_of(model.parameters(), loss_of, batches[:1])  # warm up
        for _ in range(args.rounds):
            for name, (model, loss_of) in ways.items():
                with watched(peaks[name]):
                    seconds[name].append(steps_of(model.parameters(), loss_of, batches))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    first = seconds["LoRA (PEFT), task loss"]
    table = [
        {
            "what": name,
            "tokens a second": round(tokens / statistics.median(took), 1),
            "time to the LoRA's": round(
                statistics.median(a / b for a, b in zip(took, first, strict=True)), 2
            ),
            "memory, MiB": round(statistics.median(peaks[name]) / 2**20),
            "numbers trained": trained[name],
        }
        for name, took in seconds.items()
    ]
    note = f"SmolLM2, {tokens} tokens in {len(batches)} batches of {BATCH}, {args.rounds} rounds."
    write("distillation_speed", "Distillation beside the training of a LoRA", table, note)


if __name__ == "__main__":
    main()

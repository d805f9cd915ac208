"""A pair larger than memory: blocks read from disk, under a limit well below the weights.

    python tests/benchmarks/offload.py [--blocks 40] [--limit 1100]

A pair of random Llamas in float32 is written to disk, and ``oracle diagnose`` runs on it with all
weights in memory, and with ``--offload`` in a control group that refuses more than `--limit` MiB
(page cache included: files are dropped from it before, so weights are read from disk again and
again; needs the right to make a group, as in a container). Both must write the same tables. Then
the pair is asked for in that group without ``--offload``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from record import write
from transformers import LlamaConfig, LlamaForCausalLM

from toolkit import ModelPair
from toolkit.runtime.shipped import ADAPTER, BASE, PROMPTS, shipped

GROUP = Path("/sys/fs/cgroup/memory/offload-benchmark")
MIB = 2**20


def save_pair(folder: Path, n_blocks: int) -> float:
    """Both models, of which the second differs everywhere; bytes of their weights."""
    tokenizer = ModelPair.load(BASE, shipped(ADAPTER)).tokenizer
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=n_blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model, n_bytes = LlamaForCausalLM(config), 0
    for name in ("base", "tuned"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        n_bytes += sum(p.numel() * p.element_size() for p in model.parameters())
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=2e-3)
    return float(n_bytes)


def forget(folder: Path) -> None:
    """Drop `folder`'s files from the page cache, so that the next reader is charged for them."""
    for path in folder.glob("*/*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def diagnose(folder: Path, out: Path, options: list[str], limit: int | None) -> str:
    """Run ``oracle diagnose``; what it said where it was refused."""
    command = [sys.executable, "-m", "toolkit", "diagnose", str(folder / "base")]
    command += [str(folder / "tuned"), "--data", str(folder / "data.jsonl"), "--out", str(out)]
    command += ["--quiet", "--max-prompts", "2", "--new-tokens", "2", "--sample", "0"]
    command += ["--shared-sample", "0", "--batch-tokens", "512", *options]

    def enter() -> None:
        if limit is not None:
            (GROUP / "cgroup.procs").write_text(str(os.getpid()))

    ended = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True)
    if ended.returncode and "needs about" not in ended.stderr:
        raise SystemExit(ended.stderr or f"ended with {ended.returncode}")
    return " ".join(ended.stderr.split()) if ended.returncode else ""


def stages(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())["stages"]


def same_tables(ours: Path, theirs: Path) -> bool:
    paths = sorted((theirs / "tables").glob("*.csv"))
    return all(path.read_bytes() == (ours / "tables" / path.name).read_bytes() for path in paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--limit", type=int, default=1100, help="MiB")
    args = parser.parse_args()
    GROUP.mkdir(exist_ok=True)
    (GROUP / "memory.limit_in_bytes").write_text(str(args.limit * MIB))
    kinds = {"in memory": ([], None), "--offload": (["--offload"], args.limit)}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = save_pair(folder, args.blocks)
        lines = shipped(PROMPTS).read_text("utf-8").splitlines()[: args.documents]
        (folder / "data.jsonl").write_text("\n".join(lines), "utf-8")
        for name, (options, limit) in kinds.items():
            out = folder / name
            forget(folder)
            refused = diagnose(folder, out, options, limit)
            assert not refused, refused
            found = stages(out)
            rows.append(
                {
                    "weights": name,
                    "march, s": found["march"]["seconds"],
                    "replacement, s": found["replacement"]["seconds"],
                    "all stages, s": round(sum(stage["seconds"] for stage in found.values()), 1),
                    "same tables": same_tables(out, folder / "in memory"),
                }
            )
        refused = diagnose(folder, folder / "refused", [], args.limit)
    most = int((GROUP / "memory.max_usage_in_bytes").read_text())
    GROUP.rmdir()
    note = (
        f"two random Llamas of {args.blocks} blocks, {weights / MIB:.0f} MiB of weights; the group "
        f"was limited to {args.limit} MiB and used at most {most / MIB:.0f}. Without --offload it "
        f"said there: {refused}"
    )
    write("offload", "Weights from disk", rows, note)


if __name__ == "__main__":
    main()

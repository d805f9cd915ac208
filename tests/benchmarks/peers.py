"""The toolkit beside other ways to the same numbers: time and memory.

    python tests/benchmarks/peers.py [--tokens 2048 20480] [--threads 2]
        [--peers toolkit nnsight ...]

The task: base and tuned model (SmolLM2 and its LoRA, merged) on the same batches, states at three
locations of every block, the free delta's covariance, and the best linear fit of the delta from the
base model's state. Each peer has an environment of its own (made on first use, in
``~/.cache/oracle-toolkit/benchmarks``) and runs as its users would write it: states are captured,
kept, and analysed. Each runs in a process of its own, one after the other; all must find the same
covariances and fits. Loading and a warm-up are not timed; memory is the peak over what is held
once both models are loaded.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
from record import write

from toolkit import ModelPair
from toolkit.documents.documents import read_documents
from toolkit.documents.tokens import encode_all
from toolkit.runtime.shipped import ADAPTER, BASE, PROMPTS, shipped

HERE = Path(__file__).parent
ENVIRONMENTS = Path.home() / ".cache" / "oracle-toolkit" / "benchmarks"
TORCH = "torch==2.13.0"  # an unpinned torch pulls another build
ROWS, LENGTH = 8, 256  # of a batch
MIB = 2**20
NOTE = (
    f"SmolLM2 and its LoRA (merged), batches of {ROWS} x {LENGTH} tokens, 30 blocks x 3 locations, "
    "free deltas; plain hooks' version is that of transformers"
)
# Name: packages of its environment (None: the one that runs this), script, argument.
PEERS = {
    "toolkit": (None, "with_toolkit.py", ""),
    "hooks to numpy, np.cov and lstsq": (None, "plain_hooks.py", "lstsq"),
    "hooks to numpy, normal equations": (None, "plain_hooks.py", "products"),
    "hooks, summed as they come": (None, "plain_hooks.py", "streamed"),
    "nnsight": ("nnsight==0.8.1 accelerate", "with_nnsight.py", ""),
    "TransformerLens": ("transformer-lens==4.3.0", "with_transformer_lens.py", ""),
    "interp-engine": ("interp-engine==1.14.2", "with_interp_engine.py", ""),
}


def environment(packages: str | None) -> str:
    """The interpreter of the environment that holds `packages`, made if there is none."""
    if packages is None:
        return sys.executable
    folder = ENVIRONMENTS / packages.partition("==")[0]
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        print(f"an environment for {packages}: {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, TORCH, "numpy"], check=True)
        subprocess.run([*pip, TORCH, *packages.split()], check=True)
        (folder / "complete").touch()
    return str(python)


def save_task(folder: Path, tokens: int) -> None:
    """Both models as plain folders, and batches of token ids without padding."""
    pair = ModelPair.load(BASE, shipped(ADAPTER))
    encoded = encode_all(read_documents(shipped(PROMPTS)), pair.tokenizer)
    row = np.concatenate([document.ids for document in encoded])
    n_batches = -(-tokens // (ROWS * LENGTH))
    # Documents one behind the other, as often as needed; no two rows are cut alike.
    row = np.tile(row, -(-n_batches * ROWS * LENGTH // len(row)))[: n_batches * ROWS * LENGTH]
    np.save(folder / "tokens.npy", row.reshape(n_batches, ROWS, LENGTH).astype(np.int64))
    merged = copy.deepcopy(pair.tuned).merge_and_unload()
    for name, model in (("base", pair.base), ("tuned", merged)):
        model.save_pretrained(folder / name)
        pair.tokenizer.save_pretrained(folder / name)


def measured(name: str, folder: Path, n_batches: int, threads: int) -> dict:
    packages, script, argument = PEERS[name]
    command = [environment(packages), str(HERE / "peers" / script), str(folder)]
    command += [str(n_batches), str(threads), *([argument] if argument else [])]
    # torch's number of threads is given to the script; numpy's products ask the environment.
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | limits)
    if ended.returncode:
        raise SystemExit(f"{name} ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def largest_difference(ours: list, theirs: list) -> float:
    """Of any covariance's trace (relative) and any explained share."""
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    a, b = (np.array([row[2:] for row in rows]) for rows in (ours, theirs))
    return float(max(np.abs(a[:, 0] / b[:, 0] - 1).max(), np.abs(a[:, 1] - b[:, 1]).max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 20480])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        save_task(Path(scratch), max(args.tokens))
        for tokens in args.tokens:
            rows, found = [], {}
            for name in dict.fromkeys(["toolkit", *args.peers]):
                n_batches = -(-tokens // (ROWS * LENGTH))
                found[name] = measured(name, Path(scratch), n_batches, args.threads)
                print({k: v for k, v in found[name].items() if k != "rows"}, name, flush=True)
            ours = found["toolkit"]
            memory = {name: result["peak"] - result["loaded"] for name, result in found.items()}
            for name, result in found.items():
                gap = largest_difference(ours["rows"], result["rows"])
                assert gap < 1e-3, f"{name} found other numbers: {gap}"
                rows.append(
                    {
                        "peer": name,
                        "version": result["version"],
                        "seconds": round(result["seconds"], 1),
                        "time / toolkit's": round(result["seconds"] / ours["seconds"], 2),
                        "MiB": round(memory[name] / MIB),
                        "memory / toolkit's": round(memory[name] / memory["toolkit"], 1),
                        "largest difference": f"{gap:.0e}",
                    }
                )
            write(f"peers_{tokens}", f"Beside other tools: {tokens:,} tokens", rows, NOTE)


if __name__ == "__main__":
    main()

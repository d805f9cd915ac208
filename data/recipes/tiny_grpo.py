"""Makes data/tiny-listops/grpo.json: adapters of the tiny base model, trained by reward alone.

    python data/recipes/tiny_grpo.py

Needs trl: pip install 'oracle-toolkit[rl]'. The adapters first see a little supervision on all four
operators, so that some answers are right and some are not. GRPO then asks single operations and
rewards right answers; nothing tells it which steps lead there. Judged on held-out single
operations, and on the nested expressions of the table, which GRPO never asks.
"""

import argparse
import json
import platform
import time
from contextlib import nullcontext
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.documents.tasks.listops import ListOps
from toolkit.evaluation.accuracy import bootstrap, correct
from toolkit.models.pair import ModelPair
from toolkit.runtime.provenance import versions
from toolkit.runtime.records import write_json
from toolkit.training.examples import supervised
from toolkit.training.grpo import RewardOptions, grpo
from toolkit.training.methods import Method, adapted
from toolkit.training.tiny import TASK as NESTED
from toolkit.training.tiny import tiny_pair
from toolkit.training.trainer import TrainingOptions, train

OUT = Path(__file__).parent.parent / "tiny-listops" / "grpo.json"
SINGLE = ListOps(max_depth=1, max_args=3, worked=True, prompt="{expression} =")
N_TEST = {"single": 400, "nested": 1000}  # of single operations there are few more
METHOD = Method("post-block linear r=8", "linear", "post_block", 8)


def supervise(pair: ModelPair, options: TrainingOptions) -> Adapters:
    """The adapters that GRPO starts from."""
    data = NESTED.examples("train", options.max_steps * options.batch_size)
    rows = [supervised(example, pair.tokenizer, 256) for example in data]
    with adapted(pair.base, METHOD, seed=options.seed) as found:
        assert found.trainee is not None
        train(found.trainee, rows, options, pair.tokenizer.pad_token_id)
    assert found.adapters is not None
    return found.adapters


def judged(pair: ModelPair, model: Any, adapters: Adapters | None = None) -> dict[str, Any]:
    """Accuracy on test expressions of both tasks, with its 95 % interval."""
    found = {}
    with steer(model, adapters) if adapters else nullcontext():
        for name, task in (("single", SINGLE), ("nested", NESTED)):
            test = task.examples("test", N_TEST[name])
            right = correct(model, pair.tokenizer, task, test, 250)
            found[name] = {"accuracy": right.mean(), "interval": bootstrap(right)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--start-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()
    pair = tiny_pair()
    first = TrainingOptions(1e-2, batch_size=32, max_steps=args.start_steps, seed=args.seed)
    options = RewardOptions(args.rate, args.steps, prompts=16, generations=8, seed=args.seed)
    start = supervise(pair, first)
    questions = SINGLE.examples("train", 3000)
    found = grpo(pair.base, pair.tokenizer, start, SINGLE, questions, options)
    record = {
        "versions": {**versions(), "trl": metadata.version("trl")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "method": asdict(METHOD),
        "parameters": start.parameters,
        "supervised": asdict(first),
        "grpo": asdict(options),
        "questions": {"grpo": len(questions), "test": N_TEST},
        "base": judged(pair, pair.base),
        "before": judged(pair, pair.base, start),
        "after": judged(pair, pair.base, found.adapters),
        "tuned": judged(pair, pair.tuned),
        "grpo_seconds": round(found.seconds),
        "seconds": round(time.perf_counter() - started),
        "rewards": found.rewards,
    }
    write_json(record, args.out)
    for who in ("base", "before", "after", "tuned"):
        print(who, json.dumps(record[who]))
    rewards = np.array([reward for _, reward in found.rewards])
    print("rewards", [round(part.mean(), 3) for part in np.array_split(rewards, 10)])
    print("seconds", record["grpo_seconds"], record["seconds"])


if __name__ == "__main__":
    main()

"""Makes data/tiny-listops: a tiny Llama pretrained from nothing, and its full fine-tune.

    python data/recipes/tiny_listops.py

The base model learns ListOps with the operators MAX and SM, worked out step by step; the
fine-tune, of all weights, learns all four. Both, with the tokenizer, are written in float32.
"""

import argparse
import copy
import json
import platform
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed

from toolkit.documents.tasks.listops import OPERATORS
from toolkit.evaluation.accuracy import bootstrap, correct
from toolkit.runtime.records import write_json
from toolkit.training.examples import supervised
from toolkit.training.tiny import TASK as TINY_TASK
from toolkit.training.trainer import Trainee, TrainingOptions, train

FOLDER = Path(__file__).parent.parent / "tiny-listops"
SPECIAL = ["<pad>", "<eos>", "<unk>"]
WORDS = [*SPECIAL, *map(str, range(10)), *(f"[{name}" for name in OPERATORS), "]", "="]


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        dtype="float32",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--examples", type=int, default=150_000)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--tune-examples", type=int, default=80_000)
    parser.add_argument("--tune-epochs", type=float, default=1)
    args = parser.parse_args()
    set_seed(0)
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_config(make_config())
    record: dict = {"parameters": sum(p.numel() for p in model.parameters())}
    some = copy.copy(TINY_TASK)
    some.operators = ("MAX", "SM")
    stages = [
        ("base", some, args.examples, TrainingOptions(1e-3, args.epochs, 32)),
        ("tuned", TINY_TASK, args.tune_examples, TrainingOptions(1e-3, args.tune_epochs, 32)),
    ]
    for name, task, n, options in stages:
        data = task.examples("train", n)
        rows = [supervised(example, tokenizer, 256) for example in data]
        model.requires_grad_(True)
        done = train(Trainee(model), rows, options, tokenizer.pad_token_id)
        print(done.losses[-1], done.losses[:: max(1, len(done.losses) // 20)], flush=True)
        model.eval()
        right = correct(model, tokenizer, TINY_TASK, TINY_TASK.examples("test", 1000), 250)
        own = correct(model, tokenizer, task, task.examples("test", 500), 250)
        record[name] = {
            "operators": task.operators,
            "examples": n,
            "options": vars(options),
            "steps": done.steps,
            "tokens": done.tokens,
            "seconds": round(done.seconds),
            "accuracy_own_operators": own.mean(),
            "accuracy_all_operators": right.mean(),
            "interval": bootstrap(right),
        }
        print(json.dumps(record[name]), flush=True)
        model.save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)
    record |= {
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    write_json(record, (args.out / "training.json"))


if __name__ == "__main__":
    main()

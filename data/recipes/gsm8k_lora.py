"""Makes a rank-8 LoRA of a packaged model on GSM8K: data/smollm2-gsm8k-lora with the defaults.

    python data/recipes/gsm8k_lora.py --train gsm8k_train.jsonl --test gsm8k_test.jsonl
    python data/recipes/gsm8k_lora.py --base gemma-3-270m --out data/gemma3-gsm8k-lora \\
        --batch-size 2 --examples 640 --accuracy-on 0 --train ... --test ...

The files are JSON lines with "prompt", "response", "answer" (GSM8K in its own wording); without
them the data set is taken from the hub (openai/gsm8k). Only response tokens are supervised, the
end of the turn included; examples that validate elsewhere are left out. (The adapters that ship
were made before those were set apart, from the first 1,600 and 640 lines.) About 40 minutes on two
cores.
"""

import argparse
import json
import platform
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from toolkit.documents.tasks import GSM8K
from toolkit.documents.tokens import MAX_LENGTH
from toolkit.evaluation.accuracy import correct
from toolkit.models.loading import load_model, load_tokenizer
from toolkit.models.packaged import PACKAGED
from toolkit.runtime.records import write_json
from toolkit.training.examples import NOT_SUPERVISED, collate, supervise_all

DATA = Path(__file__).parent.parent


@torch.no_grad()
def response_loss(model, encoded: list[dict], pad_id: int) -> list[float]:
    """Mean negative log-likelihood per response token, one number a document, in float32."""
    losses = []
    for start in range(0, len(encoded), 4):
        batch = collate(encoded[start : start + 4], pad_id)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=NOT_SUPERVISED, reduction="none"
        )
        losses += (nll.sum(1) / (labels != NOT_SUPERVISED).sum(1)).tolist()
    return losses


def train(args: argparse.Namespace) -> dict:
    """Train the adapter and save it, in bfloat16; what is worth recording."""
    model, tokenizer = load_model(args.base, dtype=torch.float32), load_tokenizer(args.base)
    examples = GSM8K(args.train, args.test).examples("train", args.examples)
    data, _ = supervise_all(examples, tokenizer, MAX_LENGTH, skip_longer=True)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    trainer = Trainer(
        model=tuned,
        train_dataset=data,
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=8 // args.batch_size,
            num_train_epochs=1,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=15,
            weight_decay=0.0,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            train_sampling_strategy="group_by_length",
            use_cpu=True,
            bf16=True,
            seed=0,
        ),
    )
    result = trainer.train()
    tuned.peft_config["default"].base_model_name_or_path = args.base
    tuned.to(torch.bfloat16).save_pretrained(args.out, save_embedding_layers=False)
    return {
        "base": args.base,
        "data": "openai/gsm8k (MIT)",
        "train_examples": len(data),
        "train_tokens": sum(len(e["input_ids"]) for e in data),
        "learning_rate": args.learning_rate,
        "train_seconds": round(result.metrics["train_runtime"]),
    }


def evaluate(args: argparse.Namespace) -> dict:
    """Base and tuned model in float32, the tuned one from the saved files, as users load it."""
    tokenizer = load_tokenizer(args.base)
    base = load_model(args.base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, args.out).eval()
    task = GSM8K(args.train, args.test)
    examples = task.examples("test", 200)
    data, _ = supervise_all(examples, tokenizer, MAX_LENGTH, skip_longer=True)
    record: dict = {"test_examples": len(data), "accuracy_examples": args.accuracy_on}
    for name, context in (("after", nullcontext()), ("before", tuned.disable_adapter())):
        with context:
            losses = response_loss(tuned, data, tokenizer.pad_token_id)
            record[f"response_loss_{name}"] = summary(losses)
            if args.accuracy_on:
                right = correct(tuned, tokenizer, task, examples[: args.accuracy_on], 20)
                record[f"accuracy_{name}"] = float(right.mean())
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="SmolLM2-135M-Instruct", choices=list(PACKAGED))
    parser.add_argument("--out", type=Path, default=DATA / "smollm2-gsm8k-lora")
    parser.add_argument("--train")
    parser.add_argument("--test")
    parser.add_argument("--batch-size", type=int, default=8, help="a step always has 8 examples")
    parser.add_argument("--examples", type=int, default=1600)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--accuracy-on", type=int, default=100, help="0 leaves accuracy out")
    parser.add_argument("--evaluate", action="store_true", help="only judge the saved adapter")
    args = parser.parse_args()
    set_seed(0)
    path = args.out / "training.json"
    record = json.loads(path.read_text()) if args.evaluate and path.exists() else {}
    if not args.evaluate:
        record = train(args)
    record |= evaluate(args)
    record |= {
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    write_json(record, path)
    print(json.dumps(record, indent=2))


def summary(values: list[float]) -> dict[str, float]:
    """Mean over documents of the loss per response token, and its standard error."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return {"mean": float(tensor.mean()), "sem": float(tensor.std() / len(values) ** 0.5)}


if __name__ == "__main__":
    main()

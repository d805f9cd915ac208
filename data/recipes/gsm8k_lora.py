"""Makes a rank-8 LoRA of a packaged model on GSM8K: data/smollm2-gsm8k-lora with the defaults.

    python data/recipes/gsm8k_lora.py --train gsm8k_train.jsonl --test gsm8k_test.jsonl
    python data/recipes/gsm8k_lora.py --base gemma-3-270m --out data/gemma3-gsm8k-lora \\
        --batch-size 2 --examples 640 --accuracy-on 0 --train ... --test ...

The files are JSON lines with "prompt", "response", "answer" (GSM8K in its own wording); without
them the data set is taken from the hub (openai/gsm8k). Only response tokens are supervised, the
end of the turn included. About 40 minutes on two cores.
"""

import argparse
import json
import platform
import re
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from toolkit.documents.documents import Document
from toolkit.documents.tokens import encode
from toolkit.models.loading import PACKAGED, load_model, load_tokenizer

DATA = Path(__file__).parent.parent


def examples(path: str | None, split: str) -> list[dict]:
    if path:
        return [json.loads(line) for line in Path(path).read_text().split("\n") if line]
    rows = load_dataset("openai/gsm8k", "main", split=split)
    return [
        {"prompt": r["question"], "response": r["answer"], "answer": r["answer"].split("#### ")[-1]}
        for r in rows
    ]


def supervised(row: dict, tokenizer) -> dict[str, list[int]]:
    """Tokens and labels; -100 marks what is not supervised: everything before the response."""
    e = encode(Document(prompt=row["prompt"], response=row["response"]), tokenizer)
    # A chat template ends the turn itself; without one the end of sequence is the turn's end.
    ids = list(e.ids) + ([] if tokenizer.chat_template else [tokenizer.eos_token_id])
    return {
        "input_ids": ids,
        "labels": [-100] * e.response_start + ids[e.response_start :],
    }


def collate(batch: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    return {
        "input_ids": padded([e["input_ids"] for e in batch], pad_id),
        "labels": padded([e["labels"] for e in batch], -100),
        "attention_mask": padded([[1] * len(e["input_ids"]) for e in batch], 0),
    }


@torch.no_grad()
def response_loss(model, encoded: list[dict], pad_id: int) -> list[float]:
    """Mean negative log-likelihood per response token, one number a document, in float32."""
    losses = []
    for start in range(0, len(encoded), 4):
        batch = collate(encoded[start : start + 4], pad_id)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
        )
        losses += (nll.sum(1) / (labels != -100).sum(1)).tolist()
    return losses


@torch.no_grad()
def accuracy(model, tokenizer, rows: list[dict]) -> float:
    """Share of greedy answers (up to 200 tokens) whose last number is the reference answer."""
    right = 0
    for start in range(0, len(rows), 20):
        chunk = rows[start : start + 20]
        prompts = [encode(Document(prompt=r["prompt"], response=""), tokenizer) for r in chunk]
        inputs = tokenizer.pad(
            {"input_ids": [list(p.prompt_ids) for p in prompts]},
            return_tensors="pt",
            padding_side="left",
        )
        out = model.generate(**inputs, max_new_tokens=200, do_sample=False)
        texts = tokenizer.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for text, row in zip(texts, chunk, strict=True):
            numbers = re.findall(r"-?\d[\d,]*\.?\d*", text)
            last = numbers[-1].replace(",", "").rstrip(".") if numbers else ""
            right += last == row["answer"].replace(",", "")
    return right / len(rows)


def train(args: argparse.Namespace) -> dict:
    """Train the adapter and save it, in bfloat16; what is worth recording."""
    model, tokenizer = load_model(args.base, dtype=torch.float32), load_tokenizer(args.base)
    rows = examples(args.train, "train")[: args.examples]
    data = [supervised(row, tokenizer) for row in rows]
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
    rows = examples(args.test, "test")[:200]
    data = [supervised(row, tokenizer) for row in rows]
    record: dict = {"test_examples": len(data), "accuracy_examples": args.accuracy_on}
    for name, context in (("after", nullcontext()), ("before", tuned.disable_adapter())):
        with context:
            losses = response_loss(tuned, data, tokenizer.pad_token_id)
            record[f"response_loss_{name}"] = summary(losses)
            if args.accuracy_on:
                right = accuracy(tuned, tokenizer, rows[: args.accuracy_on])
                record[f"accuracy_{name}"] = right
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
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def summary(values: list[float]) -> dict[str, float]:
    """Mean over documents of the loss per response token, and its standard error."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return {"mean": float(tensor.mean()), "sem": float(tensor.std() / len(values) ** 0.5)}


if __name__ == "__main__":
    main()

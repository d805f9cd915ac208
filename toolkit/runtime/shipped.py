"""The pair that ships: SmolLM2-135M-Instruct and its LoRA fine-tune on GSM8K."""

import sys
from pathlib import Path

from toolkit.errors import InputError

BASE = "SmolLM2-135M-Instruct"
ADAPTER = "smollm2-gsm8k-lora"
PROMPTS = "gsm8k-demo.jsonl"
ELSEWHERE = "elsewhere.jsonl"  # prompts of our own writing, none of them a sum


def shipped(name: str) -> Path:
    """Return where a file or folder of ``data/`` is: in the checkout, or where pip installed it."""
    roots = (Path(__file__).parents[2] / "data", Path(sys.prefix) / "share/oracle-toolkit")
    for root in roots:
        if (root / name).exists():
            return root / name
    raise InputError(f"data/{name} is not here: install from a checkout of the repository")

"""Makes data/gsm8k-demo.jsonl: the first examples of GSM8K's test split, as documents.

    python data/recipes/gsm8k_demo.py gsm8k_test.jsonl

The file is JSON lines with "prompt" and "response" (openai/gsm8k in its own wording).
"""

import json
import sys
from pathlib import Path

N_EXAMPLES = 36
OUT = Path(__file__).parent.parent / "gsm8k-demo.jsonl"


def main() -> None:
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").split("\n")[:N_EXAMPLES]
    rows = [{key: json.loads(line)[key] for key in ("prompt", "response")} for line in lines]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

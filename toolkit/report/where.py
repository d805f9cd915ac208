"""Where the difference sits: tokens in their context, and prompts, for the report's page."""

import json
from typing import Any

from toolkit.diagnosis.run import Run

TOKENS, PROMPTS = 8, 5  # of each list, on the page; the tables have more
LISTS = {"changed": "What fine-tuning changed", "left": "What steering leaves"}
MODELS = ("tuned", "base", "steered")


def where_it_sits(run: Run) -> dict[str, Any]:
    """Return the tokens and prompts that hold most; both empty where nothing has a distance."""
    tokens = run.tokens.frame
    lists = {
        title: [_token(row) for row in rows.head(TOKENS).to_dict("records")]
        for of, title in LISTS.items()
        if len(rows := tokens[(tokens["of"] == of) & (tokens.nats > 0)].sort_values("place"))
    }
    prompts = run.prompts.frame
    prompts = prompts[prompts.base > 0].sort_values("base", ascending=False, kind="stable")
    return {
        "lists": lists,
        "prompts": [_prompt(row) for row in prompts.head(PROMPTS).to_dict("records")],
    }


def _token(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "before": _plain(row["context"]),
        "said": _plain(row["token"]),
        "following": {
            name: row[f"next_{name}"] for name in MODELS if isinstance(row[f"next_{name}"], str)
        },
    }


def _prompt(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "asked": _plain(row["text"]), "is_steered": row["steered"] == row["steered"]}


def _plain(quoted: str) -> str:
    """Return the text in quotes on one line: line breaks become signs."""
    return str(json.loads(quoted)).replace("\n", "⏎")

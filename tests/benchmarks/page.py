"""Writes ``tests/benchmarks/README.md``, the page with every table of ``tests/benchmarks/results``.

python tests/benchmarks/page.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import RESULTS

PAGE = Path(__file__).parent / "README.md"
INTRODUCTION = """# Benchmarks

Each script compares what it measures side by side, in one process or in processes that take turns,
and writes `results/NAME.json` with machine, versions, commit and command. Read ratios: seconds are
those of the machine that is named. `python tests/benchmarks/page.py` writes this page.
"""


def page() -> str:
    """The page, from the results on disk."""
    sections = [_section(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    return "\n".join([INTRODUCTION, *sections])


def _section(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    where = ", ".join(
        [
            f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads used",
            f"{machine['memory_gib']} GiB",
            *(f"{name} {versions[name]}" for name in ("torch", "transformers")),
            f"commit {result['commit'][:10]}",
        ]
    )
    note = [f"{_sentence(result['note'])}\n"] if result["note"] else []
    said = [f"`{result['command']}` ({where})\n"]
    return "\n".join([f"## {result['title']}\n", *note, *_table(result), "", *said])


def _table(result: dict[str, Any]) -> Iterator[str]:
    yield _row(result["columns"])
    yield _row(["---"] * len(result["columns"]))
    for row in result["rows"]:
        yield _row(["yes" if v is True else "no" if v is False else v for v in row])


def _row(cells: list[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")

"""Records on disk, JSON and tensors, written whole or not at all."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_json(content: Any, path: Path) -> None:
    """Write indented UTF-8 JSON; numbers that are not finite become null."""
    write_text(json_text(content), path)


def json_text(content: Any) -> str:
    """Return the text that `write_json` writes."""
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(text: str, path: Path) -> None:
    """Write a text in UTF-8."""
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(text, "utf-8")
    os.replace(unfinished, path)


def write_lines(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write JSON lines in UTF-8, one a row; numbers that are not finite become null."""
    lines = [json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) for row in rows]
    write_text("".join(f"{line}\n" for line in lines), path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the rows that `write_lines` wrote; none where there is no such file."""
    if not path.is_file():
        return []
    # Other line ends than these, such as U+2028, may stand in a text.
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def write_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors by name as safetensors."""
    unfinished = path.with_suffix(".new")
    save_file(tensors, unfinished, metadata)
    os.replace(unfinished, path)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content

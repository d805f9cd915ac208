"""JSON records, written whole or not at all."""

import json
import math
import os
from pathlib import Path
from typing import Any


def write_json(content: Any, path: Path) -> None:
    """Indented UTF-8 JSON, written whole or not at all; numbers that are not finite are null."""
    unfinished = path.with_name(f"{path.name}.new")
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    unfinished.write_text(text + "\n", "utf-8")
    os.replace(unfinished, path)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content

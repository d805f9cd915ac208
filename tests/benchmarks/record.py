"""A benchmark's result: a JSON file in ``tests/benchmarks/results``, with machine and versions."""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from toolkit.runtime.provenance import commit, versions
from toolkit.runtime.records import write_json

RESULTS = Path(__file__).parent / "results"


def write(name: str, title: str, rows: Sequence[Mapping[str, Any]], note: str = "") -> None:
    """Write ``results/NAME.json``: a table of `rows`, whose keys are its columns."""
    RESULTS.mkdir(exist_ok=True)
    content = {
        "title": title,
        "note": note,
        "columns": list(rows[0]),
        "rows": [list(row.values()) for row in rows],
        "machine": machine(),
        "versions": versions(),
        "commit": commit() or "unknown",
        "command": " ".join(["python", *sys.argv]),
    }
    write_json(content, RESULTS / f"{name}.json")
    print(f"{title}: {RESULTS / name}.json")
    for row in rows:
        print("  " + ", ".join(f"{key} {value}" for key, value in row.items()))


def machine() -> dict[str, Any]:
    """The processor, its cores, torch's threads and the memory."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages / 2**30, 1),
    }

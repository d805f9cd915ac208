"""``kill -9`` at any moment: the same command ends with the same numbers, and little is lost."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from tests.support import tiny

SEED = 0


def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path):
    tiny.save_request(tmp_path, n_documents=24)
    root = str(Path(__file__).parents[2])
    found = subprocess.run(
        [sys.executable, "-m", "tests.support.killed", str(tmp_path), "--seed", str(SEED)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": root},
        cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    left = json.loads(found.stdout)["left"]
    assert len(left) >= 3, "killed too rarely to show anything"
    # What was finished stays finished, whenever the next process was killed.
    assert all(
        a <= b for before, after in pairwise(left) for a, b in zip(before, after, strict=True)
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for path in sorted((whole / "tables").iterdir()):
        assert (killed / "tables" / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())

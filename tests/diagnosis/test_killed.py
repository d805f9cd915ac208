"""``kill -9`` at any moment: the same command ends with the same numbers, and little is lost."""

import json
from itertools import pairwise

from tests.support import forked, tiny

SEED = 0


def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path):
    tiny.save_request(tmp_path, n_documents=24)
    words = (str(tmp_path), "--seed", str(SEED))
    found = forked.run(forked.module, "tests.support.killed", *words)
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

"""In a notebook's kernel: one line of progress that stays, and a diagnosis that is interrupted."""

import json

import pytest

from tests.support.kernel import Kernel

SETUP = """
import gc
from tests.support.kernel import state_of
from toolkit import Options, diagnose
from toolkit.lockstep.march import March
from toolkit.runtime.progress import progress
from toolkit.training.tiny import tiny_documents, tiny_pair

pair, documents = tiny_pair(), tiny_documents(40)
options = Options(max_prompts=4, new_tokens=4, sample=1, shared_sample=8)
before = state_of(pair)
"""
DIAGNOSE = "run = diagnose(pair, documents, options, workspace={!r})"
WITHOUT = "plain = diagnose(pair, documents, options, show_progress=False)"
SAME = "[n for n, t in plain.tables.items() if not t.frame.equals(run.tables[n].frame)]"


@pytest.fixture(scope="module")
def kernel():
    found = Kernel()
    assert all(output.get("name") == "stderr" for output in found.run(SETUP))  # libraries warn
    yield found
    found.stop()


def texts(outputs):
    return [output.get("text") or output.get("data", {}).get("text/plain") for output in outputs]


def test_progress_is_one_line_that_stays(kernel):
    steps = "    for _ in range(3):\n        time.sleep(0.3)\n        step()\n"
    cell = f"import time\nwith progress('counting', 3) as step:\n{steps}    step.say('so far')"
    line, said = kernel.run(cell)
    assert list(line.data) == ["text/plain"], "no widget, which a saved notebook would not show"
    (text,) = line.data["text/plain"].splitlines()
    assert text.startswith("counting")
    assert " 3/3 0:00:0" in text
    assert said.text == "so far\n"


def test_progress_that_is_not_shown_leaves_nothing(kernel):
    assert kernel.run("with progress('counting', 1, False) as step:\n    step()") == []


def test_an_interrupted_diagnosis_goes_on_in_the_next_cell(kernel, tmp_path):
    """Interrupted while it marches and again while it compares; then it ends, with the same."""
    cell, folder = DIAGNOSE.format(str(tmp_path / "mine")), tmp_path / "mine.partial"
    passed, compared = folder / "march" / "passed.json", folder / "replacement"
    for moment in (passed.is_file, lambda: len(list(compared.glob("*.safetensors"))) > 2):
        outputs = kernel.run(cell, interrupt_when=moment)
        assert outputs[-1].ename == "KeyboardInterrupt", outputs[-1]
        assert folder.is_dir()
        assert kernel.value("state_of(pair) == before") == "True"
        assert kernel.value("sum(type(o) is March for o in gc.get_objects())") == "0"
    n_blocks = int(kernel.value("pair.n_layers"))
    assert json.loads(passed.read_text()) == n_blocks
    goes_on, march, *_ = texts(kernel.run(cell))
    assert goes_on == f"going on from the interrupted run in {folder}\n"
    assert march.startswith(f"marching through {n_blocks} blocks")
    assert " 0/0 " in march, "no block is passed again"
    assert kernel.run(WITHOUT) == []
    assert kernel.value(SAME) == "[]"
    assert list(tmp_path.iterdir()) == []
    assert kernel.value("state_of(pair) == before") == "True"

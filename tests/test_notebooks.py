"""Every notebook runs from top to bottom and says what its committed outputs say."""

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.support.forked import forked_kernels
from tests.support.notebooks import code_cells, differences, text_differences, unfit_outputs

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FILE = re.compile(r"[\w./-]+\.(?:ipynb|md|py|sh|csv)\b")
MADE_BY_READERS = ("results/", "documents.jsonl", "mine/")


def read(path):
    return nbformat.read(path, as_version=4)


def execute(notebook):
    executed = copy.deepcopy(notebook)
    where = {"metadata": {"path": str(ROOT / "notebooks")}}
    with forked_kernels():
        NotebookClient(executed, timeout=1200, kernel_name="python3", resources=where).execute()
    return executed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_what_execution_gives(path):
    committed = read(path)
    assert differences(committed, execute(committed)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_unfit_is_committed(path):
    notebook = read(path)
    assert unfit_outputs(notebook) == []
    text = path.read_text("utf-8")
    assert not re.search(r'["\s(](?:/tmp|/home|/root|/work|/Users)/', text)
    pictures = [
        output.data["image/png"]
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert pictures, "a notebook shows something"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_files_that_a_notebook_names_exist(path):
    said = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    for name in FILE.findall(said):
        if not name.startswith(MADE_BY_READERS):
            assert any((folder / name).is_file() for folder in (ROOT, path.parent)), name


def test_notebooks_are_numbered_in_reading_order():
    numbers = [path.name.split("_")[0] for path in NOTEBOOKS]
    assert all(re.fullmatch(r"\d\d", number) for number in numbers)
    assert len(set(numbers)) == len(numbers)
    assert numbers[0] == "01"
    for path, number in zip(NOTEBOOKS, numbers, strict=True):
        assert read(path).cells[0].source.startswith(f"# {int(number)}. "), path.name


def small_notebook(printed="KL 0.873 nats", pictured=True, count=1):
    data = {"image/png": "iVBORw0=", "text/plain": "<Figure size 880x700 with 2 Axes>"}
    outputs = [new_output("stream", name="stdout", text=printed)]
    if pictured:
        outputs.append(new_output("execute_result", data=data, execution_count=1))
    cell = new_code_cell("show()", outputs=outputs, execution_count=count)
    return new_notebook(cells=[new_markdown_cell("# 1. What?"), cell])


def test_comparison_passes_what_another_machine_prints():
    assert differences(small_notebook(), small_notebook("KL  0.874 nats")) == []
    twice = small_notebook()
    twice.cells[1].outputs[:1] = [
        new_output("stream", name="stdout", text="KL "),
        new_output("stream", name="stderr", text="a library warns"),
        new_output("stream", name="stdout", text="0.873 nats"),
    ]
    assert differences(small_notebook(), twice) == []


@pytest.mark.parametrize(
    "executed",
    [
        small_notebook("KL 0.95 nats"),
        small_notebook("KL −0.873 nats"),
        small_notebook("KL 0.873 bits"),
        small_notebook("KL 0.873 nats, 0.1"),
        small_notebook(pictured=False),
    ],
    ids=["a number", "a sign", "a word", "one number more", "no picture"],
)
def test_comparison_fails_when_code_and_outputs_drift_apart(executed):
    assert len(differences(small_notebook(), executed)) == 1
    assert len(differences(executed, small_notebook())) == 1


CLOSE = [("0.51", "0.52"), ("27%", "28%"), ("1.3e-05", "1.4e-05"), ("10,880", "10,881"),
         ("120.0", "122.0"), ("−0.01", "0.00"), ("27 %", "26 %")]  # fmt: skip
APART = [("rank 8", "rank 9"), ("layer 30", "layer 31"), ("0.51", "0.53"), ("27%", "29%"),
         ("1.3e-05", "1.3e-04"), ("10,880", "11,880"), ("k90 8", "k95 8"), ("0.5", "nan"),
         ("Gemma-3-270m", "Gemma-4-270m")]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), CLOSE)
def test_close_numbers_pass(ours, theirs):
    assert not list(text_differences(ours, theirs))
    assert not list(text_differences(theirs, ours))


@pytest.mark.parametrize(("ours", "theirs"), APART)
def test_other_numbers_and_words_do_not(ours, theirs):
    assert list(text_differences(ours, theirs))
    assert list(text_differences(theirs, ours))


def test_cells_that_did_not_run_are_found():
    assert unfit_outputs(small_notebook()) == []
    for count in (None, 2):
        assert len(unfit_outputs(small_notebook(count=count))) == 1


def test_warnings_and_errors_are_found():
    for output in (
        new_output("stream", name="stderr", text="careful"),
        new_output("error", ename="ValueError", evalue="no", traceback=[]),
        new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}}),
    ):
        notebook = small_notebook()
        notebook.cells[1].outputs.append(output)
        assert len(unfit_outputs(notebook)) == 1

"""Every notebook runs from top to bottom and says what its committed outputs say."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_committed_outputs_are_what_execution_gives(path):
    committed = nbformat.read(path, as_version=4)
    executed = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(executed, timeout=300, kernel_name="python3", resources=where).execute()
    assert _texts(executed) == _texts(committed)
    assert any(_texts(committed))


def _texts(notebook):
    """What each code cell printed, and its value in words.

    Left out are pictures, and stderr: whether a library warns there depends on what else is
    installed.
    """
    return [
        [
            output["text"] if output.output_type == "stream" else output["data"]["text/plain"]
            for output in cell.outputs
            if output.get("name") != "stderr"
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]

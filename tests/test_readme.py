"""The lines that a reader copies run: the package's docstring and the README's Python."""

import re
import textwrap
from pathlib import Path

import matplotlib.figure
import pytest

import toolkit
from tests import tiny

README = Path(__file__).parent.parent / "README.md"


def docstring_lines():
    assert toolkit.__doc__ is not None
    return textwrap.dedent(toolkit.__doc__.split("::\n\n", 1)[1])


def readme_lines():
    return re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)


@pytest.mark.parametrize("lines", [docstring_lines, readme_lines], ids=["docstring", "README"])
def test_lines_run(lines, monkeypatch, tokenizer):
    """On a tiny pair in place of the one that ships."""
    import torch

    pair = tiny.make_pair("llama", torch.float64, tokenizer)
    asked = []
    monkeypatch.setattr(
        toolkit.ModelPair, "load", lambda base, tuned: asked.append((base, tuned)) or pair
    )
    monkeypatch.setattr(toolkit, "read_documents", lambda path: tiny.make_documents(16))
    names: dict = {}
    exec(lines(), names)
    assert asked == [("SmolLM2-135M-Instruct", "data/smollm2-gsm8k-lora")]
    assert names["run"].adapters is not None
    assert isinstance(names["run"].spectrum.plot(), matplotlib.figure.Figure)

"""What docs and README show is true: code runs, in order, and prints what the page says; commands
run, or at least exist where they would take long; files and figures that are named are there.
"""

import json
import re
import shlex
import textwrap
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
import torch
import typer
from typer.testing import CliRunner

import toolkit
from tests import tiny
from tests.notebooks import text_differences
from toolkit.cli import app
from toolkit.figures import find_scripts
from toolkit.locations import POINTS
from toolkit.steering import KINDS
from toolkit.table import COLUMNS

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
PAGES = [*DOCS, README]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(oracle [a-z][^`]*)`")
FILE = re.compile(r"`((?:docs|toolkit|tests|recipes|figures|notebooks|benchmarks|data)/[^`* ]+)`")
NAMES = [path.name for path in PAGES]

# What keeps a command short in a test, added to what the page says.
SMALL = {
    "diagnose": "--new-tokens 4 --max-prompts 3 --sample 2 --shared-sample 16 --quiet",
    "finetune": "--max-steps 2 --batch-size 4 --validation 4 --quiet",
    "steer train": "--max-steps 2 --batch-size 4 --validation 4 --quiet",
    "steer fit": "--quiet",
    "steer eval": "--quiet",
    "weights": "",
}
LONG = ("table", "demo", "figures")  # minutes to hours, or into the repository: parsed, not run


def blocks(page, *languages):
    return [m.groups() for m in BLOCK.finditer(page.read_text("utf-8")) if m[1] in languages]


@pytest.fixture
def desk(tmp_path, monkeypatch, tokenizer):
    """A reader's folder: BASE and TUNED are tiny models, files have the names that pages use."""
    base = tiny.make_model("llama", torch.float32)
    for name, model in (("BASE", base), ("TUNED", tiny.tune(base))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rng = np.random.default_rng(0)
    lines = [json.dumps(document) for document in tiny.make_documents(20)]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines))
    for name, n in (("train", 40), ("test", 8), ("f", 40), ("g", 8)):
        rows = [
            {"prompt": tiny.random_text(rng, 5), "response": answer, "answer": answer}
            for answer in rng.choice(["answer1", "answer2"], n)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_python_runs_and_prints_what_the_page_says(page, desk, registries, capsys):
    """In order, in one namespace; a text block behind a Python block is what that prints."""
    names: dict = {"__name__": "__main__"}  # dataclasses look up the module that they are in
    said = None
    for language, code in blocks(page, "python", "text"):
        if language == "python":
            exec(compile(code, page.name, "exec"), names)
            said = capsys.readouterr().out
        else:
            assert said is not None, f"{page.name}: this text follows no code: {code}"
            assert list(text_differences(code, said)) == []
            said = None


@pytest.fixture
def registries():
    """What a page adds to the toolkit is gone after it."""
    known = (COLUMNS, KINDS, POINTS)
    before = [dict(registry) for registry in known]
    yield
    for registry, entries in zip(known, before, strict=True):
        registry.clear()
        registry.update(entries)


def docstring_lines():
    return textwrap.dedent(toolkit.__doc__.split("::\n\n", 1)[1])


def readme_lines():
    return "".join(code for _, code in blocks(README, "python"))


@pytest.mark.parametrize("lines", [docstring_lines, readme_lines], ids=["docstring", "README"])
def test_first_lines_run(lines, monkeypatch, tokenizer):
    """On a tiny pair in place of the one that ships."""
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


def commands(page):
    """The lines of a page's shell blocks, as words; comments are left out."""
    lines = "".join(code for _, code in blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_run(page, desk):
    """In process, in the page's order; what would take long is parsed, and the page says so."""
    for program, *words in commands(page):
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            continue
        assert program == "oracle", f"{page.name} shows {program}, which no test runs"
        name, command, rest = parse(words)
        if name in LONG:
            command.make_context(name, list(rest))
            assert page == README or re.search("minutes|hours", page.read_text("utf-8")), name
            continue
        done = CliRunner().invoke(app, [*words, *SMALL[name].split()])
        assert done.exit_code == 0, f"oracle {' '.join(words)}: {done.output}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_in_sentences_exist(page):
    for said in INLINE.findall(page.read_text("utf-8")):
        words = [word for word in said.split()[1:] if word != "..."]
        name, command, rest = parse(words)
        known = {option for parameter in command.params for option in parameter.opts}
        asked = {word for word in rest if word.startswith("--")}
        assert asked <= known | {"--help"}, said
        if name == "figures":
            find_scripts([word for word in rest if not word.startswith("--") and word.islower()])


def parse(words):
    """The command's name, itself, and what is left of `words`."""
    command, name, rest = typer.main.get_command(app), [], list(words)
    while hasattr(command, "commands") and rest:
        assert rest[0] in command.commands, f"no command is named {rest[0]!r}"
        command = command.commands[rest[0]]
        name.append(rest.pop(0))
    return " ".join(name), command, rest


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_a_page_names_exist(page):
    for name in FILE.findall(page.read_text("utf-8")):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_page_is_listed():
    listed = (ROOT / "docs" / "README.md").read_text("utf-8")
    for page in DOCS:
        assert page.name == "README.md" or f"({page.name})" in listed, page.name


def numbers_sections():
    """Of docs/numbers.md: the columns that each table's section explains, in its order."""
    text = (ROOT / "docs" / "numbers.md").read_text("utf-8")
    parts = re.split(r"^## `([\w/]+)\.csv`$", text, flags=re.MULTILINE)
    return {
        name: [
            column
            for cell in re.findall(r"^\| (`[^|]*) \|", body, re.MULTILINE)
            for column in re.findall(r"`(\w+)`", cell)
        ]
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.mark.parametrize("table", COLUMNS)
def test_numbers_page_explains_every_column(table):
    assert sorted(numbers_sections()[table]) == sorted(COLUMNS[table].split())


def test_numbers_page_explains_no_other_table():
    sections = numbers_sections()
    assert sections.keys() - COLUMNS.keys() == {"rank_set/tried"}
    tried = pd.read_csv(ROOT / "data" / "theory" / "errors-smollm2-sets.csv")
    assert sorted(sections["rank_set/tried"]) == sorted(tried.columns)


def test_numbers_page_says_when_each_misleads():
    text = (ROOT / "docs" / "numbers.md").read_text("utf-8")
    assert text.count("\n*Misleads*") == len(numbers_sections())

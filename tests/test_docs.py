"""What docs and README show is true: code runs, in order, and prints what the page says; commands
run, or at least exist where they would take long; files and figures that are named are there.
"""

import json
import re
import textwrap
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
import torch

import toolkit
from tests.support import tiny
from tests.support.docs import (
    INLINE,
    LONG,
    PYTHON,
    commands,
    filled,
    parse,
    python_differences,
    run_command,
    unknown_options,
)
from tests.support.numbers_page import MARKED, PAGE, with_tables
from toolkit.adapters.kinds import KINDS
from toolkit.jobs.figures import find_scripts
from toolkit.models.locations import POINTS
from toolkit.tables.spec import specs

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
PAGES = [*DOCS, README]
FILE = re.compile(r"`((?:docs|toolkit|tests|recipes|figures|notebooks|benchmarks|data)/[^`* ]+)`")
NAMES = [path.name for path in PAGES]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A reader's folder: BASE and TUNED are tiny models, files have the names that pages use."""
    tiny.save_pair(tmp_path, names=("BASE", "TUNED"))
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
    monkeypatch.setattr("toolkit.planning.timing.SECONDS", 0.02)  # of plans: a rough time will do
    return tmp_path


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_python_runs_and_prints_what_the_page_says(page, desk, registries):
    assert python_differences(page.read_text("utf-8")) == []


@pytest.fixture
def registries():
    """What a page adds to the toolkit is gone after it."""
    known = (specs(), KINDS, POINTS)
    before = [dict(registry) for registry in known]
    yield
    for registry, entries in zip(known, before, strict=True):
        registry.clear()
        registry.update(entries)


def docstring_lines():
    return textwrap.dedent(toolkit.__doc__.split("::\n\n", 1)[1])


def readme_lines():
    return "".join(block["code"] for block in PYTHON.finditer(README.read_text("utf-8")))


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


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_run(page, desk):
    """In process, in the page's order; what would take long is parsed, and the page says so."""
    text = page.read_text("utf-8")
    for program, *words in commands(text):
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            continue
        if program == "torchrun":  # as several processes in tests/runtime/test_processes.py
            name, command, rest = parse(words[words.index("toolkit") + 1 :])
            command.make_context(name, list(rest))
            continue
        assert program == "oracle", f"{page.name} shows {program}, which no test runs"
        name = run_command(words)
        assert name not in LONG or page == README or re.search("minutes|hours", text), name


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_in_sentences_exist(page):
    for said in INLINE.findall(page.read_text("utf-8")):
        words = [word for word in said.split()[1:] if word != "..."]
        assert not unknown_options(words), said
        name, _, rest = parse(words)
        if name == "figures":
            find_scripts([word for word in rest if not word.startswith("--") and word.islower()])


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


@pytest.mark.parametrize("table", specs())
def test_numbers_page_explains_every_column(table):
    assert sorted(numbers_sections()[table]) == sorted(specs()[table].columns)


def test_numbers_page_is_what_the_specs_say():
    text = PAGE.read_text("utf-8")
    assert {name for _, name, _ in MARKED.findall(text)} == specs().keys()
    assert with_tables(text) == text


def test_numbers_page_explains_no_other_table():
    sections = numbers_sections()
    assert sections.keys() - specs().keys() == {"rank_set/tried"}
    tried = pd.read_csv(ROOT / "data" / "theory" / "errors-smollm2-sets.csv")
    assert sorted(sections["rank_set/tried"]) == sorted(tried.columns)


def test_numbers_page_says_when_each_misleads():
    text = (ROOT / "docs" / "numbers.md").read_text("utf-8")
    assert text.count("\n*Misleads*") == len(numbers_sections())


THEORY_TABLES = {
    "How errors grow": "errors-tiny-growth",
    "Post-block in place of post-MLP": "projection-tiny",
}


@pytest.mark.parametrize("section", THEORY_TABLES)
def test_theory_page_explains_every_column(section):
    text = (ROOT / "docs" / "theory.md").read_text("utf-8")
    body = text.split(f"## {section}")[1].split("\n## ")[0]
    frame = pd.read_csv(ROOT / "data" / "theory" / f"{THEORY_TABLES[section]}.csv")
    assert set(re.findall(r"`(\w+)`", body)) >= set(frame.columns)


def test_report_page_has_every_section():
    text = (ROOT / "docs" / "report.md").read_text("utf-8")
    for spec in specs().values():
        assert f"**{spec.title}**" in text, spec.title


def shown(language, code, said=""):
    output = f"\n```text\n{said}```\n" if said else ""
    return f"A sentence.\n\n```{language}\n{code}```\n{output}\nAnother.\n"


def test_python_that_raises_fails():
    with pytest.raises(ZeroDivisionError):
        python_differences(shown("python", "1 / 0\n"))


@pytest.mark.parametrize(
    "said", ["", "three 3.21\n", "four 3.14\n"], ids=["none", "number", "word"]
)
def test_other_output_than_the_page_says_fails(said):
    code = "print('three', 3.14)\n"
    assert python_differences(shown("python", code, said))
    assert python_differences(filled(shown("python", code, said))) == []


def test_output_of_nothing_fails():
    assert python_differences(shown("text", "three\n"))
    assert python_differences(shown("python", "x = 1\n", "three\n"))
    assert filled(shown("python", "x = 1\n", "three\n")) == shown("python", "x = 1\n")


@pytest.mark.parametrize("line", ["table --seed 3", "figures --redraw", "demo --out"])
def test_a_wrong_option_of_a_long_command_fails(line):
    ((_, *words),) = commands(shown("sh", f"oracle {line}  # a comment\n"))
    with pytest.raises(Exception, match=r"[Nn]o such option|requires an argument"):
        run_command(words)


def test_a_wrong_option_or_command_fails(desk):
    with pytest.raises(AssertionError, match="No such option"):
        run_command(["weights", "BASE", "TUNED", "--output", "x"])
    with pytest.raises(AssertionError, match="no command is named 'diagnosis'"):
        run_command(["diagnosis", "BASE"])
    assert unknown_options(["diagnose", "--max-kls", "0.05"]) == {"--max-kls"}

"""The code and the commands of a report run as they stand, in the folder of the run."""

import json
import re
import shlex
from html import unescape

import pytest
import typer

from tests.support import forked, tiny
from tests.support.commands import oracle
from toolkit import Adapters
from toolkit.cli.main import app


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose folders have names that a shell would take apart."""
    root = tiny.save_request(tmp_path_factory.mktemp("it's a run"))
    questions = root / "my questions.jsonl"
    rows = [{"prompt": f"w{n} w5", "answer": "w7"} for n in (9, 11, 12)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = oracle(
        "diagnose", root / "base", root / "tuned", "--data", root / "data.jsonl", "--out",
        root / "run", "--new-tokens", 4, "--sample", 0, "--shared-sample", 0, "--answers",
        questions, "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return root / "run"


@pytest.fixture(scope="module")
def said(finished):
    return json.loads((finished / "report.json").read_text())


def test_the_page_has_what_the_json_has(finished, said):
    blocks = re.findall(r"<pre>(.*?)</pre>", (finished / "report.html").read_text(), re.DOTALL)
    shown = [unescape(block) for block in blocks]
    assert shown[0] == said["code"]
    for step, command in said["commands"].items():
        assert f"# {step}\n{command}\n" in shown[1]


def test_the_code_runs_in_the_folder_of_the_run(finished, said):
    found = forked.run(forked.code, said["code"], folder=finished)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()


def test_every_command_is_one_that_there_is(said):
    assert said["commands"].keys() == {"refit", "distil", "judge", "export"}
    for command in said["commands"].values():
        program, *words = shlex.split(command)
        found = typer.main.get_command(app)
        while hasattr(found, "commands"):
            found, words = found.commands[words[0]], words[1:]
        assert program == "oracle"
        found.make_context(found.name, list(words))  # raises where it does not know an option


@pytest.mark.parametrize("step", ["refit", "judge", "export"])
def test_commands_run_in_the_folder_of_the_run(finished, said, monkeypatch, step):
    monkeypatch.chdir(finished)
    result = oracle(*shlex.split(said["commands"][step])[1:])
    assert result.exit_code == 0, result.output
    if step == "refit":
        ours, again = (Adapters.from_pretrained(name) for name in ("adapters", "refitted"))
        assert (again.location, again.kind, again.rank) == (ours.location, ours.kind, ours.rank)

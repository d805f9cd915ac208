"""The code of a page runs: Python in order, in one namespace; commands in process.

    python -m tests.support.docs docs/claims.md

writes what the page's Python prints now into the text blocks behind it.
"""

import contextlib
import io
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from tests.support.notebooks import text_differences
from toolkit.cli.main import app

ROOT = Path(__file__).parents[2]
# A Python block, and what stands right behind it as its output.
PYTHON = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<said>.*?)^```\n)?", re.DOTALL | re.MULTILINE
)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(oracle [a-z][^`]*)`")

# What keeps a command short in a test, added to what the page says.
SMALL = {
    "diagnose": "--new-tokens 4 --max-prompts 3 --sample 2 --shared-sample 16 --quiet",
    "finetune": "--max-steps 2 --batch-size 4 --validation 4 --quiet",
    "steer train": "--max-steps 2 --batch-size 4 --validation 4 --quiet",
    "steer fit": "--quiet",
    "steer distil": "--steps 2 --batch-size 2 --new-tokens 4 --quiet",
    "steer eval": "--quiet",
    "weights": "",
    "compare": "--quiet",
    "export": "",
}
ESTIMATE = "--steps 2 --quiet"  # of `diagnose` without a fine-tune
LONG = ("table", "demo", "figures")  # minutes to hours, or into the repository: parsed, not run


def python_differences(text: str) -> list[str]:
    """Where the page says other than its Python prints; what is printed must be shown."""
    shown = list(PYTHON.finditer(text))
    loose = text.count("```text\n") - sum(block["said"] is not None for block in shown)
    found = [f"{loose} text blocks stand behind no Python block"] if loose else []
    for block, printed in zip(shown, _run([block["code"] for block in shown]), strict=True):
        found += text_differences(block["said"] or "", printed)
    return found


def filled(text: str) -> str:
    """The page with what its Python prints now."""
    printed = _run([block["code"] for block in PYTHON.finditer(text)])

    def with_output(block: re.Match[str]) -> str:
        output = next(printed)
        code = f"```python\n{block['code']}```\n"
        return f"{code}\n```text\n{output}```\n" if output else code

    return PYTHON.sub(with_output, text)


def _run(blocks: list[str]) -> Iterator[str]:
    """What each block prints, without blanks at the ends of lines."""
    names: dict[str, Any] = {"__name__": "__main__"}  # dataclasses ask which module they are in
    for place, code in enumerate(blocks, 1):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, f"Python block {place}", "exec"), names)
        yield "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def commands(text: str) -> list[list[str]]:
    """The lines of a page's shell blocks, as words; comments are left out."""
    lines = "".join(SHELL.findall(text)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words: list[str]) -> str:
    """Run `oracle` with `words`, or parse them where that is long; the command's name."""
    name, command, rest = parse(words)
    if name in LONG:
        command.make_context(name, list(rest))
    else:
        small = ESTIMATE if "--train" in words and name == "diagnose" else SMALL[name]
        done = CliRunner().invoke(app, [*words, *small.split()])
        assert done.exit_code == 0, f"oracle {' '.join(words)}: {done.output}"
    return name


def parse(words: list[str]) -> tuple[str, Any, list[str]]:
    """The command's name, itself, and what is left of `words`."""
    command: Any = typer.main.get_command(app)
    name, rest = [], list(words)
    while hasattr(command, "commands") and rest:
        assert rest[0] in command.commands, f"no command is named {rest[0]!r}"
        command = command.commands[rest[0]]
        name.append(rest.pop(0))
    return " ".join(name), command, rest


def unknown_options(words: list[str]) -> set[str]:
    """Options among `words` that the command does not have: of one named in a sentence."""
    _, command, rest = parse(words)
    known = {option for parameter in command.params for option in parameter.opts}
    return {word for word in rest if word.startswith("--")} - known - {"--help"}


def main(pages: list[Path]) -> None:
    """From a folder that is thrown away: pages save what they make."""
    for page in pages:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            Path("data").symlink_to(ROOT / "data")
            page.write_text(filled(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main([Path(name).resolve() for name in sys.argv[1:]])

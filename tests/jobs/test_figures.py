"""Figures: every script draws what is committed; the runner says what is wrong."""

import ast
import re
import shlex
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import typer
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from typer.testing import CliRunner

from toolkit.cli.main import app
from toolkit.errors import InputError
from toolkit.jobs import figures
from toolkit.tables.drawing import STYLE

ROOT = figures.ROOT
PATHS = sorted((ROOT / "figures").glob("*.py"))
LONGEST = 120  # lines of a script
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_script_says_what_it_shows_and_what_makes_its_data(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= LONGEST
    script = figures.load_script(path)
    summary, _, rest = script.about.partition("\n\n")
    assert summary.endswith(".")
    assert rest
    assert isinstance(script.made_by, tuple)
    for command in script.made_by:
        program, what, *arguments = shlex.split(command)
        options = {word for word in arguments if word.startswith("--")}
        if program == "oracle":
            assert options <= {o for parameter in COMMANDS[what].params for o in parameter.opts}
        else:
            assert program in ("python", "bash")
            recipe = (ROOT / what).read_text("utf-8")
            assert all(f'"{option}"' in recipe for option in options)
    imported = {name for node in ast.walk(ast.parse(text)) for name in _imported(node)}
    assert not imported & {"torch", "transformers", "toolkit.models.pair", "toolkit.ModelPair"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_committed_figures_are_what_drawing_gives(path, tmp_path):
    """Words and their order exactly, lines within a tenth of a point, pixels on average.

    Another machine rounds the last digits its own way.
    """
    drawn = figures.redraw(figures.load_script(path), tmp_path)
    assert drawn
    for ours in drawn:
        committed = ROOT / "figures" / ours.name
        assert committed.is_file(), f"draw it: oracle figures {path.stem}"
        if ours.suffix == ".svg":
            ours_words, ours_numbers = _svg(ours)
            words, numbers = _svg(committed)
            assert ours_words == words
            np.testing.assert_allclose(ours_numbers, numbers, rtol=0, atol=0.1)
        else:
            ours_pixels, pixels = imread(ours), imread(committed)
            assert ours_pixels.shape == pixels.shape
            assert np.abs(ours_pixels - pixels).mean() < 0.01


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_nothing_is_cut_off(path):
    """Every word lies within its figure."""
    for figure in figures.draw_figures(figures.load_script(path)).values():
        with matplotlib.rc_context(STYLE):
            figure.draw_without_rendering()
        for text in _words(figure):
            box = text.get_window_extent()
            assert box.x0 >= -1, text.get_text()
            assert box.y0 >= -1, text.get_text()
            assert box.x1 <= figure.bbox.width + 1, text.get_text()
            assert box.y1 <= figure.bbox.height + 1, text.get_text()


def test_no_file_is_left_of_a_figure_that_no_script_draws():
    names = {path.stem for path in PATHS}
    for path in (ROOT / "figures").iterdir():
        if path.suffix in (".svg", ".png"):
            assert path.stem.partition("-")[0] in names


def _words(figure):
    """Every text but tick labels, of which axes keep some beyond their limits."""
    ticks = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in axis.findobj(Text)
        if label not in (axis.label, axis.get_offset_text()) or not axes.axison
    }
    found = figure.findobj(Text)
    return [text for text in found if text not in ticks and text.get_text().strip()]


def _imported(node):
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
    return []


def _svg(path):
    """What an SVG file says without its numbers, and its numbers; names of elements are hashes."""
    text = re.sub(r"\b[a-z][0-9a-f]{10}\b", "name", path.read_text("utf-8"))
    text = re.sub(r'"data:[^"]+"', '"picture"', text)
    return NUMBER.sub("0", text), np.array(NUMBER.findall(text), float)


# The runner, on scripts of our own

GOOD = '''"""A line.

Of two numbers.
"""
from matplotlib.figure import Figure
MADE_BY = ({command!r},)
def draw(data):
    figure = Figure()
    figure.subplots().plot([float(word) for word in (data / "numbers.txt").read_text().split()])
    return {result}
'''


@pytest.fixture
def checkout(tmp_path):
    """A folder like the repository's root, and a function that puts a script into it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "figures").mkdir()

    def write(name, command="python make.py", result="figure"):
        text = GOOD.format(command=command, result=result)
        (tmp_path / "figures" / f"{name}.py").write_text(text)

    maker = (
        "import pathlib, sys\nprint(sys.argv)\npathlib.Path('data/numbers.txt').write_text('1 2')\n"
    )
    (tmp_path / "make.py").write_text(maker)
    return tmp_path, write


def test_data_are_made_and_drawn_the_same_bytes_every_time(checkout, tmp_path):
    root, write = checkout
    write("line")
    write("pair", result="{'one': figure, 'two': Figure()}")
    scripts = figures.find_scripts(root=root)
    said = []
    figures.recompute(scripts, said.append)
    assert said == ["running: python make.py"]  # once, though both ask for it
    names = [path.name for script in scripts for path in figures.redraw(script)]
    assert names == [f"{stem}.{kind}" for stem in ("line", "pair-one", "pair-two")
                     for kind in ("svg", "png")]  # fmt: skip
    again = [path for script in scripts for path in figures.redraw(script, tmp_path / "again")]
    for path in again:
        assert path.read_bytes() == (root / "figures" / path.name).read_bytes()


def test_missing_data_are_named_with_what_makes_them(checkout):
    root, write = checkout
    write("line")
    (script,) = figures.find_scripts(["line"], root)
    with pytest.raises(InputError, match=r"numbers\.txt is not here.*git.*`python make\.py`"):
        figures.redraw(script)
    assert not list((root / "figures").glob("*.svg"))


def test_tables_that_are_missing_are_named_with_what_makes_them(checkout):
    root, write = checkout
    write("line", result="read_tables(data)")
    path = root / "figures" / "line.py"
    text = path.read_text()
    path.write_text(text.replace("MADE", "from toolkit.tables.store import read_tables\nMADE", 1))
    (root / "data" / "numbers.txt").write_text("1 2")
    with pytest.raises(InputError, match=r"steerability\.csv.*`python make\.py`"):
        figures.redraw(*figures.find_scripts(root=root))


def test_a_command_that_fails_is_named(checkout):
    root, write = checkout
    write("line", command="python -c 'raise SystemExit(3)'")
    with pytest.raises(InputError, match=r"SystemExit\(3\).*failed with exit code 3"):
        figures.recompute(figures.find_scripts(root=root), lambda line: None)


def test_a_folder_without_scripts_and_an_unknown_name_are_refused(checkout, tmp_path):
    root, write = checkout
    write("line")
    with pytest.raises(InputError, match="'lime': expected any of line"):
        figures.find_scripts(["line", "lime"], root)
    with pytest.raises(InputError, match="checkout of the repository"):
        figures.find_scripts(root=tmp_path / "elsewhere")


def test_programs_are_those_of_this_environment():
    python = figures.as_arguments("python a.py")[0]
    assert Path(python).is_file()
    assert figures.as_arguments("python a.py 'b c'") == [python, "a.py", "b c"]
    assert figures.as_arguments("oracle table --out x")[:4] == [python, "-m", "toolkit", "table"]
    assert figures.as_arguments("bash x.sh") == ["bash", "x.sh"]


def test_commands_run_in_this_environment_and_this_checkout(checkout, monkeypatch):
    """Also the `python` that a shell recipe calls, and whatever package is installed."""
    root, write = checkout
    (root / "toolkit").mkdir()
    (root / "toolkit" / "__init__.py").write_text("")
    (root / "which.py").write_text(
        "import sys, toolkit\n"
        "open('data/numbers.txt', 'w').write(f'{sys.executable}\\n{toolkit.__file__}')\n"
    )
    (root / "which.sh").write_text("python which.py\n")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    for command in ("python which.py", "bash which.sh"):
        write("line", command=command)
        figures.recompute(figures.find_scripts(root=root), lambda line: None)
        python, package = (root / "data" / "numbers.txt").read_text().split("\n")
        assert Path(python).resolve() == Path(sys.executable).resolve()
        assert Path(package).parent.parent == root
        (root / "data" / "numbers.txt").unlink()


def test_the_command_lists_draws_and_refuses(tmp_path):
    listed = CliRunner().invoke(app, ["figures", "--list"])
    assert listed.exit_code == 0
    assert all(f"{path.stem}: " in listed.output for path in PATHS)
    drawn = CliRunner().invoke(app, ["figures", "demo_steerability", "--out", str(tmp_path)])
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "demo_steerability.svg").is_file()
    assert str(tmp_path / "demo_steerability.png") in drawn.output
    refused = CliRunner().invoke(app, ["figures", "nope"])
    assert refused.exit_code == 2
    assert "expected any of" in refused.output


def test_one_figure_or_several_by_suffix(checkout):
    root, write = checkout
    (root / "data" / "numbers.txt").write_text("1 2")
    write("line")
    write("pair", result="{'one': figure}")
    line, pair = map(figures.draw_figures, figures.find_scripts(root=root))
    assert list(line) == ["line"]
    assert list(pair) == ["pair-one"]
    assert isinstance(line["line"], Figure)

"""Rooms read only the rooms before them, and no two files read each other."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import toolkit
from tests.conftest import SLOW

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "toolkit"
MOST_ENTRIES, MOST_LINES, MOST_PARAMETERS = 24, 400, 8
FILES = sorted(PACKAGE.rglob("*.py"))


def rooms():
    """The order of the rooms, as the package's own docstring gives it."""
    listed = toolkit.__doc__.split("those before it:", 1)[1].split(".", 1)[0]
    return re.findall(r"\w+", listed)


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """The toolkit's modules that `path` imports anywhere, inside functions too."""
    names = {module_of(other) for other in FILES}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "toolkit":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in names else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("toolkit"))


def room_of(module):
    return module.split(".")[1] if "." in module else ""


def test_every_room_is_listed_once():
    found = {room_of(module_of(path)) for path in FILES} - {"", "__main__"}
    assert sorted(rooms()) == sorted(found)


def test_rooms_read_only_the_rooms_before_them():
    place = {room: index for index, room in enumerate(rooms())}
    wrong = [
        (module_of(path), other)
        for path in FILES
        for other in imported(path)
        if (room := room_of(module_of(path))) in place
        and (other == "toolkit" or place[room_of(other)] > place[room])
    ]
    assert wrong == []


def test_no_files_read_each_other():
    """A chapter (`__init__`) reads its files; they read the chapters of other rooms at most."""
    graph = {module_of(path): set(imported(path)) for path in FILES}
    assert list(TopologicalSorter(graph).static_order())


def test_every_room_has_a_chapter_and_a_public_list():
    for path in PACKAGE.glob("*/__init__.py"):
        tree = ast.parse(path.read_text("utf-8"))
        assert len(ast.get_docstring(tree).split()) >= 12, path
        assert any(
            isinstance(node, ast.Assign) and node.targets[0].id == "__all__" for node in tree.body
        ), path


def test_the_house_is_small_enough_to_enter():
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MOST_ENTRIES
    tests = list((ROOT / "tests").rglob("*.py"))
    long = {
        str(path.relative_to(ROOT)): n
        for path in (*FILES, *tests)
        if (n := len(path.read_text("utf-8").splitlines())) > MOST_LINES
    }
    assert long == {}


def parameters_of(function):
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def test_long_parameter_lists_are_excused():
    """A function with more than eight parameters says why on the line of its `def`."""
    unexcused = []
    for path in FILES:
        text = path.read_text("utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.FunctionDef)
                and len(parameters_of(node)) > MOST_PARAMETERS
                and "# many parameters:" not in lines[node.lineno - 1] + lines[node.lineno - 2]
            ):
                unexcused.append(f"{module_of(path)}.{node.name}")
    assert unexcused == []


def test_slow_files_exist():
    """A name that no file has would leave out nothing."""
    names = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    assert names >= SLOW

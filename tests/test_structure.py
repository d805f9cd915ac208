"""The reading order of CONTRIBUTING.md: every part of the package, behind what it reads."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "toolkit"


def reading_order():
    """The files and folders that the page lists; what stands in brackets is inside a folder."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    listed = text.split("in it:")[1].split("\n- ")[0]
    return re.findall(r"`(\w+)/?`", re.sub(r"\([^)]*\)", "", listed))


def imports():
    """By part of the package, the other parts that are imported when it is."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        read = found.setdefault(part, set())
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("toolkit"):
                _, *inside = node.module.split(".")
                read |= {inside[0]} if inside else {alias.name for alias in node.names}
        read.discard(part)
    return {part: read for part, read in found.items() if not part.startswith("__")}


def test_every_part_is_listed_once():
    assert sorted(reading_order()) == sorted(imports())


def test_imports_point_upward():
    place = {part: i for i, part in enumerate(reading_order())}
    downward = [
        (part, other) for part, read in imports().items() for other in read & place.keys()
        if place[other] > place[part]
    ]  # fmt: skip
    assert downward == []

"""Builds the documentation's site from the pages, the notebooks and the docstrings.

    make docs        # into site/; open site/index.html

The README is its first page, ``docs/README.md`` gives the order of the others, and each room of
the package has a page with what its chapter exports. Every link is checked: a broken one ends the
build.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES, SITE = ROOT / "build" / "pages", ROOT / "site"
LISTED = re.compile(r"^\| \[(?P<page>[\w-]+\.md)\]", re.MULTILINE)
# A page that is named in a sentence, and code blocks, in which nothing is a link.
NAMED = re.compile(
    r"(?P<block>^```.*?^```$)|`docs/(?P<page>(?!README)[\w-]+)\.md`", re.DOTALL | re.MULTILINE
)
ROOMS = re.compile(r"those before it:(?P<rooms>.*?)\.", re.DOTALL)


def listed_pages() -> list[str]:
    """Return the pages in the order in which ``docs/README.md`` lists them."""
    return LISTED.findall((ROOT / "docs" / "README.md").read_text("utf-8"))


def linked(text: str) -> str:
    """Make links of the pages that `text` names."""

    def link(found: re.Match[str]) -> str:
        page = found["page"]
        return found["block"] or f"[`docs/{page}.md`]({page}.md)"

    return NAMED.sub(link, text)


def rooms() -> list[str]:
    """Return the package's rooms in their order."""
    found = ROOMS.search((ROOT / "toolkit" / "__init__.py").read_text("utf-8"))
    assert found
    return [name for name in re.findall(r"\w+", found["rooms"]) if name != "errors"]


def exported(room: str) -> Iterator[str]:
    """Yield the full names of what a room's chapter exports, where they are defined.

    What it lists without importing are files of the room.
    """
    tree = ast.parse((ROOT / "toolkit" / room / "__init__.py").read_text("utf-8"))
    defined = {
        alias.name: f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    (names,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    for name in ast.literal_eval(names):
        yield defined.get(name, f"toolkit.{room}.{name}")


def api_page(room: str) -> str:
    """Write a room's page: its chapter, and the reference of what it exports."""
    tree = ast.parse((ROOT / "toolkit" / room / "__init__.py").read_text("utf-8"))
    parts = [f"# toolkit.{room}", ast.get_docstring(tree) or ""]
    return "\n\n".join([*parts, *(f"::: {name}" for name in exported(room))]) + "\n"


def assemble() -> list[dict[str, object]]:
    """Put all pages into ``build/pages``; return the navigation."""
    shutil.rmtree(PAGES, ignore_errors=True)
    (PAGES / "api").mkdir(parents=True)
    (PAGES / "index.md").write_text(linked((ROOT / "README.md").read_text("utf-8")), "utf-8")
    for name in ("figures", "notebooks"):
        shutil.copytree(ROOT / name, PAGES / name, ignore=shutil.ignore_patterns("*.py", "*.svg"))
    for page in listed_pages():
        text = (ROOT / "docs" / page).read_text("utf-8")
        (PAGES / page).write_text(linked(text), "utf-8")
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        (PAGES / name.lower()).write_text(linked((ROOT / name).read_text("utf-8")), "utf-8")
    for room in rooms():
        (PAGES / "api" / f"{room}.md").write_text(api_page(room), "utf-8")
    notebooks = sorted(path.name for path in (PAGES / "notebooks").glob("*.ipynb"))
    return [
        {"Start": "index.md"},
        {"Notebooks": [f"notebooks/{name}" for name in notebooks]},
        {"Pages": listed_pages()},
        {"Reference": [f"api/{room}.md" for room in rooms()]},
        {"The project": ["contributing.md", "changelog.md"]},
    ]


def main() -> int:
    settings = {
        "INHERIT": str(ROOT / "docs" / "mkdocs.yml"),
        "docs_dir": str(PAGES),
        "site_dir": str(SITE),
        "nav": assemble(),
    }
    config = PAGES.parent / "mkdocs.yml"
    config.write_text(json.dumps(settings, indent=2), "utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(config)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

"""The documentation's site: its pages, its reference, and (where mkdocs is installed) its links."""

import importlib
import importlib.util
import pkgutil
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE = runpy.run_path(str(ROOT / "docs" / "site.py"))


def test_the_reference_names_what_every_room_exports():
    for room in SITE["rooms"]():
        module = importlib.import_module(f"toolkit.{room}")
        listed = {name.rpartition(".")[2]: name for name in SITE["exported"](room)}
        assert sorted(listed) == sorted(module.__all__), room
        for name, full in listed.items():
            assert pkgutil.resolve_name(full) is getattr(module, name)


def test_pages_that_a_sentence_names_become_links_and_code_stays():
    text = "See `docs/numbers.md`.\n\n```sh\ncat `docs/report.md`\n```\n"
    found = SITE["linked"](text)
    assert found.startswith("See [`docs/numbers.md`](numbers.md).")
    assert found.endswith("```sh\ncat `docs/report.md`\n```\n")


def test_every_page_that_is_named_is_one_of_the_sites():
    pages = {page.removesuffix(".md") for page in SITE["listed_pages"]()}
    assert "numbers" in pages
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for found in SITE["NAMED"].finditer(path.read_text("utf-8")):
            assert found["block"] or found["page"] in pages, f"{path.name} names {found['page']}"


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed (make docs)"
)
def test_the_site_is_built_and_no_link_is_broken():
    subprocess.run([sys.executable, ROOT / "docs" / "site.py"], check=True)
    assert (ROOT / "site" / "index.html").is_file()

"""A wheel and an sdist hold what the commands need, wherever they are installed."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.support.commands import oracle
from toolkit.runtime import shipped

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
BUILD = """
from setuptools import build_meta
print(build_meta.build_sdist("made"))
print(build_meta.build_wheel("made"))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An sdist and a wheel of a copy of what they are made from, by the setuptools that is here."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "toolkit", folder / "toolkit", ignore=shutil.ignore_patterns("*.pyc"))
    for patterns in PROJECT["tool"]["setuptools"]["data-files"].values():
        for path in (path for pattern in patterns for path in ROOT.glob(pattern)):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, check=True)
    return folder / "made"


@pytest.fixture
def wheel(made):
    return next(made.glob("*.whl"))


def test_an_sdist_holds_what_its_wheel_is_made_from(made):
    with tarfile.open(next(made.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    patterns = PROJECT["tool"]["setuptools"]["data-files"].values()
    data = {str(p.relative_to(ROOT)) for some in patterns for q in some for p in ROOT.glob(q)}
    assert data | {"pyproject.toml", "README.md", "LICENSE", "toolkit/report/report.html"} <= names


def test_a_wheel_holds_the_code_its_templates_and_the_pair_that_ships(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    source = (path for path in (ROOT / "toolkit").rglob("*") if path.is_file())
    ours = {str(path.relative_to(ROOT)) for path in source if "__pycache__" not in path.parts}
    assert ours <= names
    assert "toolkit/py.typed" in names
    assert not any(name.startswith(("tests/", "data/")) for name in names)


def test_what_ships_is_found_where_pip_puts_it(wheel, tmp_path, monkeypatch):
    """Installed, there is no checkout: files are under the environment's ``share``."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (data,) = tmp_path.glob("*.data/data")
    monkeypatch.setattr(sys, "prefix", str(data))
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "toolkit" / "runtime" / "shipped.py"))
    for name in (shipped.ADAPTER, shipped.PROMPTS, shipped.ELSEWHERE, "tiny-listops/base"):
        found = shipped.shipped(name)
        assert data in found.parents
        ours = ROOT / "data" / name
        kept = [found] if ours.is_file() else sorted(found.iterdir())
        originals = [ours] if ours.is_file() else sorted(ours.iterdir())
        assert [p.read_bytes() for p in kept] == [p.read_bytes() for p in originals]


def test_the_version_is_one(wheel):
    version = PROJECT["project"]["version"]
    assert metadata.version("oracle-toolkit") == version
    assert oracle("--version").stdout.strip() == version
    assert f"-{version}-" in wheel.name
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")

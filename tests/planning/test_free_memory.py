"""What is free, and what is said where that is too little."""

import re

import psutil
import pytest
from typer.main import get_command

from tests.support import forked, tiny
from toolkit.cli.main import app
from toolkit.errors import InputError
from toolkit.planning.free_memory import (
    HELP,
    OFFLOAD,
    Place,
    _cgroup,
    available_memory,
    gib,
    places,
    require_memory,
)
from toolkit.planning.memory import Memory, Part, memory
from toolkit.planning.shapes import ModelShape
from toolkit.planning.workload import BatchShape, Workload

JOB = Workload((BatchShape(2, 8, 14),), prompts=(), steered=(), everywhere=0, single=False)


def test_available_is_no_more_than_the_machine_has():
    assert 0 < available_memory() <= psutil.virtual_memory().total


def test_a_limit_of_the_process_is_respected():
    code = (
        "import resource, toolkit.planning.free_memory as f, psutil\n"
        "limit = psutil.Process().memory_info().vms + 2**28\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "assert 0 < f.available_memory() <= 2**28"
    )
    ended = forked.run(forked.code, code)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("line", "folder", "files", "prefix"),
    [
        ("0::/one/two", "one", ("memory.max", "memory.current"), ""),
        (
            "4:memory:/one/two",
            "memory/one/two",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            "total_",
        ),
        ("4:memory:/elsewhere", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), ""),
    ],
)
def test_the_limit_of_a_group_or_of_one_around_it_is_respected(
    line, folder, files, prefix, tmp_path
):
    """Of the 1200 bytes in use 200 are files', which can be dropped."""
    (tmp_path / "membership").write_text(f"9:cpu:/\n{line}\n")
    assert _cgroup(tmp_path, tmp_path / "membership") == []
    group = tmp_path / folder
    group.mkdir(parents=True)
    for name, content in zip(files, ("5000\n", "1200\n"), strict=True):
        (group / name).write_text(content)
    (group / "memory.stat").write_text(f"{prefix}active_file 50\n{prefix}inactive_file 150\nx 7\n")
    expected = 3800.0 + (200 if prefix or line.startswith("0") else 0)
    assert _cgroup(tmp_path, tmp_path / "membership") == [expected]
    (group / files[0]).write_text("max\n")
    assert _cgroup(tmp_path, tmp_path / "membership") == []


def test_too_little_memory_is_said_with_what_helps():
    needed = Memory(
        (
            Part("weights", 3 * 2**30),
            Part("activations", 5 * 2**30, ("march",)),
            Part("generation", 2**30, ("replacement",)),
        )
    )
    require_memory([Place("memory", needed, 8 * 2**30)])
    with pytest.raises(InputError, match=r"needs about 8\.0 GiB") as raised:
        require_memory([Place("memory", needed, 7 * 2**30)])
    said = str(raised.value)
    assert "7.0 GiB are free" in said
    assert "5.0 GiB, are activations" in said
    assert HELP["activations"] in said
    assert len(said.splitlines()) == 1


def test_statistics_are_on_the_machine_and_the_rest_where_the_models_are(monkeypatch):
    monkeypatch.setattr(
        "toolkit.planning.free_memory.available_memory", lambda device="cpu": 2.0**30
    )
    shape = ModelShape.of_config(tiny.FAMILIES["llama"]())
    needed = memory(shape, JOB, 4)
    (only,) = places(needed, "cpu")
    assert only.needed == needed
    there, here = places(needed, "cuda:0")
    assert there.name == "memory of cuda:0"
    assert {part.name for part in here.needed.parts} == {"moments", "analyses", "freed"}
    assert set(there.needed.parts) | set(here.needed.parts) == set(needed.parts)
    assert there.needed.peak + here.needed.peak >= needed.peak


def test_every_part_has_help_whose_options_exist():
    shape = ModelShape.of_config(tiny.FAMILIES["llama"]())
    parts = {part.name for part in memory(shape, JOB, 4).parts}
    assert parts == HELP.keys()
    command = get_command(app).commands["diagnose"]
    known = {name for parameter in command.params for name in parameter.opts}
    named = set(re.findall(r"--[a-z-]+", " ".join(HELP.values())))
    assert named - {OFFLOAD} <= known


def test_bytes_in_words():
    assert gib(3 * 2**29) == "1.5 GiB"
    assert gib(3 * 2**19) == "1.5 MiB"

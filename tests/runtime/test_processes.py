"""Several processes give one run: the same sums, the same tasks, the same numbers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.support import forked, tiny
from toolkit.errors import InputError
from toolkit.runtime.processes import ALONE, Processes, Rota
from toolkit.tables.store import read_tables

PROGRAM = "tests.support.pictures"  # `oracle` without its pictures
QUICK = ("--new-tokens", "4", "--sample", "2", "--shared-sample", "8", "--batch-tokens", "128")
QUICK += ("--cross-fit", "3")


def test_shares_cost_alike_and_the_first_process_leads():
    costs = [5, 9, 1, 7, 3, 8, 2, 9]
    for size in (1, 2, 3, 11):
        parts = [Processes(rank, size).shares(costs, lead=4) for rank in range(size)]
        assert sorted(i for part in parts for i in part) == list(range(len(costs)))
        assert parts[0][0] == 4
        loads = [sum(costs[i] for i in part) for part in parts]
        assert max(loads) - min(loads) <= max(costs)


def test_a_dear_task_stands_alone_and_like_ones_take_turns():
    two = Processes(0, 2)
    assert two.owners([1, 5, 1, 1, 1, 1]) == [1, 0, 1, 1, 1, 1]
    assert two.owners([1.0] * 5) == [0, 1, 0, 1, 0]


class Recorded(Processes):
    """The first of two processes, which is told what the other one found."""

    def gathered(self, found):
        self.ran.append(len(found))
        return [found, [("theirs", 0.001)] * (4 - len(found))]


def test_what_took_long_last_time_is_done_beside_the_rest():
    """Four tasks, of which the first takes long: from the second round on it is alone."""
    rank = Recorded(0, 2)
    object.__setattr__(rank, "ran", [])
    rota = Rota(rank)
    tasks = [lambda: time.sleep(0.05), lambda: 1, lambda: 2, lambda: 3]
    assert rota.spread(tasks) == [None, "theirs", 2, "theirs"]
    assert rota.spread(tasks) == [None, "theirs", "theirs", "theirs"]
    assert rank.ran == [2, 1]


def test_alone_nothing_is_waited_for():
    assert ALONE.first
    assert ALONE.gathered(3) == [3]
    assert ALONE.spread([lambda: 1, lambda: 2]) == [1, 2]
    total = torch.ones(2)
    ALONE.add(total)
    assert total.tolist() == [1, 1]
    with pytest.raises(InputError, match="said"):
        ALONE.from_first(lambda: (_ for _ in ()).throw(InputError("said")))


@pytest.fixture(scope="module")
def request_folder(tmp_path_factory):
    """A tiny float32 pair on disk, documents, questions, and two rounds of other prompts."""
    folder = tiny.save_request(tmp_path_factory.mktemp("pair"), n_documents=24)
    asked = [{"prompt": f"w{i} w7 w{i + 1}", "answer": f"w{i}"} for i in range(6, 24)]
    for name, rows in (("answers", asked[:3]), ("away", [{"prompt": a["prompt"]} for a in asked])):
        lines = (json.dumps(row) for row in rows)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def place(tmp_path_factory):
    """Make the folder in which processes print."""
    return tmp_path_factory.mktemp("printed")


def words(folder, out):
    """Return the words that ``oracle`` is asked with."""
    paths = [str(folder / name) for name in ("base", "tuned")]
    files = {"data": "data", "answers": "answers", "elsewhere": "away"}
    data = [word for n, f in files.items() for word in (f"--{n}", str(folder / f"{f}.jsonl"))]
    return ["diagnose", *paths, *data, "--out", str(out), *QUICK]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def torchrun(folder, out, n):
    """``oracle diagnose`` in n processes that ``torchrun`` starts, each from nothing."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={n}"]
    launcher += [f"--master-port={free_port()}", "-m", PROGRAM]
    return subprocess.Popen(
        [sys.executable, *launcher, *words(folder, out)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def forks(folder, out, n, place):
    """In n processes with what ``torchrun`` tells each: exit codes, and what all print."""
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started, files = [], []
    for rank in map(str, range(n)):
        files.append([place / f"{stream}-{rank}" for stream in ("stdout", "stderr")])
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(n)}
        said = tuple(map(str, files[-1]))
        asked = (forked.module, PROGRAM, *words(folder, out))
        started.append(forked.start(*asked, environment=own, said=said))
    for process in started:
        process.join(300)
    printed = ("".join(file.read_text() for file in some) for some in zip(*files, strict=True))
    return [process.exitcode for process in started], *printed


def alone_in(folder, out):
    done = forked.run(forked.module, PROGRAM, *words(folder, out))
    assert done.returncode == 0, done.stderr
    return done


def assert_same_tables(ours, theirs):
    ours, theirs = (read_tables(folder / "tables") for folder in (ours, theirs))
    assert {"task", "elsewhere", "response_loss", "distributions"} <= ours.keys() == theirs.keys()
    for name, table in ours.items():
        pd.testing.assert_frame_equal(
            table.frame, theirs[name].frame, rtol=1e-12, atol=1e-12, check_dtype=False, obj=name
        )


@pytest.fixture(scope="module")
def alone(request_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    alone_in(request_folder, out)
    return out


def assert_is_one_run(out, alone, printed):
    assert_same_tables(out, alone)
    assert printed.count("report:") == 1
    left = [path.name for path in out.iterdir()]
    assert not {"march", "replacement", "request.json"} & set(left)


def test_several_processes_give_the_numbers_of_one(request_folder, alone, tmp_path):
    running = torchrun(request_folder, tmp_path / "run", n=2)
    printed, errors = running.communicate(timeout=300)
    assert running.returncode == 0, errors
    assert_is_one_run(tmp_path / "run", alone, printed)


def test_three_processes_give_the_numbers_of_one(request_folder, alone, tmp_path, place):
    codes, printed, errors = forks(request_folder, tmp_path / "run", 3, place)
    assert codes == [0, 0, 0], errors
    assert_is_one_run(tmp_path / "run", alone, printed)


def test_bad_input_is_said_once(request_folder, tmp_path, place):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    codes, _, errors = forks(request_folder, tmp_path / "run", 2, place)
    assert all(codes)
    assert errors.count("oracle: ") == 1
    assert "exists and is not a run" in errors


def test_a_process_that_dies_ends_the_run_which_can_go_on(request_folder, alone, tmp_path):
    """One of two is killed in the march; what is left goes on, in one process."""
    out = tmp_path / "run"
    running = torchrun(request_folder, out, n=2)
    passed = tmp_path / "run.partial" / "march" / "passed.json"
    try:
        while not passed.is_file():
            assert running.poll() is None, running.communicate()
            time.sleep(0.01)
        os.kill(_children(running.pid)[1], signal.SIGKILL)
        said = running.communicate(timeout=120)[1]
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode != 0
    assert "goes on from" in said
    assert not out.exists()
    assert "going on from" in alone_in(request_folder, out).stderr
    assert_same_tables(out, alone)


def _children(pid):
    tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(task) for task in tasks]

"""Freed tensors are given back to the system, and what an interrupted call holds is freed."""

import ctypes
import json
import subprocess
import sys

import pytest

from toolkit.runtime.heap import freed_if_interrupted

# In a process of its own: in one that has run for long, the heap holds free pages enough for all
# that is asked for here, and nothing grows.
PROGRAM = """
import ctypes, json, psutil, torch
from toolkit.runtime.heap import release_freed

resident = lambda: psutil.Process().memory_info().rss
ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD at its most: as after a large tensor
before = resident()
tensors = [torch.ones(2**18) for _ in range(200)]  # of 1 MiB
kept = tensors[::20]
del tensors
held = resident() - before
release_freed()
whole = all(bool((tensor == 1).all()) for tensor in kept)
print(json.dumps({"held": held, "after": resident() - before, "whole": whole}))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_freed_memory_is_given_back():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["held"] > 150 * 2**20, "the C library keeps nothing: the call is not needed"
    assert found["after"] < 30 * 2**20
    assert found["whole"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_an_interrupted_call_holds_nothing(stop):
    """Its suspended generators are closed too; an error's frames stay, to be looked at."""
    closed = []

    def steps():
        try:
            yield 1
        finally:
            closed.append(True)

    def call():
        suspended = steps()
        next(suspended)
        raise stop

    with pytest.raises(stop) as kept, freed_if_interrupted():
        call()
    assert kept.tb is not None
    assert closed == [True] * (stop is KeyboardInterrupt)

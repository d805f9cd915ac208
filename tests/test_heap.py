"""Freed tensors of medium size are given back to the system."""

import ctypes

import psutil
import pytest
import torch

from toolkit.heap import release_freed


def resident():
    return psutil.Process().memory_info().rss


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_freed_memory_is_given_back():
    ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD at its most: as after a large tensor
    before = resident()
    tensors = [torch.ones(2**18) for _ in range(200)]  # of 1 MiB
    kept = tensors[::20]
    del tensors
    held = resident() - before
    release_freed()
    assert held > 150 * 2**20, "the C library keeps nothing: the call is not needed"
    assert resident() - before < 30 * 2**20
    assert all(bool((t == 1).all()) for t in kept)

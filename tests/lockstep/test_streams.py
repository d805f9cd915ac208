"""Streams: states by batch, in memory or on disk, where a block's output never harms its input."""

from itertools import pairwise

import pytest
import torch

from toolkit.documents.batches import Batch
from toolkit.lockstep.streams import Shape, Stream

SHAPE = Shape(5, torch.float32, torch.device("cpu"))


def batch(rows, length):
    ones = torch.ones(rows, length)
    return Batch(ones.long(), ones.bool(), ones.bool(), torch.zeros(rows * length), False)


BATCHES = {0: batch(2, 3), 3: batch(1, 7), 4: batch(4, 2)}


def states(index, value):
    return torch.full((*BATCHES[index].ids.shape, SHAPE.width), float(value))


def make(folder):
    if folder is None:
        return Stream(BATCHES, SHAPE)
    return Stream.mapped(BATCHES, SHAPE, folder / "s.stream")


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_leaves_a_block_enters_the_next(tmp_path, on_disk):
    stream = make(tmp_path if on_disk else None)
    for index in BATCHES:
        stream.begin(index, states(index, index))
    for block in (10, 20, 30):
        for index in BATCHES:
            before = block - 10 + index
            assert torch.equal(stream[index], states(index, before))
            stream.put(index, states(index, block + index))
            assert torch.equal(stream.left(index), states(index, block + index))
        stream.turn()
    assert stream.nbytes == (2 * 3 + 7 + 4 * 2) * 5 * 4


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
def test_a_killed_process_leaves_what_entered_its_block(tmp_path, turns):
    """Another process that maps the files after so many blocks finds their last output."""
    stream = make(tmp_path)
    for index in BATCHES:
        stream.begin(index, states(index, 0))
    for block in range(turns):
        for index in BATCHES:
            stream.put(index, states(index, block + 1))
        stream.turn()
    stream.put(3, states(3, -1))  # the next block has begun
    found = Stream.mapped(BATCHES, SHAPE, tmp_path / "s.stream", turns)
    for index in BATCHES:
        assert torch.equal(found[index], states(index, turns))


def test_processes_share_files_and_touch_no_page_of_each_other(tmp_path):
    ours, theirs = make(tmp_path), make(tmp_path)
    ours.begin(0, states(0, 1))
    theirs.begin(3, states(3, 2))
    assert torch.equal(theirs[0], states(0, 1))
    assert torch.equal(ours[3], states(3, 2))
    starts = sorted(ours[index].data_ptr() for index in BATCHES)
    assert all((b - a) % 4096 == 0 for a, b in pairwise(starts))

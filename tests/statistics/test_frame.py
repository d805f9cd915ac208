"""Sums on a grid: the order of updates and of merges changes no bit."""

import pytest
import torch

from tests.support.members import reduced
from toolkit.statistics import Frame, MomentSums, frames_of
from toolkit.statistics.frame import QUANTUM, add

PAIRS = [("x", "x"), ("t", "x"), ("t", "t")]


def shards(dtype=torch.float32, n=6, d=9, rows=50):
    """Of very different sizes by dimension and by shard, far from 0."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-6, 4, d, dtype=torch.float64)
    for index in range(n):
        x = torch.randn(rows + index % 7, d, generator=generator, dtype=torch.float64)
        x = 100 * sizes + x * sizes * 2.0 ** (index % 3)
        yield {"x": x.to(dtype), "t": (0.01 * x[:, :4]).to(dtype)}


def summed(parts, frames):
    sums = MomentSums(PAIRS, frames)
    for part in parts:
        sums.update(part)
    return sums


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(("dtype", "n"), [(torch.float32, 300), (torch.float64, 6)])
def test_order_and_sharding_change_no_bit(dtype, n):
    parts = list(shards(dtype, n, rows=50 if dtype == torch.float32 else 5))
    frames = frames_of(parts[0])
    whole = summed(parts, frames).state()
    for seed in range(5):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        assert_same_bits(summed([parts[i] for i in order], frames).state(), whole)
    for n_shards in (2, 3, 6):
        members = [summed(parts[shard::n_shards], frames) for shard in range(n_shards)]
        for member in reduced(members):
            assert_same_bits(member.state(), whole)


def test_plain_float64_sums_depend_on_their_order():
    """What the grid is for: parts of very different size."""
    parts = torch.tensor([1.0, 2.0**-53, 2.0**-53])
    plain, on_grid = set(), set()
    for order in ([0, 1, 2], [1, 2, 0]):
        total, exact = (torch.zeros((), dtype=torch.float64) for _ in range(2))
        for part in parts[order]:
            total += part
            add(exact, part, torch.float32)
        plain.add(float(total))
        on_grid.add(float(exact))
    assert plain == {1.0, 1.0 + 2.0**-52}
    assert on_grid == {1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_part_is_rounded_to_whole_quanta(dtype):
    generator = torch.Generator().manual_seed(1)
    part = 100 * torch.randn(4, 4, generator=generator, dtype=torch.float64).to(dtype)
    total = torch.zeros(4, 4, dtype=torch.float64)
    kept = part.clone()
    add(total, part, dtype)
    assert torch.equal(part, kept)
    assert torch.equal(total / QUANTUM[dtype], (part.double() / QUANTUM[dtype]).round())


def test_a_frame_costs_no_digit():
    """Units are powers of two: the frame is undone exactly."""
    x = next(shards())["x"]
    frame = Frame.of(x)
    assert torch.equal(frame.unit.log2(), frame.unit.log2().round())
    centred = x - frame.centre.to(x.dtype)
    assert torch.equal(frame.applied(x) * frame.unit.to(x.dtype), centred)
    size = frame.applied(x).square().mean(0).sqrt()
    assert size.max() <= 2
    # A dimension's unit is its own spread, but not below 2⁻¹⁰ of the whole vector's size.
    assert (size[-2:] > 0.4).all()
    assert frame.unit.min() >= 2.0**-10 * x.square().mean().sqrt()


def test_a_vector_that_is_zero_has_a_unit():
    frame = Frame.of(torch.zeros(3, 2))
    assert torch.equal(frame.unit, torch.ones(2, dtype=torch.float64))

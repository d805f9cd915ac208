"""Which rank each block needs: so that no block's error passes a limit, or the sum at the end.

`left[l][r]` is the energy that block l's map leaves at rank r, as a share of the stream's energy
after the block: the relative error, squared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt


@dataclass(frozen=True)
class WithinLimit:
    """Ranks for a limit on every block's error, the errors they leave, and whether they hold it."""

    ranks: tuple[int, ...]
    errors: tuple[float, ...]
    holds: bool


def ranks_within(
    left: Sequence[Sequence[float]], gains: Sequence[float], limit: float
) -> WithinLimit:
    """Ranks with which no block's relative error passes `limit`.

    Block l turns a relative error e of its input into ``gains[l] · e`` of its output, and its map
    leaves ``sqrt(left[l][r])`` there. The two are taken to be uncorrelated: squares add. All blocks
    may leave the same, as much as the limit allows, and each gets the smallest rank that does (the
    one that leaves least, where none does: on held-out documents not always the widest). Where
    even the least left everywhere passes the limit, these ranks stand, and `holds` is false.
    """
    allowances = sorted({share for shares in left for share in shares})
    low, high = 0, len(allowances) - 1  # the largest allowance that holds lies between the two
    while low < high:
        middle = (low + high + 1) // 2
        if _with_allowance(left, gains, limit, allowances[middle]).holds:
            low = middle
        else:
            high = middle - 1
    return _with_allowance(left, gains, limit, allowances[low])


def _with_allowance(
    left: Sequence[Sequence[float]], gains: Sequence[float], limit: float, allowance: float
) -> WithinLimit:
    ranks, errors, entering = [], [], 0.0
    for shares, gain in zip(left, gains, strict=True):
        least = min(range(len(shares)), key=lambda rank: shares[rank])
        rank = next((r for r, share in enumerate(shares) if share <= allowance), least)
        entering = sqrt((gain * entering) ** 2 + max(shares[rank], 0.0))
        ranks.append(rank)
        errors.append(entering)
    return WithinLimit(tuple(ranks), tuple(errors), max(errors) <= limit)


def spread(
    gains: Sequence[Sequence[float]], total: int, weights: Sequence[float] | None = None
) -> tuple[int, ...]:
    """How many of each block's (falling) gains are among the largest `total`, at least one each.

    `weights` multiply each block's gains: what a unit of that block's error costs at the end.
    """
    weights = weights or [1.0] * len(gains)
    ranks = [1] * len(gains)
    rest = sorted(
        ((gain * weights[row], row) for row, found in enumerate(gains) for gain in found[1:]),
        reverse=True,
    )
    for _, row in rest[: total - len(gains)]:
        ranks[row] += 1
    return tuple(ranks)


def predicted(
    left: Sequence[Sequence[float]], costs: Sequence[float], ranks: Sequence[int]
) -> float:
    """``Σ costs[l] · left[l][ranks[l]]``: the errors' costs at the end, each by itself, summed."""
    return sum(
        cost * max(shares[rank], 0.0) for shares, cost, rank in zip(left, costs, ranks, strict=True)
    )


def ladder(n_layers: int, widest: int, steps_per_doubling: int = 4) -> list[int]:
    """Totals of ranks from one for each block up to `widest` each, growing by a constant factor."""
    totals, step = [n_layers], 0
    while totals[-1] < n_layers * widest:
        step += 1
        total = min(round(n_layers * 2 ** (step / steps_per_doubling)), n_layers * widest)
        if total > totals[-1]:
            totals.append(total)
    return totals

"""Sums that do not depend on their order: a centre, units, and a grid for float64 totals.

Float64 additions are exact as long as every part is a whole number of one quantum and the total
stays below 2⁵³ quanta. A `Frame` brings vectors to size 1 by powers of two, which costs no digit;
`add` rounds each part to whole quanta of that unit. So shards of the documents, added in any
order by any number of processes, give the same bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from toolkit.runtime.processes import Processes

# A part is a batch's products, of about its number of tokens (2¹¹), with errors of 2⁻²⁴ of that
# where they are taken in float32: the grid lies far below, and leaves room for 2²⁹ tokens. Parts in
# float64 are rounded less, which leaves room for 2¹¹; beyond it additions round as any do.
QUANTUM = {torch.float32: 2.0**-24, torch.float64: 2.0**-42}
_ENOUGH = 256  # tokens to place a frame by
_LEAST = 2.0**-10  # of the vector's root mean square: no dimension's unit is smaller


@dataclass(frozen=True)
class Frame:
    """Where a vector is measured from, `centre`, and in which `unit` (powers of two), `[d]` each.

    Both are float64, and the same in every process of a run.
    """

    centre: Tensor
    unit: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """Return the frame in which `values` `[n, d]`, n > 0, are about 0 and of size 1."""
        values = values[:_ENOUGH]
        centre = values.mean(0).double()
        spread = (values - centre.to(values.dtype)).square().mean(0).sqrt().double()
        size = values.square().mean().sqrt().double()
        return cls(centre, _power_of_two(torch.maximum(spread, _LEAST * size)))

    def to(self, device: torch.device | None) -> Self:
        """Return the same on `device` (None: where it is)."""
        return type(self)(self.centre.to(device), self.unit.to(device))

    def applied(self, values: Tensor) -> Tensor:
        """``(values − centre) / unit`` in the precision of `values`; the division is exact."""
        scale = (1 / self.unit).to(values.dtype)
        return torch.addcmul(-self.centre.to(values.dtype) * scale, values, scale)


def frames_of(values: Mapping[str, Tensor]) -> dict[str, Frame]:
    """A frame for each named vector `[n, d]`."""
    return {name: Frame.of(value) for name, value in values.items()}


def shared_frames(
    values: Mapping[str, Mapping[str, Tensor]], processes: Processes
) -> dict[str, dict[str, Frame]]:
    """Return the frames of the first process's `values`, in all `processes`."""
    device = next((v.device for group in values.values() for v in group.values()), None)
    frames = processes.from_first(
        lambda: {group: frames_of(found) for group, found in values.items()}
    )
    return {
        group: {name: frame.to(device) for name, frame in found.items()}
        for group, found in frames.items()
    }


def add(total: Tensor, part: Tensor, precision: torch.dtype) -> None:
    """Add `part` to the float64 `total` in whole quanta of `precision`, that of the vectors."""
    anchor = 1.5 * 2.0**52 * QUANTUM[precision]  # beside it float64 holds whole quanta alone
    total += part.to(torch.float64, copy=True).add_(anchor).sub_(anchor)


def _power_of_two(sizes: Tensor) -> Tensor:
    """Return the least powers of two that are not below `sizes`; 1 for zeros."""
    _, exponent = torch.frexp(sizes)
    return torch.where(sizes > 0, torch.ldexp(torch.ones_like(sizes), exponent), 1.0)

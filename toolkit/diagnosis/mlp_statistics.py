"""Sums of one block's MLP: first-order shares, and moments of its input and output."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from toolkit.analysis.first_order import FirstOrderSums, first_order_terms
from toolkit.analysis.linear_fit import Rank, explained, fit_linear, ranks_below
from toolkit.analysis.shared_map import SHARED_RANKS
from toolkit.blocks.parts import BlockParts
from toolkit.diagnosis.block_statistics import MLP_INPUT, SIDES
from toolkit.lockstep.march import Step
from toolkit.runtime.processes import ALONE, Processes
from toolkit.statistics import Moments, MomentSums
from toolkit.statistics.frame import shared_frames

OUT = "mlp_out"  # of the MLP module itself
EXPLAINED = ("explained_fit", "explained_heldout")
PAIRS = [(OUT, OUT), ("down", OUT), (MLP_INPUT, MLP_INPUT), (OUT, MLP_INPUT)]
Row = dict[str, Any]


class MLPStatistics:
    """First-order shares of one block's MLP, and moments of its input and output by side."""

    def __init__(self, parts: BlockParts, processes: Processes = ALONE) -> None:
        self.parts = parts
        # States of half precision are widened, and the weights that read them with them.
        weight = parts.mlp.down
        precision = (torch.promote_types(weight.dtype, torch.float32), weight.device)
        self.mlp, self.change = parts.mlp.to(*precision), parts.change.to(*precision)
        self.processes = processes
        self.first_order = FirstOrderSums(self.mlp, self.change)
        self.moments: dict[bool, MomentSums] = {}
        self.down_energy = torch.zeros(2, dtype=torch.float64, device=weight.device)  # by side

    def update(self, step: Step) -> None:
        """Add one batch."""
        h, side = step.base[MLP_INPUT], step.batch.held_out
        terms = first_order_terms(self.mlp, self.change, h)
        self.first_order.add(terms)
        values = {MLP_INPUT: h, OUT: terms.y, "down": terms.down}
        if not self.moments:
            self._begin(values)
        self.moments[side].update(values)
        self.down_energy[int(side)] += terms.down.square().sum(dtype=torch.float64)

    def start(self) -> None:
        """Take the first process's frames where this one had no document."""
        if not self.moments:
            self._begin({})

    def reduce(self, processes: Processes) -> None:
        """Add up the sums of all `processes`: then each holds them all."""
        self.start()
        for sums in self.moments.values():
            sums.reduce(processes)
        self.first_order.reduce(processes)
        processes.add(self.down_energy)

    def _begin(self, values: Mapping[str, Tensor]) -> None:
        frames = shared_frames({OUT: values}, self.processes)[OUT]
        self.moments = {side: MomentSums(PAIRS, frames) for side in SIDES}

    def rows(self) -> dict[str, list[Row]]:
        """Return the rows of the tables ``first_order`` and ``mlp_fit``."""
        fit, held_out = (self.moments[side].result() for side in SIDES)
        energies = [float(e) / m.n for e, m in zip(self.down_energy, (fit, held_out), strict=True)]
        rows = [] if not any(energies) else mlp_fit_rows(OUT, "down", fit, held_out, energies)
        # The coefficient of determination is about the mean: what a constant gives is no credit.
        variances = [float(m.covariance[OUT, OUT].trace()) for m in (fit, held_out)]
        about_mean = [v + float(m.mean[OUT].square().sum()) for v, m in
                      zip(variances, (fit, held_out), strict=True)]  # fmt: skip
        for row in mlp_fit_rows(MLP_INPUT, OUT, fit, held_out, about_mean, ("full",)):
            for name, energy, variance in zip(EXPLAINED, about_mean, variances, strict=True):
                row[name] = 1 - (1 - row[name]) * energy / variance if variance else 0.0
            rows.append(row)
        return {"first_order": [asdict(self.first_order.result())], "mlp_fit": rows}


def mlp_fit_rows(
    x: str,
    t: str,
    fit: Moments,
    held_out: Moments,
    energies: Sequence[float],
    ranks: Sequence[Rank] = SHARED_RANKS,
) -> list[Row]:
    """The best affine maps of one vector from another, at every rank; `energies` are ``E‖t‖²``."""
    linear = fit_linear(fit, x, t)
    ranks = ranks_below(len(linear.t_mean), ranks)
    shares = [
        explained(linear, moments, x, t, energy, ranks)
        for moments, energy in zip((fit, held_out), energies, strict=True)
    ]
    return [
        {"source": x, "target": t, "rank": rank}
        | {name: share[rank] for name, share in zip(EXPLAINED, shares, strict=True)}
        for rank in ranks
    ]

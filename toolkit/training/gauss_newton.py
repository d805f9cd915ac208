"""Gauss–Newton sweeps: distillation without a learning rate.

Adapters are affine maps ``Δ = A x + b`` of all blocks at once. One pass over the fit documents
gives for every block, as running sums over its steered tokens: the moments of the state x; of g,
the gradient of ``KL(tuned ‖ steered)`` at the adapter's output; and of s, the same gradient with
labels that are drawn from the steered model itself. The second moment G of s is the Gauss–Newton
(Fisher) metric of the output (Martens 2020, arXiv:1412.1193; the product form is that of K-FAC,
Martens and Grosse 2015). About the state's mean the step is

    ``A ← A − η (G + γI)⁻¹ Cov(g, x) (Cov(x) + λI)⁻¹``,   ``Δ(x̄) ← Δ(x̄) − η (G + γI)⁻¹ E g``,

and A is cut to its rank in the metric of G and Cov(x). Tokens of one sequence push together, so a
token's curvature is too small a bound: the length η is the one of `LENGTHS` that lowers the KL most
on fit documents that are set apart. A sweep that lowers it nowhere is the last.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

import torch
from safetensors.torch import load_file
from torch import Tensor

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.adapters.linear import Linear
from toolkit.adapters.vector import FixedVector
from toolkit.analysis.linear_fit import Rank
from toolkit.documents.corpus import Corpus
from toolkit.errors import InputError
from toolkit.models.deltas import wide
from toolkit.models.edits import steerable
from toolkit.models.pair import ModelPair
from toolkit.runtime.progress import progress
from toolkit.runtime.records import write_tensors
from toolkit.statistics import Moments, MomentSums
from toolkit.training.distillation import Row, divergences, rows_of, set_apart
from toolkit.training.examples import collate
from toolkit.training.methods import frozen

LENGTHS = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
DAMPING, RIDGE = 0.1, 1e-4  # γ and λ, relative to the mean eigenvalue
LABELS, GRADIENT, STATE = "s", "g", "x"
PAIRS = [(STATE, STATE), (GRADIENT, STATE), (LABELS, LABELS)]


@dataclass(frozen=True)
class Swept:
    """What sweeps gave: adapters, and each sweep's length and KL on documents set apart.

    `history` begins with the start, whose length is 0.
    """

    adapters: Adapters
    history: tuple[tuple[float, float], ...]


@dataclass
class Affine:
    """One block's adapter as ``Δ = A x + b``, float64; `matrix` None is a vector."""

    matrix: Tensor | None
    bias: Tensor

    @classmethod
    def of(cls, adapter: Adapter) -> Self:
        """Read a fixed vector or a linear adapter."""
        if isinstance(adapter, FixedVector):
            return cls(None, adapter.bias.detach().double().cpu())
        if not isinstance(adapter, Linear):
            raise InputError(f"sweeps fit vectors and linear adapters, not {adapter.kind}")
        up = adapter.up.detach().double().cpu()
        matrix = up if adapter.down is None else up @ adapter.down.detach().double().cpu()
        bias = adapter.bias
        return cls(matrix, up.new_zeros(len(up)) if bias is None else bias.detach().double().cpu())

    def adapter(self, rank: Rank, dtype: torch.dtype) -> Adapter:
        """Return the adapter of `rank`, which the matrix has."""
        bias = self.bias.to(dtype)
        if self.matrix is None:
            return FixedVector(bias)
        if rank == "full":
            return Linear(self.matrix.to(dtype), None, bias)
        u, sizes, v = torch.linalg.svd(self.matrix, full_matrices=False)
        # Both factors of like size: training may go on from them.
        roots = sizes[:rank].sqrt()
        up, down = u[:, :rank] * roots, roots[:, None] * v[:rank]
        return Linear(up.to(dtype).contiguous(), down.to(dtype).contiguous(), bias)

    def moved(self, moments: Moments, length: float, rank: Rank) -> "Affine":
        """Return the map after a step of `length`, of `rank`."""
        metric = _damped(moments.second_moment(LABELS), DAMPING)
        step = torch.linalg.solve(metric, moments.mean[GRADIENT])
        if self.matrix is None:
            return Affine(None, self.bias - length * step)
        mean, spread = moments.mean[STATE], _damped(moments.covariance[STATE, STATE], RIDGE)
        pull = torch.linalg.solve(metric, moments.covariance[GRADIENT, STATE])
        matrix = self.matrix - length * torch.linalg.solve(spread, pull.T).T
        at_mean = self.matrix @ mean + self.bias - length * step
        if rank != "full":
            matrix = truncated(matrix, metric, spread, rank)
        return Affine(matrix, at_mean - matrix @ mean)


def truncated(matrix: Tensor, metric: Tensor, spread: Tensor, rank: int) -> Tensor:
    """Return the matrix of `rank` nearest in ``‖L_Gᵀ (A − A_r) L_C‖``, L their Cholesky factors."""
    left, right = (torch.linalg.cholesky(some) for some in (metric, spread))
    u, sizes, v = torch.linalg.svd(left.T @ matrix @ right, full_matrices=False)
    kept = (u[:, :rank] * sizes[:rank]) @ v[:rank]
    kept = torch.linalg.solve_triangular(left.T, kept, upper=True)
    return torch.linalg.solve_triangular(right, kept, upper=False, left=False)


def _damped(moment: Tensor, share: float) -> Tensor:
    d = len(moment)
    level = float(moment.trace()) / d or 1.0
    return (moment + moment.T) / 2 + share * level * torch.eye(d, dtype=moment.dtype)


@final
class Probed(Adapter):
    """An adapter that keeps what it reads, and a zero that is added to what it adds.

    The gradient at that zero, `added`, is the one at the adapter's output.
    """

    kind = "probed"

    def __init__(self, inner: Adapter) -> None:
        super().__init__()
        self.inner = inner
        self.seen = self.added = torch.empty(0)

    @classmethod
    def identity(cls, *args: Any, **options: Any) -> Self:
        raise NotImplementedError("a probe is made of an adapter")

    @property
    def rank(self) -> Rank:
        return self.inner.rank

    @property
    def config(self) -> dict[str, Any]:
        return self.inner.config

    def forward(self, states: Tensor) -> Tensor:
        self.seen = states.detach()
        self.added = torch.zeros_like(self.seen, requires_grad=True)
        return self.inner(states) + self.added


class Sweeper:
    """Gathers the sums of one sweep after the other, and measures maps on documents set apart."""

    def __init__(self, pair: ModelPair, pad_id: int, batch_size: int, seed: int = 0) -> None:
        self.pair, self.pad_id, self.batch_size = pair, pad_id, batch_size
        self.generator = torch.Generator(device=pair.device).manual_seed(seed)

    def batches(self, rows: Sequence[Row]) -> Iterator[dict[str, Tensor]]:
        """Yield rows of like length together."""
        ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
        for first in range(0, len(ordered), self.batch_size):
            batch = collate(ordered[first : first + self.batch_size], self.pad_id)
            yield {name: value.to(self.pair.device) for name, value in batch.items()}

    @torch.no_grad()
    def nats(self, adapters: Adapters, rows: Sequence[Row]) -> float:
        """Measure ``KL(tuned ‖ steered)`` in nats a token that counts."""
        total, n = 0.0, 0
        with steer(self.pair.base, adapters, self.pair.base_runner.sites):
            for batch in self.batches(rows):
                nats, _ = divergences(self.pair.tuned, self.pair.base, batch)
                total, n = total + float(nats.double().sum()), n + len(nats)
        return total / n

    @torch.enable_grad()
    def moments(
        self, adapters: Adapters, rows: Sequence[Row], advance: Any = lambda: None
    ) -> dict[int, Moments]:
        """Return every block's moments of state, gradient and drawn labels' gradient."""
        probes = {layer: Probed(adapter) for layer, adapter in adapters.by_layer.items()}
        sums = {layer: MomentSums(PAIRS) for layer in probes}
        probed = Adapters(adapters.location, probes, adapters.fit, positions=adapters.positions)
        with frozen(self.pair.base), steer(self.pair.base, probed, self.pair.base_runner.sites):
            for batch in self.batches(rows):
                nats, logits = divergences(self.pair.tuned, self.pair.base, batch)
                added = [probe.added for probe in probes.values()]
                pulled = torch.autograd.grad(nats.sum(), added, retain_graph=True)
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=self.generator)[
                    :, 0
                ]
                nll = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
                labels = torch.autograd.grad(nll, added)
                where = steerable(batch["attention_mask"].bool())
                for probe, total, g, s in zip(
                    probes.values(), sums.values(), pulled, labels, strict=True
                ):
                    values = {STATE: probe.seen, GRADIENT: g, LABELS: s}
                    total.update({name: wide(value[where]) for name, value in values.items()})
                advance()
        return {layer: total.result() for layer, total in sums.items()}


# many parameters: all but three say how, and have defaults
def sweep(
    pair: ModelPair,
    corpus: Corpus,
    start: Adapters,
    sweeps: int = 6,
    *,
    sampled: Sequence[Row] = (),
    batch_size: int = 16,
    seed: int = 0,
    folder: Path | None = None,
    show_progress: bool = False,
) -> Swept:
    """Improve vectors or linear adapters of every block, from `start`, by Gauss–Newton sweeps.

    Fit documents but one in eight, and `sampled` rows, give the sums; the others choose each
    sweep's length. With a `folder`, an interrupted run goes on after its last sweep.
    """
    if str(start.positions) != "all":
        raise InputError(f"sweeps fit adapters at all positions, not at {start.positions}")
    fit, judges = (rows_of(side) for side in set_apart(corpus.fit))
    rows = [*fit, *sampled]
    sweeper = Sweeper(pair, corpus.pad_id, batch_size, seed)
    kept = _Kept(folder, start)
    maps, history = kept.read()
    if not history:
        history = [(0.0, sweeper.nats(start, judges))]
    steps = (sweeps + 1 - len(history)) * -(-len(rows) // batch_size)
    with progress("Gauss–Newton sweeps", steps, show_progress) as advance:
        while len(history) <= sweeps:
            adapters = kept.adapters(maps)
            moments = sweeper.moments(adapters, rows, advance)
            found = _best_length(sweeper, kept, maps, moments, judges, history[-1][0])
            if found is None or found[2] >= history[-1][1]:
                break
            maps = found[0]
            history.append(found[1:])
            kept.write(maps, history)
    return Swept(kept.adapters(maps, len(history) - 1), tuple(history))


def _best_length(
    sweeper: Sweeper,
    kept: "_Kept",
    maps: dict[int, Affine],
    moments: dict[int, Moments],
    judges: Sequence[Row],
    last: float,
) -> tuple[dict[int, Affine], float, float] | None:
    """Return the maps after the step that judges like best, its length and the nats it leaves.

    Of all lengths, or where there is a `last` one, of that and its neighbours.
    """
    best = None
    for length in LENGTHS:
        if last and not last / 2 <= length <= 2 * last:
            continue
        moved = {
            layer: one.moved(moments[layer], length, kept.start.by_layer[layer].rank)
            for layer, one in maps.items()
        }
        nats = sweeper.nats(kept.adapters(moved), judges)
        if best is None or nats < best[2]:
            best = moved, length, nats
    return best


@dataclass(frozen=True)
class _Kept:
    """The state of a run of sweeps, in memory and (with a folder) on disk."""

    folder: Path | None
    start: Adapters

    def read(self) -> tuple[dict[int, Affine], list[tuple[float, float]]]:
        """Return the maps and the history of an interrupted run, or those of the start."""
        if self.folder is None or not (self.folder / _STATE).is_file():
            return {layer: Affine.of(a) for layer, a in self.start.by_layer.items()}, []
        tensors = load_file(self.folder / _STATE)
        maps = {
            layer: Affine(tensors.get(f"{layer}.matrix"), tensors[f"{layer}.bias"])
            for layer in self.start.by_layer
        }
        return maps, [tuple(row) for row in tensors["history"].tolist()]

    def write(self, maps: dict[int, Affine], history: Sequence[tuple[float, float]]) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {"history": torch.tensor(history, dtype=torch.float64)}
        for layer, one in maps.items():
            tensors[f"{layer}.bias"] = one.bias
            if one.matrix is not None:
                tensors[f"{layer}.matrix"] = one.matrix.contiguous()
        write_tensors(tensors, self.folder / _STATE)

    def adapters(self, maps: dict[int, Affine], sweeps: int | None = None) -> Adapters:
        """Return the maps as adapters like those of the start."""
        by_layer = {}
        for layer, first in self.start.by_layer.items():
            dtype = next(first.parameters()).dtype
            by_layer[layer] = maps[layer].adapter(first.rank, dtype)
        info = {} if sweeps is None else {"sweeps": sweeps}
        return Adapters(self.start.location, by_layer, "swept", info, self.start.positions)


_STATE = "sweeps.safetensors"

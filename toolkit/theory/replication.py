"""On real models: how nearly a post-block steer does what a post-MLP steer does.

In every block of the base model the skip term (`resid_mid`), the MLP's output (`post_mlp`) and
their sum, the block's output, are gathered over documents: how the subspaces of the first two lie
to each other, and how well the best affine map P* guesses the MLP's output from the sum. With P* a
post-MLP adapter A becomes the post-block adapter ``A P*`` of the same rank.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from toolkit.adapters.collection import Adapters
from toolkit.adapters.linear import Linear
from toolkit.analysis.linear_fit import RELATIVE_RIDGE, fit_linear
from toolkit.analysis.projection import (
    AffineMap,
    centred_r2,
    compose,
    energy_subspace,
    oblique_projection,
    overlap,
)
from toolkit.documents.batches import Batch
from toolkit.documents.corpus import Corpus
from toolkit.errors import InputError
from toolkit.fitting.closed_form import require
from toolkit.lockstep.driver import march_through
from toolkit.lockstep.single import Shift, SingleMarch, SingleStep
from toolkit.models.pair import ModelPair
from toolkit.models.runner import BlockRunner
from toolkit.runtime.processes import Processes
from toolkit.statistics import Moments, MomentSums

SKIP, MLP, OUT = "skip", "mlp", "out"
PAIRS = ((SKIP, SKIP), (MLP, MLP), (OUT, OUT), (MLP, OUT))
SHARES = (0.9, 0.99)
Stream = Literal["base", "steered", "own"]


@dataclass(frozen=True)
class BlockMoments:
    """One block's skip term, MLP output and sum of both, over fit and over held-out tokens."""

    layer: int
    fit: Moments
    held_out: Moments


Steering = Callable[[BlockMoments], Shift | None]


class _BlockSums:
    """Accumulates what `PAIRS` names, by side."""

    def __init__(self) -> None:
        self.sums = {False: MomentSums(PAIRS), True: MomentSums(PAIRS)}

    def update(self, step: SingleStep) -> None:
        """Add one batch."""
        names = {SKIP: "resid_mid", MLP: "post_mlp", OUT: "post_block"}
        values = {name: step.states[location] for name, location in names.items()}
        self.sums[step.batch.held_out].update(values)

    def start(self) -> None:
        """Nothing: one process sees all documents."""

    def reduce(self, processes: Processes) -> None:
        """Nothing: one process sees all documents."""
        assert processes.size == 1

    def result(self, layer: int) -> BlockMoments:
        """Return the moments of both sides."""
        return BlockMoments(layer, self.sums[False].result(), self.sums[True].result())


@torch.no_grad()
def block_moments(
    runner: BlockRunner, batches: Sequence[Batch], steering: Steering = lambda _: None
) -> Iterator[BlockMoments]:
    """March one model over `batches`, gathering what `PAIRS` names in every block.

    What `steering` makes of a block's moments is added to its output before the next block, at all
    tokens but each document's first; the moments are of the states that it reads.
    """

    def conclude(layer: int, found: dict[str, _BlockSums]) -> tuple[BlockMoments, Any]:
        moments = found["block"].result(layer)
        return moments, steering(moments)

    march = SingleMarch(runner, batches, ("resid_mid", "post_mlp"))
    yield from march_through(march, lambda _: {"block": _BlockSums()}, conclude)


@dataclass(frozen=True)
class Replication:
    """One row a block: how far apart the skip term and the MLP's output are on the base model.

    `frame` has ``layer, d``; for 90 and 99 % of the energy the dimensions of both subspaces
    (``skip_90, mlp_90``), their smallest and median principal angle in degrees, and the held-out R²
    of the MLP's output as the oblique projection between the two takes it from the block's (NaN
    where they meet); R² of P*'s guess, and how many tokens it was fitted and judged on.
    """

    frame: pd.DataFrame


def measure(
    pair: ModelPair,
    documents: Iterable[Any] | Corpus,
    max_length: int = 512,
    relative_ridge: float = RELATIVE_RIDGE,
) -> Replication:
    """Compare the two subspaces in every block of the base model, unsteered.

    Subspaces and P* are of the fit documents. Raises InputError where the family has no sum of a
    skip term and an MLP's output.
    """
    rows = []
    for found in block_moments(pair.base_runner, _batches(pair, documents, max_length)):
        row: dict[str, Any] = {"layer": found.layer, "d": len(found.fit.mean[OUT])}
        for share in SHARES:
            skip, mlp = (energy_subspace(found.fit.second_moment(x), share) for x in (SKIP, MLP))
            seen, percent = overlap(skip, mlp), round(100 * share)
            row |= {
                f"skip_{percent}": seen.skip,
                f"mlp_{percent}": seen.mlp,
                f"smallest_{percent}": seen.smallest,
                f"median_{percent}": seen.median,
                f"r2_oblique_{percent}": _r2_oblique(skip, mlp, found.held_out),
            }
        guess = best_guess(found.fit, relative_ridge)
        row |= {
            "r2_fit": centred_r2(guess, found.fit, OUT, MLP),
            "r2_heldout": centred_r2(guess, found.held_out, OUT, MLP),
            "n_fit": found.fit.n,
            "n_heldout": found.held_out.n,
        }
        rows.append(row)
    return Replication(pd.DataFrame(rows))


def _r2_oblique(skip: Tensor, mlp: Tensor, moments: Moments) -> float:
    """R² of the MLP's output as the projection onto `mlp` along `skip` gives it; NaN: no such."""
    if overlap(skip, mlp).meet:
        return float("nan")
    projection = oblique_projection(mlp, skip)
    return centred_r2(AffineMap(projection, torch.zeros(len(mlp)).double()), moments, OUT, MLP)


def best_guess(moments: Moments, relative_ridge: float = RELATIVE_RIDGE) -> AffineMap:
    """P*: the best affine map from the block's output to the MLP's."""
    return AffineMap.of(fit_linear(moments, OUT, MLP, 0, relative_ridge))


def replicate(
    pair: ModelPair,
    documents: Iterable[Any] | Corpus,
    adapters: Adapters,
    stream: Stream = "steered",
    max_length: int = 512,
    relative_ridge: float = RELATIVE_RIDGE,
) -> Adapters:
    """Return the post-block adapters ``A P*`` that stand in for linear post-MLP adapters A.

    P* is fitted on the states of `stream`: the ``base`` model's, those of the model as A steers it
    (``steered``: what ``A P*`` meets where it succeeds), or those of the model as ``A P*`` itself
    steers it in all earlier blocks (``own``: what it meets). ``info["r2"]`` holds by block the
    held-out R² of A's steer, on the same stream.
    """
    if adapters.location != "post_mlp" or adapters.kind != "linear":
        raise InputError(
            f"these are {adapters.kind} adapters at {adapters.location}: linear ones at post_mlp "
            "have a counterpart behind the block"
        )
    if str(adapters.positions) != "all":
        raise InputError(
            f"these adapters steer {adapters.positions} tokens: replicas are made from all of a "
            "document's tokens, so give adapters of positions all"
        )
    by_layer, r2 = {}, {}

    def steering(found: BlockMoments) -> Shift | None:
        if (adapter := adapters.by_layer.get(found.layer)) is None:
            return None
        assert isinstance(adapter, Linear)
        guess = best_guess(found.fit, relative_ridge)
        made = by_layer[found.layer] = behind_block(adapter, guess)
        r2[found.layer] = centred_r2(guess, found.held_out, OUT, MLP, matrix_of(adapter))
        if stream == "base":
            return None
        dtype = adapter.up.dtype
        if stream == "steered":
            return lambda y, _: adapter(y.to(dtype))
        return lambda _, h: made(h.to(dtype))

    for _ in block_moments(pair.base_runner, _batches(pair, documents, max_length), steering):
        pass
    info = {**adapters.info, "stream": stream, "r2": r2}
    return Adapters("post_block", by_layer, adapters.fit, info, adapters.positions)


def behind_block(adapter: Linear, guess: AffineMap) -> Linear:
    """``A guess(h) + b`` as an adapter of the block's output, of A's rank at most."""
    own = copy.deepcopy(adapter).cpu()  # where statistics are
    down = torch.eye(len(own.up)) if own.down is None else own.down
    up, down, bias = compose(own.up, down, own.bias, guess)
    made = Linear(up, down, bias) if own.down is not None else Linear(up @ down, None, bias)
    return made.to(adapter.up)


def matrix_of(adapter: Linear) -> Tensor:
    """A, `[d, d]`, on the CPU."""
    return (adapter.up if adapter.down is None else adapter.up @ adapter.down).cpu()


def _batches(pair: ModelPair, documents: Iterable[Any] | Corpus, max_length: int) -> list[Batch]:
    for location in ("resid_mid", "post_mlp"):
        require(pair, location)
    return pair.corpus(documents, max_length=max_length).batches

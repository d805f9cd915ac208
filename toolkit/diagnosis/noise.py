"""The noise of the precision: how far rounding alone moves the base model's states.

Measured is e = (state in the run's precision) − (the same in a higher one: float32 for half
precisions, else float64), of the base model against itself on one short batch. The weights, and
what a block is given beside its hidden state (masks, rotary embeddings), are the same on both
sides: e is the rounding of the computation, not that of the weights.

*Free*: each precision on its own states, so e has gathered the rounding of all blocks so far; the
noise of a free delta. *Forced*: the block alone, in both precisions on the one rounded stream; the
noise of a forced delta, whose two models also read one stream.

A measured delta holds the rounding of two models, ``δ + e_tuned − e_base``. Its error is at most
``rms(e_tuned) + rms(e_base)``, about twice the noise, as the tuned model rounds about as much as
the base one. It is √2 times the noise where the two roundings are independent, which they are as
soon as the delta is well above the noise; models that agree bit for bit round alike, and their
delta is exactly zero. At three times the noise (`validity.ABOVE_NOISE`) rounding is thus about
2/9 of a delta's energy, and at most 4/9.

A base whose weights were float8 has another noise: what storing them so did. It is measured by
moving each of these weights at random within the interval that was rounded to it; the table's modes
are then ``free_quantised`` and ``forced_quantised``. A fine-tune that began from the same quantised
weights (an adapter on them, or one that left some matrix as it was) is not touched by it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from toolkit.documents.batches import Batch
from toolkit.documents.tokens import Encoded, Positions
from toolkit.errors import InputError, one_line
from toolkit.models.hooks import Call, Carried, capture, run_on
from toolkit.models.loading import dtype_name
from toolkit.models.quantised import FLOAT8, cells
from toolkit.models.runner import BlockRunner, States
from toolkit.tables.table import Table
from toolkit.tables.words import QUANTISED

Row = dict[str, Any]
DOCUMENTS = 4  # that are looked at: rounding needs few tokens


@dataclass(frozen=True)
class Noise:
    """The table ``noise`` and the two precisions.

    `reason` says why rounding was not measured. `share` is that of the blocks' matrices which were
    float8 on a grid that was found (None: this was not looked for).
    """

    table: Table
    precision: str
    reference: str
    reason: str = ""
    share: float | None = None

    def joined(self, rows: Sequence[Row], share: float) -> "Noise":
        """Add what storing the weights did; `share` of the blocks' matrices had a known grid."""
        table = Table.of("noise", [*self.table.frame.to_dict("records"), *rows])
        return replace(self, table=table if rows else self.table, share=share)

    @property
    def summary(self) -> dict[str, Any]:
        """For ``run.json``: the largest noise of each mode, relative to the state."""
        frame = self.table.frame
        largest = frame.groupby("mode").noise_relative.max().to_dict()
        about = {"precision": self.precision, "reference": self.reference}
        if self.reason:
            about["not_applicable"] = self.reason
        return about | ({"largest_relative": largest} if largest else {})


def some_of(documents: Sequence[Encoded], positions: Positions) -> list[Encoded]:
    """Return the shortest fit documents of which tokens count, whatever the batches are."""
    asked = [d for d in documents if not d.held_out and any(d.counted(positions))]
    return sorted(asked, key=lambda document: len(document.ids))[:DOCUMENTS]


@torch.no_grad()
def measure_noise(runner: BlockRunner, batch: Batch, locations: tuple[str, ...]) -> Noise:
    """Return the noise at `locations` of every block, on the counted tokens of `batch`.

    One block at a time runs three times, and is held once more in the higher precision. Raises
    InputError where the states overflow the run's precision.
    """
    rounded = runner.embed(batch)
    higher = torch.float32 if rounded.dtype.itemsize < 4 else torch.float64
    ours, theirs = (dtype_name(dtype) for dtype in (rounded.dtype, higher))
    exact, rows = rounded.to(higher), []
    carried = {name: Carried() for name in ("rounded", "free")}
    for layer in range(runner.sites.n_layers):
        with runner.resident(layer):
            given, call = rounded, runner.call(layer, batch)
            beside = _cast(dict(carried["rounded"]), higher)
            rounded, states = runner.run(
                layer, call, given, locations, read=batch.of_counted, carried=carried["rounded"]
            )
            if not rounded[batch.mask].isfinite().all():
                raise InputError(
                    f"the base model's states overflow {ours} in block {layer}: "
                    "give it a --dtype with a wider range, bfloat16 or float32"
                )
            try:
                twin = _Twin(runner, layer, call, higher)
                exact, free = twin.run(exact, locations, batch, carried["free"])
                _, forced = twin.run(given, locations, batch, beside)
            except (RuntimeError, TypeError) as error:  # experts' kernels, some devices: no float64
                reason = f"this model does not run in {theirs}: {one_line(error)}"
                return Noise(Table.of("noise", []), ours, theirs, reason)
        for mode, references in (("free", free), ("forced", forced)):
            rows += [{"layer": layer, "mode": mode, **row} for row in _rows(states, references)]
    if not any(row["noise_rms"] for row in rows):
        reason = f"all of this model computes in {ours}, and there is nothing higher"
        return Noise(Table.of("noise", []), ours, theirs, reason)
    return Noise(Table.of("noise", rows), ours, theirs)


def began_alike(base: BlockRunner, tuned: BlockRunner) -> bool:
    """Tell whether some float8 matrix of the base is the tuned model's, to the last bit."""
    block = FLOAT8[base.model]
    for ours, theirs in zip(base.sites.blocks, tuned.sites.blocks, strict=True):
        other = {n.replace(".base_layer.", "."): w for n, w in theirs.named_parameters()}
        for name, weight in ours.named_parameters():
            same = other.get(name.replace(".base_layer.", "."))
            like = weight.ndim in (2, 3) and same is not None and torch.equal(weight, same)
            if like and cells(weight, block) is not None:
                return True
    return False


@torch.no_grad()
def quantisation_rows(
    runner: BlockRunner, batch: Batch, locations: tuple[str, ...], seed: int = 0
) -> tuple[list[Row], float]:
    """Return the rows of ``noise`` that say what storing weights as float8 did, and their share.

    The share is that of the blocks' matrices whose grid was found, by their entries; without any
    there are no rows.
    """
    if runner.model not in FLOAT8:
        return [], 0.0
    generator = torch.Generator().manual_seed(seed)
    given = moved = runner.embed(batch)
    carried, rows = {name: Carried() for name in ("given", "moved")}, []
    n_stirred = n_entries = 0
    for layer in range(runner.sites.n_layers):
        with runner.resident(layer):
            call = runner.call(layer, batch)
            twin = _Twin(runner, layer, call, given.dtype)
            for name, weight in twin.state.items():
                if weight.ndim in (2, 3):
                    twin.state[name] = stirred = _stirred(weight, runner, generator)
                    n_stirred += weight.numel() * (stirred is not weight)
                    n_entries += weight.numel()
            _, forced = twin.run(given, locations, batch, dict(carried["given"]))
            moved, free = twin.run(moved, locations, batch, carried["moved"])
            given, states = runner.run(
                layer, call, given, locations, read=batch.of_counted, carried=carried["given"]
            )
        for mode, other in (("free", free), ("forced", forced)):
            labels = {"layer": layer, "mode": f"{mode}{QUANTISED}"}
            rows += [{**labels, **row} for row in _rows(other, states)]
    share = n_stirred / max(n_entries, 1)
    return (rows if n_stirred else []), share


def _stirred(weight: Tensor, runner: BlockRunner, generator: torch.Generator) -> Tensor:
    """Move each float8 weight at random within the interval that was rounded to it."""
    width = cells(weight, FLOAT8[runner.model])
    if width is None:
        return weight
    shift = torch.rand(weight.shape, generator=generator).to(width) - 0.5
    return weight + (shift * width).to(weight.dtype)


class _Twin:
    """Block `layer` with a copy of its weights in `dtype`, on the arguments of `call`."""

    def __init__(self, runner: BlockRunner, layer: int, call: Call, dtype: torch.dtype) -> None:
        self.block, self.sites, self.layer = runner.sites.blocks[layer], runner.sites, layer
        state = {**dict(self.block.named_parameters()), **dict(self.block.named_buffers())}
        self.state, self.call, self.dtype = _cast(state, dtype), _cast(call, dtype), dtype

    def run(
        self, hidden: Tensor, locations: tuple[str, ...], batch: Batch, carried: Carried
    ) -> tuple[Tensor, States]:
        """As `BlockRunner.run`: the output on `hidden`, and the counted tokens' states."""
        sites = self.sites.of_layer(self.layer, locations)
        islands = NoFloat32() if self.dtype == torch.float64 else nullcontext()
        with capture(sites, batch.of_counted) as states, islands:
            output = run_on(self._forward, self.call, hidden.to(self.dtype), carried)
        return output, states

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.block, self.state, args, kwargs)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    """Return every floating tensor in `tree` as `dtype`."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return pytree.tree_map(cast, tree)


class NoFloat32(TorchFunctionMode):
    """Gives float64 where a forward pass asks for float32, as many norms do of any input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args, kwargs = pytree.tree_map(
            lambda value: torch.float64 if value is torch.float32 else value, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def _rows(states: States, references: Mapping[str, Tensor]) -> Iterator[Row]:
    for location, state in states.items():
        reference = references[location].double()
        error = state.double() - reference
        rms, size = (float(v.square().sum(1).mean().sqrt()) for v in (error, reference))
        yield {
            "location": location,
            "n_tokens": len(error),
            "noise_rms": rms,
            "noise_relative": rms / size if size else 0.0,
            "noise_norm": float(error.norm(dim=1).mean()),
        }

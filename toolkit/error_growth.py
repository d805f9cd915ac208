"""How an error put into one block grows on its way to the output: measured, and bounded.

Errors grow about the tuned model's own states, which perfect steering would give.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from toolkit.analysis.sequential_kl import Predictions
from toolkit.documents import Batch
from toolkit.error_bound import WeightBound, weight_bounds
from toolkit.hooks import capture, replace
from toolkit.lockstep import Blocks, delta, steerable
from toolkit.pair import ModelPair
from toolkit.progress import progress

LOCATIONS = ("pre_mlp", "post_mlp", "post_block")
SIZE = 0.01  # of a random error, relative to each token's state of the stream


@dataclass(frozen=True)
class Growth:
    """What became of an error: relative errors behind its block and each later one, and its cost.

    errors: ``sqrt(E‖δ‖² / E‖h‖²)`` over counted tokens, from the block of the error on.
    kl: ``KL(model ‖ model with the error)``, nats per counted token.
    """

    errors: tuple[float, ...]
    kl: float

    @property
    def to_next(self) -> float:
        """The relative error behind the next block, over the same; NaN behind the last block."""
        return self.errors[1] / self.errors[0] if len(self.errors) > 1 else float("nan")

    @property
    def to_end(self) -> float:
        """The relative error behind the last block, over that behind the error's own block."""
        return self.errors[-1] / self.errors[0]


class Propagation:
    """A model's own pass over one batch, into which errors are put."""

    @torch.no_grad()
    def __init__(self, blocks: Blocks, batch: Batch) -> None:
        self.blocks, self.batch = blocks, batch
        self.where = steerable(batch.mask)
        with capture(blocks.sites.inputs) as entering, capture(blocks.sites.outputs) as leaving:
            logits = self._logits()
        layers = [str(layer) for layer in range(blocks.sites.n_layers)]
        self.entering = [entering[name] for name in layers]
        self.leaving = [leaving[name] for name in layers]
        self.read = Predictions(logits[batch.counted][None])

    @torch.no_grad()
    def inject(self, layer: int, location: str, error: Tensor) -> Growth:
        """Add `error` `[batch, length, d_model]` to the state at `location` of block `layer`.

        Nothing is added to padding and to each document's first token.
        """
        kept = error * self.where[..., None]
        outputs = self.blocks.sites.outputs
        later = {name: site for name, site in outputs.items() if int(name) >= layer}
        with ExitStack() as stack:
            stack.enter_context(self.blocks.started_at(layer, self.entering[layer]))
            site = self.blocks.sites.at[location, layer]
            stack.enter_context(replace(site, lambda state: state + kept.to(state.dtype)))
            states = stack.enter_context(capture(later))
            logits = self._logits()
        counted = self.batch.counted
        errors = [
            relative(delta(states[name], self.leaving[int(name)])[counted],
                     self.leaving[int(name)][counted])
            for name in later
        ]  # fmt: skip
        kl = float(self.read.divergence(logits[counted][None]).mean())
        return Growth(tuple(errors), kl)

    def random_error(self, layer: int, generator: torch.Generator, size: float = SIZE) -> Tensor:
        """Of a random direction at every token, `size` of its state behind the block."""
        state = self.leaving[layer]
        error = torch.randn(state.shape, generator=generator).to(state)
        lengths = state.norm(dim=-1, keepdim=True) / error.norm(dim=-1, keepdim=True)
        return size * lengths * error

    def _logits(self) -> Tensor:
        mask = self.batch.mask.long()
        model = self.blocks.model
        return model(input_ids=self.batch.ids, attention_mask=mask, use_cache=False).logits


def relative(error: Tensor, state: Tensor) -> float:
    """``sqrt(E‖error‖² / E‖state‖²)`` over tokens, `[n, d]` each."""
    return float((error.double().square().sum() / state.double().square().sum()).sqrt())


def measure_growth(
    pair: ModelPair,
    batch: Batch,
    size: float = SIZE,
    seed: int = 0,
    show_progress: bool = False,
) -> pd.DataFrame:
    """Gains of random errors by block and location, the worst case of each block, and its bound.

    One row a block and location: `error` behind the block itself; `step_gain`, of its relative
    error in the next block; `end_gain`, to behind the last block; `kl`; and, for `post_block`
    alone, of the block as a function of what enters it: `worst`, the largest gain of any error
    (power iteration on the first document: a lower bound of it), and `bound`, from weights and
    norms (NaN where a family's block cannot be read, with the reason in ``frame.attrs``).
    """
    blocks, generator = pair.tuned_blocks, torch.Generator().manual_seed(seed)
    passed = Propagation(blocks, batch)
    locations = [location for location in LOCATIONS if location not in pair.missing]
    document = first_document(batch)
    entering = blocks.entering(document)
    bounds, reason = _bounds(pair, document)
    rows = []
    with progress("errors growing", pair.n_layers, show_progress) as advance:
        for layer in range(pair.n_layers):
            error = passed.random_error(layer, generator, size)
            for location in locations:
                growth = passed.inject(layer, location, error)
                rows.append({"layer": layer, "location": location, **_described(growth)})
            worst = worst_gain(blocks, layer, document, entering[layer])
            bound = bounds[layer].block if bounds else float("nan")
            rows[-1] |= {"worst": worst, "bound": bound}
            advance()
    frame = pd.DataFrame(rows)
    frame.attrs["no_bound"] = reason
    return frame


def _described(growth: Growth) -> dict[str, float]:
    return {
        "error": growth.errors[0],
        "step_gain": growth.to_next,
        "end_gain": growth.to_end,
        "kl": growth.kl,
    }


def _bounds(pair: ModelPair, document: Batch) -> tuple[Sequence[WeightBound] | None, str]:
    try:
        return weight_bounds(pair, document), ""
    except ValueError as error:
        return None, " ".join(str(error).split())


def first_document(batch: Batch) -> Batch:
    """The batch's first document alone, without its padding."""
    kept = batch.mask[0]
    ids, mask, counted = (part[:1, kept] for part in (batch.ids, batch.mask, batch.counted))
    return Batch(ids, mask, counted, batch.keys[: int(counted.sum())], batch.held_out)


def worst_gain(
    blocks: Blocks, layer: int, document: Batch, entering: Tensor, steps: int = 15
) -> float:
    """The largest ``‖δout‖ / ‖δh‖`` of an error in block `layer`, at all tokens but the first.

    The 2-norm of the block's Jacobian at the states `entering` it on one unpadded document, by
    power iteration on ``JᵀJ``: from below, and the nearer the more steps.
    """
    with torch.no_grad():
        call = blocks.call(layer, document)

    def block(state: Tensor) -> Tensor:
        return blocks.run(layer, call, state, ())[0]

    return operator_norm(block, entering, steerable(document.mask)[..., None], steps)


def operator_norm(
    function: Callable[[Tensor], Tensor], x: Tensor, where: Tensor, steps: int, seed: int = 0
) -> float:
    """The 2-norm of the Jacobian of `function` at `x`, of changes `where` that is true."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(x.shape, generator=generator).to(x) * where
    norm = torch.ones(())
    # The attention whose derivative has a derivative: a forward product is two backward ones.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for _ in range(steps):
            _, pushed = torch.autograd.functional.jvp(function, x, v / v.norm())
            norm = pushed.norm()
            if norm == 0:
                break
            _, v = torch.autograd.functional.vjp(function, x, pushed)
            v = v * where
    return float(norm)

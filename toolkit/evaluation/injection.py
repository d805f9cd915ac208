"""Errors put into one block of a model, and what becomes of them in the blocks after it."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.analysis.divergence import Predictions
from toolkit.documents.batches import Batch
from toolkit.models.deltas import delta
from toolkit.models.edits import steerable
from toolkit.models.hooks import capture, replace
from toolkit.models.runner import BlockRunner

SIZE = 0.01  # of a random error, relative to each token's state of the stream


@dataclass(frozen=True)
class Growth:
    """What became of an error: relative errors after its block and each later one, and its cost.

    errors: ``sqrt(E‖δ‖² / E‖h‖²)`` over counted tokens, from the block of the error on.
    kl: ``KL(model ‖ model with the error)``, nats per counted token.
    """

    errors: tuple[float, ...]
    kl: float

    @property
    def to_next(self) -> float:
        """The relative error after the next block, over the same; NaN after the last block."""
        return self.errors[1] / self.errors[0] if len(self.errors) > 1 else float("nan")

    @property
    def to_end(self) -> float:
        """The relative error after the last block, over that after the error's own block."""
        return self.errors[-1] / self.errors[0]


class Propagation:
    """A model's own pass over one batch, into which errors are put."""

    @torch.no_grad()
    def __init__(self, runner: BlockRunner, batch: Batch) -> None:
        self.blocks, self.batch = runner, batch
        self.where = steerable(batch.mask)
        with capture(runner.sites.inputs) as entering, capture(runner.sites.outputs) as leaving:
            logits = self._logits()
        layers = [str(layer) for layer in range(runner.sites.n_layers)]
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
        """Draw an error of random direction at every token, `size` of its state after the block."""
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

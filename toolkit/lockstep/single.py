"""The march of a single model, with or without steering."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from toolkit.documents.batches import Batch
from toolkit.models.deltas import wide
from toolkit.models.edits import shift, steerable
from toolkit.models.hooks import Carried
from toolkit.models.runner import BlockRunner, States

# What is added to a block's output, from the MLP's output and from it; None: nothing.
Shift = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SingleStep:
    """One batch in one block: the states of the counted tokens by location, `[n, d_model]`."""

    layer: int
    batch: Batch
    states: States


class SingleMarch:
    """One model advancing block by block over `batches`.

    `locations` are captured in every block, and the block's output under ``post_block``. What
    `advance` is given is added to a block's output before the next block, at all tokens but each
    document's first.
    """

    def __init__(
        self, runner: BlockRunner, batches: Sequence[Batch], locations: tuple[str, ...]
    ) -> None:
        self.runner, self.batches, self.locations = runner, batches, locations
        self._streams = [runner.embed(batch) for batch in batches]
        self._carried = [Carried() for _ in batches]
        self._written: list[Tensor] = []
        self._next = 0

    def layers(self) -> Iterator[int]:
        """Yield the blocks that are still to be passed."""
        while self._next < self.runner.sites.n_layers:
            yield self._next

    def resident(self, layer: int) -> AbstractContextManager[None]:
        """Keep the weights of block `layer` in memory."""
        return self.runner.resident(layer)

    @torch.no_grad()
    def steps(self, layer: int) -> Iterator[SingleStep]:
        """Run block `layer` on every batch."""
        self._written = []
        for index, batch in enumerate(self.batches):
            call = self.runner.call(layer, batch)
            output, states = self.runner.run(
                layer, call, self._streams[index], self.locations, carried=self._carried[index]
            )
            self._streams[index] = output
            if "post_mlp" in states:
                self._written.append(states["post_mlp"])
            named = {**states, "post_block": output}
            counted = {name: wide(state[batch.counted]) for name, state in named.items()}
            yield SingleStep(layer, batch, counted)

    @torch.no_grad()
    def advance(self, layer: int, change: Shift | None) -> None:
        """Add ``change(MLP's output, block's output)`` to every stream (None: nothing)."""
        if change:
            for index, batch in enumerate(self.batches):
                supplied = partial(change, self._written[index])
                output = self._streams[index]
                self._streams[index] = output + shift(supplied, output, steerable(batch.mask))
        self._next = layer + 1

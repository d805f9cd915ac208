"""One model as a row of blocks, each of which runs on any hidden state.

A block is run by replaying the call that the model itself makes: its own forward is started on the
batch with the earlier blocks bypassed and ended at the block, whose arguments (masks, rotary
embeddings, ...) are then used with another hidden state. Nothing of any model family is written
here.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn

from toolkit.documents.batches import Batch
from toolkit.models.hooks import (
    Call,
    Edit,
    Site,
    bypass,
    call_of,
    capture,
    first,
    hidden_state,
    replace,
    state_at,
    tuple_sizes,
    with_hidden_state,
)
from toolkit.models.locations import Sites, causal_lm, n_embeddings
from toolkit.models.offload import Offload

States = dict[str, Tensor]


class BlockRunner:
    """One model as a row of blocks, each of which runs on any hidden state."""

    def __init__(self, model: nn.Module, sites: Sites, offload: Offload | None = None) -> None:
        self.model = causal_lm(model)
        self.sites = sites
        self.offload = offload
        one_token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        with torch.no_grad():
            self._tuple_sizes = tuple_sizes(
                sites.blocks, lambda: self.model.base_model(input_ids=one_token, use_cache=False)
            )

    @cached_property
    @torch.no_grad()
    def parallel(self) -> bool:
        """Tell whether the MLP reads nothing of what attention adds (GPT-NeoX, Falcon): tried."""
        if {"pre_mlp", "post_mlp"} & self.sites.unavailable.keys():
            return False
        model = self.model
        device = model.get_input_embeddings().weight.device
        ids = torch.arange(4, device=device)[None] % n_embeddings(model)
        with self.resident(0):
            call = call_of(
                self.sites.blocks[0], lambda: model.base_model(input_ids=ids, use_cache=False)
            )
            hidden, locations = hidden_state(call), ("pre_mlp", "post_mlp")
            _, states = self.run(0, call, hidden, locations)
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(states["pre_mlp"].shape, generator=generator).to(hidden)
            other = states["pre_mlp"] + noise * states["pre_mlp"].std()
            _, moved = self.run(0, call, hidden, locations, {"pre_mlp": lambda _: other})
        return torch.equal(moved["post_mlp"], states["post_mlp"])

    def resident(self, layer: int) -> AbstractContextManager[None]:
        """Keep the weights of block `layer` in memory, where they come from disk when needed."""
        return self.offload.resident(layer) if self.offload else nullcontext()

    def embed(self, batch: Batch) -> Tensor:
        """Return the hidden state that enters block 0, `[batch, length, d_model]`."""
        return hidden_state(self.call(0, batch))

    @torch.no_grad()
    def entering(self, batch: Batch) -> list[Tensor]:
        """Tell what enters each block in the model's own pass, `[batch, length, d_model]` each."""
        with capture(self.sites.inputs) as states:
            self._transformer(batch)
        return [states[str(layer)] for layer in range(self.sites.n_layers)]

    def call(self, layer: int, batch: Batch) -> Call:
        """Return the arguments with which the model calls block `layer` on `batch`.

        The hidden state among them is that of the embeddings: earlier blocks are bypassed.
        """
        earlier = self.sites.blocks[:layer]
        with bypass(earlier, self._tuple_sizes[:layer]):
            return call_of(self.sites.blocks[layer], lambda: self._transformer(batch))

    def run(
        self,
        layer: int,
        call: Call,
        hidden: Tensor,
        locations: tuple[str, ...],
        edits: Mapping[str, Edit] | None = None,
        read: Edit | None = None,
    ) -> tuple[Tensor, States]:
        """Block `layer` on `hidden`: its output, and the states at `locations`.

        `edits` maps locations to what is put in place of the state there. `read` takes from each
        state, as it appears, what is wanted of it (a copy); by default all, `[batch, length, d]`.
        """
        sites = self.sites.of_layer(layer, locations)
        with ExitStack() as stack:
            for location, edit in (edits or {}).items():
                stack.enter_context(replace(self.sites.at[location, layer], edit))
            states = stack.enter_context(capture(sites, read or Tensor.clone))
            block_call = with_hidden_state(call, hidden)
            output = first(self.sites.blocks[layer](*block_call.args, **block_call.kwargs))
        if read:
            return output, states
        # Some families (OPT) hand their MLP all tokens of the batch in one row.
        return output, {k: v.reshape(*hidden.shape[:-1], -1) for k, v in states.items()}

    def states_until(
        self, layer: int, call: Call, hidden: Tensor, locations: tuple[str, ...]
    ) -> States:
        """Run block `layer` on `hidden` as far as the last of `locations`; the states there."""
        block, block_call = self.sites.blocks[layer], with_hidden_state(call, hidden)
        sites = self.sites.of_layer(layer, locations)
        last = sites.pop(locations[-1])
        with capture(sites) as states:
            ended = state_at(last, lambda: block(*block_call.args, **block_call.kwargs))
        states = {**states, locations[-1]: ended}
        return {k: v.reshape(*hidden.shape[:-1], -1) for k, v in states.items()}

    @contextmanager
    def started_at(self, layer: int, hidden: Tensor) -> Iterator[None]:
        """Let the model's forward passes begin at block `layer` with the state `hidden`."""
        start = Site(self.sites.blocks[layer], "input")
        with (
            bypass(self.sites.blocks[:layer], self._tuple_sizes[:layer]),
            replace(start, lambda _: hidden),
        ):
            yield

    def logits(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Return the model's logits when the last block's output is `hidden`."""
        last = self.sites.blocks[-1]
        with (
            bypass(self.sites.blocks, self._tuple_sizes),
            replace(Site(last, "output"), lambda _: hidden),
        ):
            return self.model(
                input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False
            ).logits

    def _transformer(self, batch: Batch) -> None:
        # Without the language-model head, which would cost more than a block.
        self.model.base_model(
            input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False
        )

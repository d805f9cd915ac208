"""One model as a row of blocks, each of which runs on any hidden state.

A block is run by replaying the call that the model itself makes: its own forward is started on the
batch with the earlier blocks bypassed and ended at the block, whose arguments (masks, rotary
embeddings, ...) are then used with another hidden state. What blocks leave for later ones beside it
(keys and values that these read, parallel streams) is carried along. Nothing of any model family is
written here.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn

from toolkit.documents.batches import Batch
from toolkit.errors import InputError
from toolkit.models.hooks import (
    Call,
    Carried,
    Edit,
    Site,
    before,
    beside,
    bypass,
    call_of,
    capture,
    has_more,
    hidden_state,
    replace,
    run_on,
    state_at,
    tuple_sizes,
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
        ids = torch.zeros(2, 3, dtype=torch.long, device=next(model.parameters()).device)
        entered: list[Call] = []
        with torch.no_grad(), before(sites.blocks[-1], entered.append):
            self._tuple_sizes = tuple_sizes(
                sites.blocks, lambda: self.model.base_model(input_ids=ids, use_cache=False)
            )
        shape = tuple(hidden_state(entered[0]).shape)
        if shape[:-1] not in ((2, 3), (6,)):
            raise InputError(
                f"a block of a {type(self.model).__name__} is given states {shape} of two rows of "
                "three tokens, expected [2, 3, width]: this family is not served yet"
            )
        # Whether blocks leave later ones more than the hidden state.
        self.carries = has_more(entered[0])

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
            self.read(batch)
        return [states[str(layer)] for layer in range(self.sites.n_layers)]

    def call(self, layer: int, batch: Batch, own: bool = False) -> Call:
        """Return the arguments with which the model calls block `layer` on `batch`.

        The hidden state among them is that of the embeddings: earlier blocks are bypassed. What
        they would leave beside it is given to `run`, or, where the block is run on the states of
        the model's `own` pass, is among the arguments.
        """
        n = 0 if own and self.carries else layer
        with bypass(self.sites.blocks[:n], self._tuple_sizes[:n]):
            return call_of(self.sites.blocks[layer], lambda: self.read(batch))

    def run(
        self,
        layer: int,
        call: Call,
        hidden: Tensor,
        locations: tuple[str, ...],
        edits: Mapping[str, Edit] | None = None,
        read: Edit | None = None,
        carried: Carried | None = None,
    ) -> tuple[Tensor, States]:
        """Block `layer` on `hidden`: its output, and the states at `locations`.

        `edits` maps locations to what is put in place of the state there. `read` takes from each
        state, as it appears, what is wanted of it (a copy); by default all, `[batch, length, d]`.
        `carried` is what earlier blocks left, to which this one adds.
        """
        sites = self.sites.of_layer(layer, locations)
        with ExitStack() as stack:
            for location, edit in (edits or {}).items():
                stack.enter_context(replace(self.sites.at[location, layer], edit))
            states = stack.enter_context(capture(sites, read or Tensor.clone))
            left = {} if carried is None else carried
            output = run_on(self.sites.blocks[layer], call, hidden, left)
        if read:
            return output, states
        # Some families (OPT) hand their MLP all tokens of the batch in one row.
        return output, {k: v.reshape(*hidden.shape[:-1], -1) for k, v in states.items()}

    def states_until(
        self,
        layer: int,
        call: Call,
        hidden: Tensor,
        locations: tuple[str, ...],
        carried: Carried | None = None,
    ) -> States:
        """Run block `layer` on `hidden` as far as the last of `locations`; the states there."""
        block = self.sites.blocks[layer]
        sites = self.sites.of_layer(layer, locations)
        last = sites.pop(locations[-1])
        with capture(sites) as states:
            ended = state_at(last, lambda: run_on(block, call, hidden, dict(carried or {})))
        states = {**states, locations[-1]: ended}
        return {k: v.reshape(*hidden.shape[:-1], -1) for k, v in states.items()}

    @contextmanager
    def started_at(self, layer: int, hidden: Tensor) -> Iterator[None]:
        """Let the model's forward passes begin at block `layer` with its own state `hidden`.

        Where later blocks read what earlier ones left, these run as well.
        """
        if self.carries:
            yield
            return
        start = Site(self.sites.blocks[layer], "input")
        with (
            bypass(self.sites.blocks[:layer], self._tuple_sizes[:layer]),
            replace(start, lambda _: hidden),
        ):
            yield

    def logits(self, batch: Batch, hidden: Tensor, carried: Carried) -> Tensor:
        """Return the model's logits when the last block's output is `hidden`."""
        last = self.sites.n_layers - 1
        left = beside(self.call(last, batch), hidden, carried)
        with (
            bypass(self.sites.blocks, self._tuple_sizes),
            replace(Site(self.sites.blocks[last], "output", whole=True), lambda _: left),
        ):
            return self.model(
                input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False
            ).logits

    def read(self, batch: Batch) -> None:
        """Let the model read `batch`, without its head, which would cost more than a block."""
        self.model.base_model(
            input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False
        )

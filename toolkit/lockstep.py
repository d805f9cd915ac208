"""The march: both models advance block by block over all documents, and deltas are taken.

Every document passes block l of both models before any passes block l + 1. Between blocks travel
*streams*, the residual states of all tokens. A block is run on a stream by replaying the call that
the model itself makes: its own forward is started on the batch with the earlier blocks bypassed
and ended at the block, whose arguments (masks, rotary embeddings, ...) are then used with another
hidden state. Nothing of any model family is written here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from toolkit.documents import Batch
from toolkit.hooks import (
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
from toolkit.locations import Sites, causal_lm
from toolkit.offload import Offload
from toolkit.streams import Shape, Stream

Mode = Literal["free", "forced"]
INSIDE = ("heads", "pre_mlp")  # locations whose state the rest of the block reads
States = dict[str, Tensor]


def wide(states: Tensor) -> Tensor:
    """`states` in the precision of statistics' inputs: float64 stays, all else becomes float32."""
    return states if states.dtype == torch.float64 else states.float()


def delta(tuned: Tensor, base: Tensor) -> Tensor:
    """The oracle delta, ``tuned − base``, of any shape."""
    return wide(tuned) - wide(base)


class Blocks:
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

    def resident(self, layer: int) -> AbstractContextManager[None]:
        """Keep the weights of block `layer` in memory, where they come from disk when needed."""
        return self.offload.resident(layer) if self.offload else nullcontext()

    def embed(self, batch: Batch) -> Tensor:
        """The hidden state that enters block 0, `[batch, length, d_model]`."""
        return hidden_state(self.call(0, batch))

    @torch.no_grad()
    def entering(self, batch: Batch) -> list[Tensor]:
        """What enters each block in the model's own pass, `[batch, length, d_model]` each."""
        with capture(self.sites.inputs) as states:
            self._transformer(batch)
        return [states[str(layer)] for layer in range(self.sites.n_layers)]

    def call(self, layer: int, batch: Batch) -> Call:
        """The arguments with which the model calls block `layer` on `batch`.

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

    def state(self, layer: int, call: Call, hidden: Tensor, location: str) -> Tensor:
        """The state at `location` alone: block `layer` is run on `hidden` as far as there."""
        block, block_call = self.sites.blocks[layer], with_hidden_state(call, hidden)
        site = self.sites.at[location, layer]
        state = state_at(site, lambda: block(*block_call.args, **block_call.kwargs))
        return state.reshape(*hidden.shape[:-1], -1)

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
        """The model's logits when the last block's output is `hidden`."""
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


@dataclass(frozen=True)
class Step:
    """One batch in one block: the states of each stream by location, `[n, d_model]`.

    They are those of the n counted tokens, as statistics read them (`wide`). `forced` are the base
    block's states on the tuned stream, `steered` those on the stream of each adapter family that
    is being fitted (fit documents only).
    """

    layer: int
    batch: Batch
    tuned: States
    base: States
    forced: States
    steered: dict[str, States]

    def source(self, mode: Mode, location: str) -> Tensor:
        """The base model's state in `mode`."""
        return (self.base if mode == "free" else self.forced)[location]

    def delta(self, mode: Mode, location: str) -> Tensor:
        """The delta of `mode`."""
        return delta(self.tuned[location], self.source(mode, location))

    def missing(self, name: str, location: str) -> Tensor:
        """The sequential delta of stream `name`, tuned − steered."""
        return delta(self.tuned[location], self.steered[name][location])


@dataclass
class March:
    """Base and tuned model advancing together over `batches`.

    `locations` are captured in every block (`post_block` among them); `extra` locations from the
    base model's own stream alone, `forced_extra` from the forced one. `steered` maps the name of
    each adapter family to its location; its stream carries the fit documents. Without `free` the
    base model's own stream is left out, without `forced` its blocks on the tuned stream. `own` are
    the indices of the batches that this process marches (None: all), in that order. Streams are
    memory-mapped in `folder`, if there is one; a march that was ended there after `start` blocks
    goes on. Use::

        for layer in march.layers():
            for step in march.steps(layer):
                ...
            march.advance(layer, {name: adapter, ...})
    """

    base: Blocks
    tuned: Blocks
    batches: Sequence[Batch]
    locations: tuple[str, ...]
    extra: tuple[str, ...] = ()
    forced_extra: tuple[str, ...] = ()
    steered: Mapping[str, str] = field(default_factory=dict)
    free: bool = True
    forced: bool = True
    own: Sequence[int] | None = None
    folder: Path | None = None
    start: int = 0

    @torch.no_grad()
    def __post_init__(self) -> None:
        self._next = self.start
        self._streams: dict[str, Stream] = {}
        self._scratch: dict[str, Stream] = {}
        self._own = range(len(self.batches)) if self.own is None else self.own
        fit = [index for index in self._own if not self.batches[index].held_out]
        self._shape = Shape.of(self.base.embed(self.batches[0]))
        for name in (*(("base", "tuned") if self.free else ("tuned",)), *self.steered):
            indices = fit if name in self.steered else self._own
            stream = self._streams[name] = self._stream(indices, name)
            if not self.start:
                blocks = self.tuned if name == "tuned" else self.base
                for index in indices:
                    stream.begin(index, blocks.embed(self.batches[index]))
        for name, location in self.steered.items():
            if location == "post_mlp":
                self._scratch[name] = self._stream(fit, f"{name}-scratch")
        self._fit = fit

    def layers(self) -> Iterator[int]:
        """The blocks that are still to be passed."""
        while self._next < self.base.sites.n_layers:
            yield self._next

    @contextmanager
    def resident(self, layer: int) -> Iterator[None]:
        """Keep the weights of block `layer` of both models while it is passed and looked at."""
        with self.base.resident(layer), self.tuned.resident(layer):
            yield

    @torch.no_grad()
    def steps(self, layer: int) -> Iterator[Step]:
        """Run block `layer` on every batch; base and tuned streams advance on the way."""
        with self.resident(layer):
            yield from self._steps(layer)

    def _steps(self, layer: int) -> Iterator[Step]:
        for index in self._own:
            batch = self.batches[index]
            call = self.base.call(layer, batch)
            tuned_call = self.tuned.call(layer, batch)
            tuned_in = self._streams["tuned"][index]

            def read(states: Tensor, batch: Batch = batch) -> Tensor:
                return wide(batch.of_counted(states))

            base: States = {}
            if self.free:
                base_in, locations = self._streams["base"][index], (*self.locations, *self.extra)
                base_out, base = self.base.run(layer, call, base_in, locations, read=read)
                self._streams["base"].put(index, base_out)
            forced: States = {}
            if self.forced:
                locations = (*self.locations, *self.forced_extra)
                _, forced = self.base.run(layer, call, tuned_in, locations, read=read)
            tuned_out, tuned = self.tuned.run(
                layer, tuned_call, tuned_in, self.locations, read=read
            )
            self._streams["tuned"].put(index, tuned_out)
            names = () if batch.held_out else self.steered
            steered = {name: self._run_steered(name, layer, index, call) for name in names}
            yield Step(layer, batch, tuned, base, forced, steered)

    @torch.no_grad()
    def advance(self, layer: int, adapters: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """Carry each steered stream past block `layer` with the adapter just fitted for it."""
        with self.base.resident(layer):
            self._steer(layer, adapters)
        for stream in self._streams.values():
            stream.turn()
        self._next = layer + 1

    def _steer(self, layer: int, adapters: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        for name, location in self.steered.items():
            stream = self._streams[name]
            for index in self._fit:
                batch = self.batches[index]
                where = steerable(batch.mask)
                if location in INSIDE:  # the rest of the block reads what is steered
                    edit = steered_by(adapters[name], where)
                    call = self.base.call(layer, batch)
                    left, _ = self.base.run(layer, call, stream[index], (), {location: edit})
                    stream.put(index, left)
                else:
                    left = stream.left(index)
                    source = self._scratch[name].left(index) if name in self._scratch else left
                    stream.put(index, left + shift(adapters[name], source, where))

    def _run_steered(self, name: str, layer: int, index: int, call: Call) -> States:
        location, stream, batch = self.steered[name], self._streams[name], self.batches[index]
        if location in INSIDE:  # the rest of the block waits for the adapter
            state = self.base.state(layer, call, stream[index], location)
            return {location: wide(batch.of_counted(state))}
        scratch = self._scratch.get(name)
        locations = (location,) if scratch else ()
        left, states = self.base.run(layer, call, stream[index], locations)
        stream.put(index, left)
        if scratch:
            scratch.put(index, states[location])
        states = {**states, "post_block": left}
        return {name: wide(batch.of_counted(state)) for name, state in states.items()}

    def _stream(self, indices: Sequence[int], name: str) -> Stream:
        if self.folder is None:
            return Stream({index: self.batches[index] for index in indices}, self._shape)
        everything = name in ("base", "tuned")
        batches = {i: b for i, b in enumerate(self.batches) if everything or not b.held_out}
        path = self.folder / f"{name.replace('/', '-')}.stream"
        return Stream.mapped(batches, self._shape, path, turns=self.start)


def target_of(location: str) -> str:
    """Where the delta is taken that an adapter at `location` must supply.

    After the MLP, what is missing of the whole block; before it, of that location alone.
    """
    return location if location in INSIDE else "post_block"


def steerable(mask: Tensor) -> Tensor:
    """Which tokens a fitted map may steer: all but padding and each document's first token.

    `mask` bool `[batch, length]`, true for tokens, padded on either side.
    """
    return mask & (mask.cumsum(1) > 1)


def shift(adapter: Callable[[Tensor], Tensor], states: Tensor, where: Tensor) -> Tensor:
    """What `adapter` adds to `states`: nothing at the tokens that are false in `where`."""
    return (adapter(states) * where.reshape(*states.shape[:-1], 1)).to(states.dtype)


def steered_by(adapter: Callable[[Tensor], Tensor], where: Tensor) -> Edit:
    """The edit that puts ``states + adapter(states)`` in place of states, `where` that is true."""
    return lambda states: states + shift(adapter, states, where)

"""The march: both models advance block by block over all documents, and deltas are taken.

Every document passes block l of both models before any passes block l + 1. Between blocks travel
*streams*, the residual states of all tokens. A block is run on a stream by replaying the call that
the model itself makes: its own forward is started on the batch with the earlier blocks bypassed
and ended at the block, whose arguments (masks, rotary embeddings, ...) are then used with another
hidden state. Nothing of any model family is written here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self.model = causal_lm(model)
        self.sites = sites
        one_token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        with torch.no_grad():
            self._tuple_sizes = tuple_sizes(
                sites.blocks, lambda: self.model.base_model(input_ids=one_token, use_cache=False)
            )

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
    ) -> tuple[Tensor, States]:
        """Block `layer` on `hidden`: its output, and the states at `locations`.

        `edits` maps locations to what is put in place of the state there.
        """
        sites = self.sites.of_layer(layer, locations)
        with ExitStack() as stack:
            for location, edit in (edits or {}).items():
                stack.enter_context(replace(self.sites.at[location, layer], edit))
            states = stack.enter_context(capture(sites))
            block_call = with_hidden_state(call, hidden)
            output = first(self.sites.blocks[layer](*block_call.args, **block_call.kwargs))
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


class Stream:
    """The residual states of all tokens of `batches`, in memory or memory-mapped at `path`.

    `batches` maps indices to batches; `first_states` gives width, precision and device.
    """

    def __init__(
        self, batches: Mapping[int, Batch], first_states: Tensor, path: Path | None = None
    ) -> None:
        width, dtype = first_states.shape[-1], first_states.dtype
        sizes = [batch.ids.numel() for batch in batches.values()]
        n = sum(sizes) * width
        if path is None:
            self.flat = torch.empty(n, dtype=dtype, device=first_states.device)
        else:
            self.flat = torch.from_file(str(path), shared=True, size=n, dtype=dtype)
        parts = self.flat.view(-1, width).split(sizes)
        self._parts = {
            index: part.view(*batch.ids.shape, width)
            for part, (index, batch) in zip(parts, batches.items(), strict=True)
        }

    def __getitem__(self, index: int) -> Tensor:
        return self._parts[index]

    def __setitem__(self, index: int, states: Tensor) -> None:
        self._parts[index].copy_(states)


@dataclass(frozen=True)
class Step:
    """One batch in one block: the states of each stream by location, `[batch, length, d_model]`.

    `forced` are the base block's states on the tuned stream, `steered` those on the stream of each
    adapter family that is being fitted (fit documents only).
    """

    layer: int
    batch: Batch
    tuned: States
    base: States
    forced: States
    steered: dict[str, States]

    def source(self, mode: Mode, location: str) -> Tensor:
        """The base model's state in `mode` on the counted tokens, `[n, d_model]`."""
        states = self.base if mode == "free" else self.forced
        return wide(states[location][self.batch.counted])

    def delta(self, mode: Mode, location: str) -> Tensor:
        """The delta of `mode` on the counted tokens, `[n, d_model]`."""
        return delta(self.tuned[location][self.batch.counted], self.source(mode, location))

    def steered_source(self, name: str, location: str) -> Tensor:
        """The state of the steered stream `name` on the counted tokens, `[n, d_model]`."""
        return wide(self.steered[name][location][self.batch.counted])

    def missing(self, name: str, location: str) -> Tensor:
        """The sequential delta of stream `name`, tuned − steered, on the counted tokens."""
        counted = self.batch.counted
        return delta(self.tuned[location][counted], self.steered[name][location][counted])


@dataclass
class March:
    """Base and tuned model advancing together over `batches`.

    `locations` are captured in every block (`post_block` among them); `extra` locations from the
    base model's own stream alone, `forced_extra` from the forced one. `steered` maps the name of
    each adapter family to its location; its stream carries the fit documents. Without `free` the
    base model's own stream is left out. Streams are memory-mapped in `folder`, if there is one.
    Use::

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
    folder: Path | None = None
    _next: int = 0

    def __post_init__(self) -> None:
        self._streams: dict[str, Stream] = {}
        self._scratch: dict[str, Stream] = {}
        everything = dict(enumerate(self.batches))
        self._fit = {index: b for index, b in everything.items() if not b.held_out}
        with torch.no_grad():
            own = ("base", "tuned") if self.free else ("tuned",)
            for name in (*own, *self.steered):
                batches = self._fit if name in self.steered else everything
                stream = self._streams[name] = self._new_stream(name, batches)
                blocks = self.tuned if name == "tuned" else self.base
                for index, batch in batches.items():
                    stream[index] = blocks.embed(batch)
        for name, location in self.steered.items():
            if location == "post_mlp":
                self._scratch[name] = self._new_stream(f"{name}-scratch", self._fit)

    def layers(self) -> Iterator[int]:
        """The blocks that are still to be passed."""
        while self._next < self.base.sites.n_layers:
            yield self._next

    @torch.no_grad()
    def steps(self, layer: int) -> Iterator[Step]:
        """Run block `layer` on every batch; base and tuned streams advance on the way."""
        for index, batch in enumerate(self.batches):
            call = self.base.call(layer, batch)
            tuned_call = self.tuned.call(layer, batch)
            tuned_in = self._streams["tuned"][index]
            base: States = {}
            if self.free:
                base_out, base = self.base.run(
                    layer, call, self._streams["base"][index], (*self.locations, *self.extra)
                )
            _, forced = self.base.run(layer, call, tuned_in, (*self.locations, *self.forced_extra))
            tuned_out, tuned = self.tuned.run(layer, tuned_call, tuned_in, self.locations)
            names = self.steered if index in self._fit else ()
            steered = {name: self._run_steered(name, layer, index, call) for name in names}
            yield Step(layer, batch, tuned, base, forced, steered)
            if self.free:
                self._streams["base"][index] = base_out
            self._streams["tuned"][index] = tuned_out

    @torch.no_grad()
    def advance(self, layer: int, adapters: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """Carry each steered stream past block `layer` with the adapter just fitted for it."""
        for name, location in self.steered.items():
            stream = self._streams[name]
            for index, batch in self._fit.items():
                where = steerable(batch.mask)
                if location in INSIDE:  # the rest of the block reads what is steered
                    edit = steered_by(adapters[name], where)
                    call = self.base.call(layer, batch)
                    stream[index], _ = self.base.run(
                        layer, call, stream[index], (), {location: edit}
                    )
                else:
                    source = (self._scratch if location == "post_mlp" else self._streams)[name]
                    stream[index] = stream[index] + shift(adapters[name], source[index], where)
        self._next = layer + 1

    def state(self) -> dict[str, Tensor]:
        """All that the march needs to go on after the last finished block: the live streams."""
        return {name: stream.flat for name, stream in self._streams.items()}

    def restore(self, next_layer: int, state: Mapping[str, Tensor]) -> None:
        """Go on at block `next_layer` from what `state` returned."""
        for name, stream in self._streams.items():
            stream.flat.copy_(state[name])
        self._next = next_layer

    def _run_steered(self, name: str, layer: int, index: int, call: Call) -> States:
        location, stream = self.steered[name], self._streams[name]
        if location in INSIDE:  # the rest of the block waits for the adapter
            return {location: self.base.state(layer, call, stream[index], location)}
        locations = (location, target_of(location))
        output, states = self.base.run(layer, call, stream[index], locations)
        if location == "post_mlp":
            self._scratch[name][index] = states[location]
        stream[index] = output
        return states

    def _new_stream(self, name: str, batches: Mapping[int, Batch]) -> Stream:
        path = self.folder / f"{name.replace('/', '-')}.stream" if self.folder else None
        return Stream(batches, self.base.embed(self.batches[0]), path)


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

"""The march: both models advance block by block over all documents, and deltas are taken.

Every document passes block l of both models before any passes block l + 1. Between blocks travel
*streams*, the residual states of all tokens. A block is run on a stream by replaying the call that
the model itself makes: its own forward is started on the batch with the earlier blocks bypassed
and ended at the block, whose arguments (masks, rotary embeddings, ...) are then used with another
hidden state. Nothing of any model family is written here.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from toolkit.documents.batches import Batch
from toolkit.lockstep.streams import Shape, Stream
from toolkit.models.deltas import delta, wide
from toolkit.models.edits import shift, steerable, steered_by, target_of
from toolkit.models.hooks import Call, Carried
from toolkit.models.locations import INSIDE
from toolkit.models.runner import BlockRunner, States

Mode = Literal["free", "forced"]


@dataclass(frozen=True)
class Step:
    """One batch in one block: the states of each stream by location, `[n, d_model]`.

    They are those of the n counted tokens, as statistics read them (`wide`). `forced` are the base
    block's states on the tuned stream, `steered` those on the stream of each adapter family that
    is being fitted (fit documents only); these have the point of the stream that the family adds
    to. `index` is the batch's place among all; `parallel`: the MLP reads nothing of what attention
    adds.
    """

    layer: int
    batch: Batch
    tuned: States
    base: States
    forced: States
    steered: dict[str, States]
    index: int = 0
    parallel: bool = False

    def source(self, mode: Mode, location: str) -> Tensor:
        """Return the base model's state in `mode`."""
        return (self.base if mode == "free" else self.forced)[location]

    def delta(self, mode: Mode, location: str) -> Tensor:
        """Return the delta of `mode`."""
        return delta(self.tuned[location], self.source(mode, location))

    def own_delta(self, location: str) -> Tensor:
        """Return the forced delta of the point that `location` adds to.

        Both blocks read one stream, so after the first skip it is the attention branch's.
        """
        point = target_of(location, self.parallel)
        return self.delta("forced", "pre_mlp" if point == "resid_mid" else point)

    def sequential_delta(self, name: str, location: str) -> Tensor:
        """Return what stream `name` misses where `location` adds to it, tuned − steered."""
        point = target_of(location, self.parallel)
        return delta(self.tuned[point], self.steered[name][point])


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

    base: BlockRunner
    tuned: BlockRunner
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
        # What each stream's blocks left for later ones, by its name and batch.
        self._carried: dict[tuple[str, int], Carried] = defaultdict(dict)
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
        self._parallel = "pre_mlp" in self.locations and self.base.parallel
        self._has_middle = not self._parallel and bool(set(self.steered.values()) & set(INSIDE))

    def layers(self) -> Iterator[int]:
        """Yield the blocks that are still to be passed."""
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
                base_out, base = self.base.run(
                    layer, call, base_in, locations, read=read, carried=self._carried["base", index]
                )
                self._streams["base"].put(index, base_out)
            forced: States = {}
            if self.forced:
                locations = (*self.locations, *self.forced_extra)
                entered = dict(self._carried["tuned", index])  # as the tuned block is about to be
                _, forced = self.base.run(
                    layer, call, tuned_in, locations, read=read, carried=entered
                )
            tuned_out, tuned = self.tuned.run(
                layer,
                tuned_call,
                tuned_in,
                self.locations,
                read=read,
                carried=self._carried["tuned", index],
            )
            if self._has_middle:
                tuned["resid_mid"] = read(tuned_in) + tuned["pre_mlp"]
            self._streams["tuned"].put(index, tuned_out)
            names = () if batch.held_out else self.steered
            steered = {name: self._run_steered(name, layer, index, call) for name in names}
            yield Step(layer, batch, tuned, base, forced, steered, index, self._parallel)

    @torch.no_grad()
    def advance(self, layer: int, adapters: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """Carry each steered stream past block `layer` with the adapter just fitted for it."""
        with self.base.resident(layer):
            self._steer(layer, adapters)
        for stream in self._streams.values():
            stream.turn()
        self._next = layer + 1
        if self._next == self.base.sites.n_layers:
            self._carried.clear()

    def entering(self, name: str, index: int) -> Tensor:
        """Return the states of a stream between two blocks, `[batch, length, d_model]`."""
        return self._streams[name][index]

    @torch.no_grad()
    def add(self, name: str, adapter: Callable[[Tensor], Tensor]) -> None:
        """Add what `adapter` gives to a steered stream between two blocks: at a second place."""
        for index in self._fit:
            states, where = self._streams[name][index], steerable(self.batches[index].mask)
            self._streams[name].begin(index, states + shift(adapter, states, where))

    def _steer(self, layer: int, adapters: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        for name, location in self.steered.items():
            stream = self._streams[name]
            for index in self._fit:
                batch = self.batches[index]
                where = steerable(batch.mask)
                if location in INSIDE:  # the rest of the block reads what is steered
                    edit = steered_by(adapters[name], where)
                    call = self.base.call(layer, batch)
                    left, _ = self.base.run(
                        layer,
                        call,
                        stream[index],
                        (),
                        {location: edit},
                        carried=self._carried[name, index],
                    )
                    stream.put(index, left)
                else:
                    left = stream.left(index)
                    source = self._scratch[name].left(index) if name in self._scratch else left
                    stream.put(index, left + shift(adapters[name], source, where))

    def _run_steered(self, name: str, layer: int, index: int, call: Call) -> States:
        location, stream, batch = self.steered[name], self._streams[name], self.batches[index]

        def read(states: Tensor) -> Tensor:
            return wide(batch.of_counted(states))

        if location in INSIDE and not self._parallel:  # the rest of the block waits for the adapter
            wanted = tuple(dict.fromkeys((location, "pre_mlp")))
            states = self.base.states_until(
                layer, call, stream[index], wanted, self._carried[name, index]
            )
            states = {name: read(state) for name, state in states.items()}
            return {**states, "resid_mid": read(stream[index]) + states["pre_mlp"]}
        scratch = self._scratch.get(name)
        locations = () if location == "post_block" else (location,)
        left, states = self.base.run(
            layer, call, stream[index], locations, carried=self._carried[name, index]
        )
        if location not in INSIDE:  # else the block is run again, steered, from the same states
            stream.put(index, left)
        if scratch:
            scratch.put(index, states[location])
        return {name: read(state) for name, state in {**states, "post_block": left}.items()}

    def _stream(self, indices: Sequence[int], name: str) -> Stream:
        if self.folder is None:
            return Stream({index: self.batches[index] for index in indices}, self._shape)
        everything = name in ("base", "tuned")
        batches = {i: b for i, b in enumerate(self.batches) if everything or not b.held_out}
        path = self.folder / f"{name.replace('/', '-')}.stream"
        return Stream.mapped(batches, self._shape, path, turns=self.start)

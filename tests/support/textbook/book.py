"""Every table of a diagnosis is computed slowly, by one class."""

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.textbook.definitions import BRANCHES, RANKS, SHARED_RANKS, Array, Map
from tests.support.textbook.fits import explained, fit, spectrum
from tests.support.textbook.forced_reach import Tokens, forced_reach, normalisation
from tests.support.textbook.generation import greedy, kl
from tests.support.textbook.mlp import first_order, inner_pair, mlp_terms
from tests.support.textbook.modules import is_parallel, mlp_output
from tests.support.textbook.passes import Seen, run, run_first_input
from tests.support.textbook.reachability import reachability
from tests.support.textbook.weights import weights
from tests.support.tiny import blocks_of


@dataclass
class Textbook:
    """All tables of one pair of models, from `documents`: (token ids, held out)."""

    base: Any
    tuned: Any
    documents: list[tuple[tuple[int, ...], bool]]

    def __post_init__(self) -> None:
        self.n_layers = len(blocks_of(self.base))
        self.answer = functools.cache(self._answer)
        self.of: dict[str, list[Seen]] = {"base": [], "tuned": [], "forced": []}
        for ids, _ in self.documents:
            tuned = run(self.tuned, ids)
            base = run(self.base, ids)
            first = run_first_input(self.base, ids)
            enters = lambda layer, t=tuned, x=first: (  # noqa: E731
                t.states["post_block", layer - 1] if layer else x
            )
            self.of["base"].append(base)
            self.of["tuned"].append(tuned)
            self.of["forced"].append(run(self.base, ids, block_inputs=enters))

    def states(self, of: str, location: str, layer: int, held_out: bool | None = None) -> Array:
        """All counted tokens: every one but each document's first, `[n, d]`."""
        return self.rows(self.of[of], location, layer, held_out)

    def rows(self, seen: Sequence[Seen], location: str, layer: int, held_out: bool | None) -> Array:
        return np.concatenate(
            [
                s.states[location, layer][1:]
                for s, (_, side) in zip(seen, self.documents, strict=True)
                if held_out is None or side == held_out
            ]
        )

    def source(self, mode: str, location: str, layer: int, held_out: bool | None = None) -> Array:
        return self.states("base" if mode == "free" else "forced", location, layer, held_out)

    def delta(self, mode: str, location: str, layer: int, held_out: bool | None = None) -> Array:
        tuned = self.states("tuned", location, layer, held_out)
        return tuned - self.source(mode, location, layer, held_out)

    def arrives_at(self, location: str) -> str:
        """The point of the stream that what is added at `location` arrives at."""
        inside = location in ("heads", "pre_mlp") and not is_parallel(blocks_of(self.base)[0])
        return "resid_mid" if inside else "post_block"

    def norms(self) -> Iterator[dict[str, Any]]:
        for layer in range(self.n_layers):
            for of in ("base", "tuned", "delta_free", "delta_forced"):
                row: dict[str, Any] = {"layer": layer, "of": of}
                for location in BRANCHES:
                    if of.startswith("delta"):
                        vectors = self.delta(of.removeprefix("delta_"), location, layer)
                    else:
                        vectors = self.states(of, location, layer)
                    row[location] = np.mean([np.linalg.norm(v) for v in vectors])
                row["mlp_share"] = row["post_mlp"] / (row["pre_mlp"] + row["post_mlp"])
                yield row

    def spectrum(self) -> Iterator[dict[str, Any]]:
        for layer in range(self.n_layers):
            for location in BRANCHES:
                for mode in ("free", "forced"):
                    key = {"layer": layer, "location": location, "mode": mode}
                    delta = self.delta(mode, location, layer)
                    yield key | spectrum(delta, self.source(mode, location, layer))

    def linear_fit(self) -> Iterator[dict[str, Any]]:
        for layer in range(self.n_layers):
            for source in BRANCHES:
                for mode, target in (("free", "own"), ("forced", "own"), ("forced", "block")):
                    aim = source if target == "own" else "post_block"
                    sides = [
                        (self.source(mode, source, layer, side), self.delta(mode, aim, layer, side))
                        for side in (False, True)
                    ]
                    d = sides[0][0].shape[1]
                    for rank in [r for r in RANKS if r < d] + ["full"]:
                        model = fit(*sides[0], rank)
                        yield {
                            "layer": layer,
                            "source": source,
                            "target": target,
                            "mode": mode,
                            "rank": rank,
                            "explained_fit": explained(model, *sides[0]),
                            "explained_heldout": explained(model, *sides[1]),
                        }

    def first_order(self) -> Iterator[dict[str, Any]]:
        for layer in range(self.n_layers):
            pair = blocks_of(self.base)[layer], blocks_of(self.tuned)[layer]
            yield {"layer": layer} | first_order(*pair, self.states("base", "mlp_in", layer))

    def reachability(self) -> Iterator[dict[str, Any]]:
        for layer in range(self.n_layers):
            pair = blocks_of(self.base)[layer], blocks_of(self.tuned)[layer]
            h = self.states("base", "mlp_in", layer)
            for row in reachability(*pair, h):
                yield {"layer": layer} | row

    # --- inside the block

    def each_block(self) -> Iterator[tuple[int, Any, Any]]:
        yield from zip(
            range(self.n_layers), blocks_of(self.base), blocks_of(self.tuned), strict=True
        )

    def tokens(self, layer: int) -> Tokens:
        forced = {name: self.states("forced", name, layer) for name in (*BRANCHES, "heads")}
        return Tokens(
            h=self.states("base", "mlp_in", layer),
            x=forced["post_block"] - forced["post_mlp"],
            attended=forced["pre_mlp"],
            heads=forced["heads"],
            forced_delta=self.delta("forced", "post_block", layer),
        )

    def forced_reach(self) -> Iterator[dict[str, Any]]:
        n_heads = self.base.config.num_attention_heads
        for layer, *blocks in self.each_block():
            for row in forced_reach(*blocks, self.tokens(layer), n_heads):
                yield {"layer": layer} | row

    def normalisation(self) -> Iterator[dict[str, Any]]:
        for layer, base, _ in self.each_block():
            yield {"layer": layer} | normalisation(base, self.tokens(layer))

    def inner_pair(self) -> Iterator[dict[str, Any]]:
        for layer, *blocks in self.each_block():
            sides = (self.states("base", "mlp_in", layer, side) for side in (False, True))
            for row in inner_pair(*blocks, *sides):
                yield {"layer": layer} | row

    def first_order_scale(self, scales: Sequence[float]) -> Iterator[dict[str, Any]]:
        for layer, base, tuned in self.each_block():
            h = self.states("base", "mlp_in", layer)
            for scale in scales:
                between = copy.deepcopy(tuned)
                for ours, theirs in zip(base.parameters(), between.parameters(), strict=True):
                    theirs.data = ours + scale * (theirs - ours)
                found = first_order(base, between, h)
                yield {"layer": layer, "scale": scale, "n_tokens": len(h)} | found

    def mlp_fit(self) -> Iterator[dict[str, Any]]:
        """``down`` from the MLP's output at every rank, and that output from its input, centred."""
        for layer, *blocks in self.each_block():
            sides = [self.states("base", "mlp_in", layer, side) for side in (False, True)]
            y = [mlp_output(blocks[0], h) for h in sides]
            down = [mlp_terms(*blocks, h)["down"] for h in sides]
            for rank in [r for r in SHARED_RANKS if r == "full" or r < y[0].shape[1]]:
                model = fit(y[0], down[0], rank)
                labels = {"layer": layer, "source": "mlp_out", "target": "down", "rank": rank}
                shares = [explained(model, *side) for side in zip(y, down, strict=True)]
                yield {**labels, "explained_fit": shares[0], "explained_heldout": shares[1]}
            A, b = fit(sides[0], y[0], "full")
            shares = [
                1 - np.sum((t - h @ A.T - b) ** 2) / np.sum((t - t.mean(0)) ** 2)
                for h, t in zip(sides, y, strict=True)
            ]
            labels = {"layer": layer, "source": "mlp_in", "target": "mlp_out", "rank": "full"}
            yield {**labels, "explained_fit": shares[0], "explained_heldout": shares[1]}

    def weights(self) -> Iterator[dict[str, Any]]:
        for layer, *blocks in self.each_block():
            for row in weights(*blocks):
                yield {"layer": layer} | row

    # --- maps in the oracle's place

    def maps(self, location: str, rank: int | str, how: str) -> dict[int, Map]:
        """A fitted map for every block: `how` is free, forced or sequential."""
        if how == "sequential":
            return self.sequential_maps(location, rank)
        target = location if how == "free" else self.arrives_at(location)
        return {
            layer: fit(
                self.source(how, location, layer, False),
                self.delta(how, target, layer, False),
                rank,
            )
            for layer in range(self.n_layers)
        }

    def sequential_maps(self, location: str, rank: int | str) -> dict[int, Map]:
        """Block by block; the base model steered so far is run again from its first token."""
        target = self.arrives_at(location)
        maps: dict[int, Map] = {}
        for layer in range(self.n_layers):
            steered = [
                run(self.base, ids, location=location, maps=maps) for ids, _ in self.documents
            ]
            X = self.rows(steered, location, layer, False)
            missing = self.states("tuned", target, layer, False)
            missing = missing - self.rows(steered, target, layer, False)
            maps[layer] = fit(X, missing, rank)
        return maps

    def divergences(
        self,
        prompts: Sequence[Sequence[int]],
        n_new: int,
        ends: set[int],
        location: str = "post_block",
        maps: dict[int, Map] | None = None,
        oracle: bool = False,
    ) -> dict[str, list[Array]]:
        """``KL(tuned ‖ steered)`` of every generated token of every prompt, by forcing."""

        def steered(ids: list[int]) -> Array:
            overwrite = None
            if oracle:
                states = run(self.tuned, ids).states
                overwrite = {i: states["post_block", i] for i in range(self.n_layers)}
            return run(self.base, ids, location=location, maps=maps, overwrite=overwrite).logits

        nats: dict[str, list[Array]] = {"tuned": [], "own": []}
        for prompt in prompts:
            ids, logits = self.answer(tuple(prompt), n_new, frozenset(ends))
            read = [*prompt, *ids[:-1]]
            nats["tuned"].append(kl(logits, steered(read)[len(prompt) - 1 :]))
            if not oracle:
                _, own = greedy(steered, prompt, n_new, ends)
                n = min(len(own), len(logits))
                nats["own"].append(kl(logits[:n], own[:n]))
        return nats

    def _answer(
        self, prompt: tuple[int, ...], n_new: int, ends: frozenset[int]
    ) -> tuple[list[int], Array]:
        return greedy(lambda ids: run(self.tuned, ids).logits, prompt, n_new, set(ends))

"""The best low-rank change of the weights, in closed form: what a LoRA of that size could be.

Fine-tuning changed each matrix by ΔW. Of it are kept the pieces that matter most to the outputs
``ΔW x``, over the inputs x that the tuned model gives the module on the fit documents (fit
"metric"), or the leading singular values of ΔW itself ("plain"). Changes of biases, of norms and
of whatever is no nn.Linear or Conv1D (experts kept as one tensor) are left out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from toolkit.adapters.weight_change import WeightChange, WeightFit
from toolkit.analysis.low_rank_change import MAX_RANK, Factors, LowRank, truncated, within_budget
from toolkit.blocks.read import affine, is_transposed, linear_modules, module_change
from toolkit.documents.batches import Batch
from toolkit.documents.corpus import Corpus, Reading
from toolkit.errors import InputError
from toolkit.fitting.block_result import Place
from toolkit.lockstep.march import Step
from toolkit.lockstep.single import SingleMarch, SingleStep
from toolkit.models.deltas import wide
from toolkit.models.hooks import Call, before, hidden_state
from toolkit.models.locations import causal_lm
from toolkit.models.pair import ModelPair
from toolkit.runtime.processes import ALONE, Processes
from toolkit.runtime.progress import progress
from toolkit.statistics import MomentSums
from toolkit.statistics.frame import shared_frames

FITS: tuple[WeightFit, ...] = ("metric", "plain")

Pieces = Mapping[WeightFit, Mapping[Place, LowRank]]
ModulePieces = tuple[Place, Mapping[WeightFit, LowRank]]  # those of one module, in both metrics


@dataclass(frozen=True)
class WeightSpec:
    """Say how a change of weights is cut: in which metric, and to which size.

    Either `budget`, the most numbers that all modules hold together, shared out by what they gain,
    or one `rank` for every module.
    """

    fit: WeightFit
    budget: int | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise InputError(f"fit is {self.fit!r}: expected {' or '.join(FITS)}")
        sizes = [size for size in (self.budget, self.rank) if size is not None]
        if len(sizes) != 1:
            raise InputError("give either a budget of numbers or one rank for all modules")
        if not isinstance(sizes[0], int) or sizes[0] < 1:
            raise InputError(f"a budget or a rank is {sizes[0]!r}: expected a whole number above 0")


@torch.no_grad()
def fit_weight_changes(
    pair: ModelPair,
    documents: Iterable[Any] | Corpus,
    budgets: Sequence[int],
    uniform: Sequence[int] = (),
    *,
    show_progress: bool = False,
    **reading: Unpack[Reading],
) -> dict[WeightSpec, WeightChange]:
    """Make the change of every budget and every uniform rank, in both metrics, in one march.

    The tuned model marches over the fit documents; `reading` says how documents become tokens,
    unless they are a `Corpus` already. Within a budget no module gets more than `MAX_RANK` pieces.
    """
    specs = [WeightSpec(fit, budget=budget) for budget in budgets for fit in FITS]
    specs += [WeightSpec(fit, rank=rank) for rank in uniform for fit in FITS]
    batches = pair.corpus(documents, **reading).fit_batches
    if not any(len(batch.places) for batch in batches):
        raise InputError("no token of the fit documents counts: give more or longer documents")
    march = SingleMarch(pair.tuned_runner, batches, ())
    widest = max([MAX_RANK] * bool(budgets) + list(uniform), default=0)
    pieces: dict[WeightFit, dict[Place, LowRank]] = {fit: {} for fit in FITS}
    with progress(
        "weights, block by block", pair.n_layers * len(batches), show_progress
    ) as step_on:
        for layer in march.layers():
            with pair.resident(layer), InputSums.of(pair, layer) as sums:
                for step in march.steps(layer):
                    sums.update(step)
                    step_on()
                for task in pieces_tasks(pair, layer, sums, widest):
                    place, found = task()
                    for fit in FITS:
                        pieces[fit][place] = found[fit]
                march.advance(layer, None)
    return changes_of(pair, pieces, specs)


class InputSums:
    """Sums up the second moments of what enters the linear modules of one block.

    A listener of any march that runs the block once for each step. It looks as long as its context
    lasts; held-out documents have no part. Modules that are given one and the same tensor share
    one sum. All `processes` take the frames of the first one's first tokens.
    """

    def __init__(self, modules: Mapping[str, nn.Module], processes: Processes = ALONE) -> None:
        self.modules, self.processes = dict(modules), processes
        self.shared: dict[str, str] = {}  # the module whose sum is each module's
        self._sums: MomentSums | None = None
        self._hooks = ExitStack()
        self._forget()

    @classmethod
    def of(cls, pair: ModelPair, layer: int, processes: Processes = ALONE) -> Self:
        """Listen to the tuned model's block `layer`, at the base model's linear modules."""
        theirs = pair.tuned_runner.sites.blocks[layer]
        names = linear_modules(pair.base_runner.sites.blocks[layer])
        return cls({name: theirs.get_submodule(name) for name in names}, processes)

    def __enter__(self) -> Self:
        for name, module in self.modules.items():
            self._hooks.enter_context(before(module, partial(self._listen, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._forget()

    def update(self, step: SingleStep | Step) -> None:
        """Add the counted tokens of the batch that has just passed the block."""
        inputs, shared, calls = self._inputs, self._same, self._calls
        self._forget()
        if step.batch.held_out or not len(step.batch.places):
            return
        for name in self.modules:
            _require_once(step.layer, name, calls[name], step.batch)
        values = {name: wide(step.batch.of_counted(state)) for name, state in inputs.items()}
        if self._sums is None:
            self._begin(shared, values)
        assert self._sums is not None
        assert shared == self.shared
        self._sums.update(values)

    def start(self) -> None:
        """Take the first process's frames where this one had no document."""
        if self._sums is None:
            self._begin({}, {})

    def reduce(self, processes: Processes) -> None:
        """Add up the sums of all `processes`: then each holds them all."""
        self.start()
        assert self._sums is not None
        self._sums.reduce(processes)

    def groups(self) -> list[tuple[str, ...]]:
        """Return the modules, those that share their inputs together."""
        assert self._sums is not None
        return [
            tuple(name for name, shares in self.shared.items() if shares == first)
            for first in self._sums.names
        ]

    def second_moment(self, name: str) -> Tensor:
        """Return ``E[xxᵀ]`` `[in, in]` of the inputs x of the module `name`."""
        assert self._sums is not None
        first = self.shared[name]
        # It is not kept, and no other is made beside it: an MLP's inner states have wide ones.
        return self._sums.result([(first, first)]).second_moment(first)

    def _listen(self, name: str, call: Call) -> None:
        state = hidden_state(call)
        # The tensor is held until the pass is over, so that its id is no other's; its version
        # tells a tensor from what was written into it later.
        mark = (id(state), state._version)
        if mark not in self._seen:
            self._seen[mark] = (name, state)
            self._inputs[name] = state.detach().clone()
        self._same[name] = self._seen[mark][0]
        self._calls[name].append(_n_tokens(state))

    def _forget(self) -> None:
        """Be ready for the next pass."""
        self._seen: dict[tuple[int, int], tuple[str, Tensor]] = {}
        self._inputs: dict[str, Tensor] = {}
        self._same: dict[str, str] = {}
        self._calls: dict[str, list[int]] = {name: [] for name in self.modules}

    def _begin(self, shared: dict[str, str], values: dict[str, Tensor]) -> None:
        self.shared = self.processes.from_first(lambda: shared)
        named = {"inputs": values} if values else {}
        frames = shared_frames(named, self.processes).get("inputs")
        pairs = [(name, name) for name in dict.fromkeys(self.shared.values())]
        self._sums = MomentSums(pairs, frames)


def require_followed(pair: ModelPair, batch: Batch) -> None:
    """Raise InputError unless each linear module is given every token of `batch`, once.

    The tuned model reads it. Of what enters the modules only the number of tokens is kept: sums of
    all blocks at a time may be larger than all else that a run holds.
    """
    calls: dict[Place, list[int]] = {}
    with ExitStack() as stack:
        for layer, block in enumerate(pair.tuned_runner.sites.blocks):
            for name in linear_modules(pair.base_runner.sites.blocks[layer]):
                counts = calls[layer, name] = []

                def count(call: Call, counts: list[int] = counts) -> None:
                    counts.append(_n_tokens(hidden_state(call)))

                stack.enter_context(before(block.get_submodule(name), count))
        pair.tuned_runner.read(batch)
    for (layer, name), counts in calls.items():
        _require_once(layer, name, counts, batch)


def pieces_tasks(
    pair: ModelPair, layer: int, sums: InputSums, max_rank: int = MAX_RANK
) -> list[Callable[[], ModulePieces]]:
    """Return what gives the pieces of each module of a block whose weights are resident."""
    return [
        partial(_module_pieces, pair, layer, name, sums, max_rank)
        for names in sums.groups()
        for name in names
    ]


def _module_pieces(
    pair: ModelPair, layer: int, name: str, sums: InputSums, max_rank: int
) -> ModulePieces:
    ours, theirs = (
        runner.sites.blocks[layer].get_submodule(name)
        for runner in (pair.base_runner, pair.tuned_runner)
    )
    dtype = torch.float64 if pair.dtype == torch.float64 else torch.float32
    second_moment = sums.second_moment(name)
    change = module_change(ours, theirs).to(torch.float64, second_moment.device).factors
    weight = affine(ours)[0].to(second_moment) + _product(change)
    scale = float(((weight @ second_moment) * weight).sum())
    found: dict[WeightFit, LowRank] = {
        "metric": truncated(change, second_moment, scale, max_rank),
        "plain": truncated(change, None, float(weight.square().sum()), max_rank),
    }
    # In the machine's own memory: those of all blocks are kept to the end.
    return (layer, name), {fit: pieces.to(dtype, "cpu") for fit, pieces in found.items()}


def changes_of(
    pair: ModelPair, pieces: Pieces, specs: Sequence[WeightSpec]
) -> dict[WeightSpec, WeightChange]:
    """Cut the pieces of all blocks to the size that each of `specs` asks for."""
    model, blocks = causal_lm(pair.base), pair.base_runner.sites.blocks
    names = {module: name for name, module in model.named_modules()}
    full_names = tuple(names[block] for block in blocks)
    transposed = any(is_transposed(module) for module in blocks[0].modules())
    changes = {}
    for spec in specs:
        found = pieces[spec.fit]
        ranks = _ranks(found, spec)
        by_module = {k: found[k].leading(rank) for k, rank in ranks.items() if rank}
        label = spec.rank or f"{sum(ranks.values()) / len(ranks):.3g}"
        changes[spec] = WeightChange(
            by_module, spec.fit, label, full_names, pair.base_name, transposed
        )
    return changes


def _ranks(pieces: Mapping[Place, LowRank], spec: WeightSpec) -> dict[Place, int]:
    """Count the pieces of every module: a change may have fewer than are asked for."""
    if spec.budget is not None:
        return within_budget(pieces, spec.budget)
    assert spec.rank is not None
    return {place: min(spec.rank, len(found.gains)) for place, found in pieces.items()}


def _product(factors: Factors) -> Tensor:
    first, *rest = factors
    for factor in rest:
        first = first @ factor
    return first


def _n_tokens(state: Tensor) -> int:
    """Count the tokens of `state` `[..., width]`."""
    return state.numel() // state.shape[-1]


def _require_once(layer: int, name: str, calls: Sequence[int], batch: Batch) -> None:
    """Raise InputError unless a module was given every token of the batch, once.

    `calls` has the tokens that it was given in each call.
    """
    if len(calls) != 1:
        raise InputError(
            f"{name!r} of block {layer} is called {len(calls)} times in a pass, not once"
        )
    if calls[0] != batch.ids.numel():
        raise InputError(
            f"{name!r} of block {layer} is given {calls[0]} tokens of {batch.ids.numel()}: the "
            "inputs of experts are not followed"
        )

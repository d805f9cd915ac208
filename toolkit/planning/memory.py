"""What a run needs in memory and on disk, as written formulas.

Symbols are those of `cost`; b is a number's size in the models' precision. Numbers of statistics
have 8 bytes, of the vectors that enter them 4 (8 where the models run in float64).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit.analysis.linear_fit import Rank
from toolkit.analysis.shared_map import TOGETHER
from toolkit.diagnosis.block_statistics import MODES, moment_pairs
from toolkit.diagnosis.mlp_statistics import PAIRS as MLP_PAIRS
from toolkit.models.locations import INSIDE
from toolkit.planning.operations import FIT_PAIRS, places, sequential_pairs
from toolkit.planning.prompt_operations import n_side_by_side
from toolkit.planning.shapes import ModelShape
from toolkit.planning.workload import BatchShape, Workload

DOUBLE = 8
CACHES = 2  # of keys and values of a candidate at a time: of its prompts, and one to go on from
FIRST_ORDER = 12  # inner states of the MLP's width that the first-order terms hold at a time
BRANCHED = 18  # vectors of width d that a token's statistics hold: states, deltas, shifted copies
DENSE = 7  # d² numbers of a token while its Jacobian is made: two, and what autograd keeps
SHARED = (3, 10)  # of a token, in a shared fit: inner states of the MLP's width, vectors of width d
# The C library asks the system for a tensor of this size or more, and gives it back as soon as it
# is freed. Smaller ones lie in its heap, side by side with others that live: what is freed there
# serves later ones that are no larger.
FROM_HEAP = 32 * 2**20
STAGES = ("march", "analyses", "replacement")


@dataclass(frozen=True)
class Part:
    """Bytes of one part of the memory; `stages` says when it is held: of `STAGES`.

    The march is its passes with their sums; analyses come after them, block by block.
    """

    name: str
    bytes: float
    stages: tuple[str, ...] = STAGES


@dataclass(frozen=True)
class Memory:
    """The parts of a run's memory; `process` has the bytes that Python and its libraries hold.

    What the process holds is there before the run, and of the files that are `mapped` the system
    may drop what is in memory: both are parts of the process's size, and not of what must be free.
    """

    parts: tuple[Part, ...]
    process: float = 0.0
    mapped: float = 0.0

    def at(self, stage: str) -> float:
        """Bytes held at `stage`, beyond the process itself."""
        return sum(part.bytes for part in self.parts if stage in part.stages)

    @property
    def peak(self) -> float:
        """The most bytes that must be free."""
        return max(self.at(stage) for stage in STAGES)

    @property
    def size(self) -> float:
        """The largest size of the process, as the system tells it."""
        return max(self.size_at(stage) for stage in STAGES)

    def size_at(self, stage: str) -> float:
        """The size of the process at `stage`; mapped are the streams, until the march is over."""
        return self.process + self.at(stage) + self.mapped * (stage != "replacement")

    @property
    def largest(self) -> Part:
        """The largest part of the stage that needs most."""
        stage = max(STAGES, key=self.at)
        return max((p for p in self.parts if stage in p.stages), key=lambda part: part.bytes)


def memory(
    shape: ModelShape,
    work: Workload,
    size: int,
    recipes: Sequence[Rank] = (),
    offload: bool = False,
    threads: int = 1,
    process: float = 0.0,
) -> Memory:
    """All parts, for models of `size` bytes a number; `recipes` are the ranks that are fitted.

    With `offload` one block of each half is in memory at a time. Streams are mapped from disk: what
    of them is in memory the system may drop. `process`: bytes that the process holds already.
    """
    march, analysing, replacing = (STAGES[i : i + 1] for i in range(3))
    both = march + analysing
    parts = (
        Part("weights", weights(shape, work, size, offload)),
        Part("widened", widened(shape, work, size), both),
        Part("activations", activations(shape, work, size), march),
        Part("carried", carried(shape, work, size), both),
        Part("sums", sums(shape, work), both),
        Part("moments", moments(shape, work), analysing),
        Part("analyses", analyses(shape, work, threads), analysing),
        Part("adapters", adapters(shape, recipes, size)),
        Part("changes", changes(shape, work, size, offload), replacing),
        Part("generation", generation(shape, work, size), replacing),
    )
    kept = Part("freed", freed(shape, work, size, {part.name: part.bytes for part in parts}))
    return Memory((*parts, kept), process, 2 * streams(shape, work, size))


def freed(shape: ModelShape, work: Workload, size: int, parts: Mapping[str, float]) -> float:
    """Count what the C library keeps of what was freed: as much as a stage makes and frees.

    What is freed in the heap leaves holes, which serve tensors that are no larger: so the heap may
    grow to twice what a stage makes. Tensors of `FROM_HEAP` bytes or more do not lie in it.
    Between stages, and between a block's passes and analyses, holes are given back.
    """
    d, f = shape.d, shape.largest_block.d_ff
    tokens = max((batch.counted for batch in work.batches), default=0)
    made = (
        (parts["activations"], max(size, 4) * tokens * max(d, f)),
        (parts["moments"] + parts["analyses"], DOUBLE * d * d),
    )
    said = sum(part.bytes for part in comparing(shape, work, size) if part.largest < FROM_HEAP)
    return max([said, *(held for held, largest in made if largest < FROM_HEAP)])


def weights(shape: ModelShape, work: Workload, size: int, offload: bool = False) -> float:
    """``b P`` for each half (of a LoRA 4 bytes an entry of its factors in place of the second), and
    the change of one block's MLP where it is not factored.
    """
    largest, held = shape.largest_block, float(shape.parameters)
    if offload:
        held += largest.parameters - sum(block.parameters for block in shape.blocks)
    if work.adapter is not None:
        return size * held + 4.0 * work.adapter
    return size * (2 * held + largest.mlp)


def widened(shape: ModelShape, work: Workload, size: int) -> float:
    """4 bytes for each entry of one MLP's matrices, and of their change where it is not factored,
    where statistics widen those of half precision.
    """
    matrices = 1 if work.adapter is not None else 2
    return 4.0 * matrices * shape.largest_block.mlp if size < 4 else 0.0


def changes(shape: ModelShape, work: Workload, size: int, offload: bool = False) -> float:
    """``b M`` in every block: matrices with a low-rank change, beside those that they stand for.

    With `offload` there are none.
    """
    if not work.weights or offload:
        return 0.0
    return float(size * sum(out * into for block in shape.blocks for out, into in block.linear))


def streams(shape: ModelShape, work: Workload, size: int) -> float:
    """``b d`` a token and stream: base and tuned over all documents, a steered one over the fit
    documents (and a second state, where its adapter sits after the MLP).
    """
    second = sum(location == "post_mlp" for location in work.steered)
    return float(size * shape.d * (_travelling(work) + second * _fit_tokens(work)))


def carried(shape: ModelShape, work: Workload, size: int) -> float:
    """Count what blocks leave for later ones beside the state, of every token of every stream.

    It stays where the models are.
    """
    return float(size * shape.carried * _travelling(work))


def _travelling(work: Workload) -> int:
    """Count the tokens of all streams, padding included."""
    everything = sum(batch.n for batch in work.batches)
    return 2 * everything + len(work.steered) * _fit_tokens(work)


def _fit_tokens(work: Workload) -> int:
    return sum(batch.n for batch in work.batches if not batch.held_out)


def activations(shape: ModelShape, work: Workload, size: int) -> float:
    """Count what every pass captures of the largest batch, and what the sums hold of it."""
    batch = max(work.batches, key=lambda b: b.n)
    wide = max(size, 4)
    n_branches, readable = len(shape.branches), shape.largest_block.d_ff > 0
    captured = 3 * n_branches + 3 * readable  # with mlp_in, resid_mid and heads
    captured += sum(1 if location in INSIDE else 2 for location in work.steered)
    block = 4 * shape.d + 3 * (shape.largest_block.d_ff or 4 * shape.d)
    states = size * batch.n * (captured * shape.d + block)
    return float(
        states
        + wide * batch.counted * (BRANCHED * shape.d + FIRST_ORDER * shape.largest_block.d_ff)
    )


def n_products(shape: ModelShape, work: Workload) -> int:
    """Matrices of d² in one block's sums: of each mode and side, steered stream and MLP side."""
    modes = sum(len(moment_pairs(mode, shape.branches)) for mode in MODES)
    readable = shape.largest_block.d_ff > 0
    return 2 * modes + len(sequential_pairs(work)) + 2 * len(MLP_PAIRS) * readable


def sums(shape: ModelShape, work: Workload) -> float:
    """``8 d²`` for every product of one block; ``8 d k`` where projections see them."""
    mlp = 2 * len(MLP_PAIRS) * (shape.largest_block.d_ff > 0)
    seen = n_products(shape, work) - mlp
    seen += work.folds * len(shape.branches) * len(FIT_PAIRS)
    found = float(DOUBLE * shape.d * (mlp * shape.d + seen * (work.sketch or shape.d)))
    if work.weights:  # what enters the linear modules of a block
        widths = (shape.d, shape.n_heads * shape.head_dim, shape.d, shape.largest_block.d_ff)
        found += DOUBLE * sum(width**2 for width in widths)
    return found


def moments(shape: ModelShape, work: Workload) -> float:
    """``8 d²`` for each of the three products that one fit reads, of both sides."""
    return float(DOUBLE * shape.d**2 * 6)


def analyses(shape: ModelShape, work: Workload, threads: int = 1) -> float:
    """The largest of what fits, reachability (a token a thread), shared maps and the pieces of the
    weights work with, and the sampled tokens: as they were sampled, and joined.
    """
    d, f = shape.d, shape.largest_block.d_ff
    n = min(work.shared_sample, max(work.counted(False), 1)) if f else 0
    n_places, judging = places(work) if f else (0, 0)
    largest = max(
        DOUBLE * 8 * d**2,  # a fit
        reachability(shape, work, threads) if f else 0.0,
        shared_maps(shape, max(n, n_places + judging)) if f else 0.0,
        pieces(shape) if work.weights else 0.0,
    )
    sampled = 4 * 5 * d * (work.sample + 1.5 * n) + 4 * 4 * d * (n_places + judging)
    return float(largest + 2 * sampled)


def reachability(shape: ModelShape, work: Workload, threads: int) -> float:
    """The MLP in float64, beside all tokens' Jacobians or what each worker holds of one of them."""
    d, f = shape.d, shape.largest_block.d_ff
    exact = DOUBLE * (3 if shape.largest_block.gated else 2) * d * f
    if not work.sample:
        return 0.0
    made = 4.0 * DENSE * d * d * work.sample
    worked = 4.0 * 2 * d * d * work.sample + threads * (4 * d * f + DOUBLE * 4 * d * d)
    return exact + max(made, worked)


def shared_maps(shape: ModelShape, n: int) -> float:
    """Of n tokens their Jacobians and vectors, inner states of `TOGETHER`, and three matrices in
    float64; or the identity through the matrices into the MLP.
    """
    d, f = shape.d, shape.largest_block.d_ff
    inner, vectors = SHARED
    fitted = 4 * n * (inner * f + vectors * d) + 4 * min(n, TOGETHER) * 3 * f + 3 * DOUBLE * d * d
    return float(max(fitted, 4 * 6 * d * f)) if n else 0.0


def pieces(shape: ModelShape) -> float:
    """The second moment of what enters a module, twice, or once with four of its matrices."""
    linear = {sides for block in shape.blocks for sides in block.linear}
    found = (max(2 * into**2, into**2 + 4 * out * into) for out, into in linear)
    return float(DOUBLE * max(found, default=0))


def adapters(shape: ModelShape, recipes: Sequence[Rank], size: int) -> float:
    """``b (2 d r + d)`` for every fitted adapter of rank r, ``b (d² + d)`` at full rank."""
    d = shape.d
    numbers = sum(d * d + d if rank == "full" else 2 * d * rank + d for rank in recipes)
    return float(size * shape.n_layers * numbers)


def generation(shape: ModelShape, work: Workload, size: int) -> float:
    """Count what the largest round takes of prompts, or of questions.

    Keys and values of questions are held once.
    """
    cache = size * shape.n_layers * 2 * shape.kv_width
    answering = max(
        q.rows * (cache * (q.length + work.answer_tokens) + size * shape.vocabulary)
        for q in (*work.questions, BatchShape(0, 0))
    )
    return max(sum(part.bytes for part in comparing(shape, work, size)), float(answering))


@dataclass(frozen=True)
class _Tensors:
    """Hold the bytes of some tensors together, and of the largest of them."""

    bytes: float
    largest: float


def comparing(shape: ModelShape, work: Workload, size: int) -> tuple[_Tensors, ...]:
    """Count keys and values, states, and logits of the largest round of prompts, apart.

    States are those of every block of base and tuned model; logits the tuned model's three times in
    float64, and a candidate's twice.

    Candidates that generate side by side each have a copy of the prompts.
    """
    if not work.prompts:
        return ()

    def tokens(p: BatchShape) -> int:
        return p.rows * (p.length + work.new_tokens)

    rounds = (*work.prompts, *work.fold_prompts)
    prompts = max(rounds, key=lambda p: tokens(p) * n_side_by_side(work, p))
    copies = n_side_by_side(work, prompts)
    cache, state = (size * width * tokens(prompts) for width in (shape.kv_width, shape.d))
    logits = prompts.rows * work.new_tokens * shape.vocabulary
    return (
        _Tensors(2 * shape.n_layers * (1 + CACHES * copies) * cache, copies * cache),
        _Tensors(2 * shape.n_layers * state, state),
        _Tensors(logits * (3.0 * DOUBLE + 2 * size * copies), size * copies * logits),
    )


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes: streams, so that it can go on; results."""

    streams: float
    adapters: float
    statistics: float = 0.0

    @property
    def total(self) -> float:
        return self.streams + self.adapters + self.statistics


def disk(
    shape: ModelShape,
    work: Workload,
    size: int,
    recipes: Sequence[Rank] = (),
    keep_statistics: bool = False,
) -> Disk:
    """Streams twice, since the new file is whole before the old one goes; adapters of all blocks;
    and every block's sums where they are kept.
    """
    modes = sum(len(moment_pairs(mode, shape.branches)) for mode in MODES)
    kept = shape.n_layers * DOUBLE * 2 * modes * shape.d**2 if keep_statistics else 0
    return Disk(2 * streams(shape, work, size), adapters(shape, recipes, size), float(kept))

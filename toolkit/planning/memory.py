"""What a run needs in memory and on disk, as written formulas.

Symbols are those of `cost`; b is a number's size in the models' precision. Numbers of statistics
have 8 bytes, of the vectors that enter them 4 (8 where the models run in float64).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.analysis.linear_fit import Rank
from toolkit.diagnosis.block_statistics import MODES, moment_pairs
from toolkit.diagnosis.mlp_statistics import PAIRS as MLP_PAIRS
from toolkit.models.locations import INSIDE
from toolkit.planning.operations import FIT_PAIRS, places, sequential_pairs
from toolkit.planning.shapes import ModelShape
from toolkit.planning.workload import BatchShape, Workload

DOUBLE = 8
CACHES = 3  # of keys and values at a time: of the prompts, and copies that are gone on from
FIRST_ORDER = 12  # inner states of the MLP's width that the first-order terms hold at a time
BRANCHED = 18  # vectors of width d that a token's statistics hold: states, deltas, shifted copies
JACOBIANS = 8  # inner states of the MLP's width that a shared fit holds of each token


@dataclass(frozen=True)
class Part:
    """Bytes of one part of the memory; `stages` says when it is held: march, replacement."""

    name: str
    bytes: float
    stages: tuple[str, ...] = ("march", "replacement")


@dataclass(frozen=True)
class Memory:
    """The parts of a run's memory; `process` has the bytes that Python and its libraries hold.

    What the process holds is there before the run: it is a part of the process's size, and not of
    what must be free.
    """

    parts: tuple[Part, ...]
    process: float = 0.0

    def at(self, stage: str) -> float:
        """Bytes held at `stage`, beyond the process itself."""
        return sum(part.bytes for part in self.parts if stage in part.stages)

    @property
    def peak(self) -> float:
        """The most bytes that must be free."""
        return max(self.at(stage) for stage in ("march", "replacement"))

    @property
    def size(self) -> float:
        """The largest size of the process, as the system tells it."""
        return self.process + self.peak

    @property
    def largest(self) -> Part:
        """The largest part of the stage that needs most."""
        stage = max(("march", "replacement"), key=self.at)
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
    march = ("march",)
    return Memory(
        (
            Part("weights", weights(shape, work, size, offload)),
            Part("activations", activations(shape, work, size), march),
            Part("carried", carried(shape, work, size), march),
            Part("sums", sums(shape, work), march),
            Part("moments", moments(shape, work), march),
            Part("analyses", analyses(shape, work, threads), march),
            Part("adapters", adapters(shape, recipes, size)),
            Part("generation", generation(shape, work, size), ("replacement",)),
        ),
        process,
    )


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
    """The largest of what fits, reachability (a token a thread) and shared maps work with, and the
    sampled tokens.
    """
    d, f = shape.d, shape.largest_block.d_ff
    n = min(work.shared_sample, max(work.counted(False), 1)) if f else 0
    n_places, judging = places(work) if f else (0, 0)
    inner = 3 if shape.largest_block.gated else 2
    fitting = DOUBLE * 8 * d**2
    each = threads * (4 * d * f + DOUBLE * 4 * d**2)  # what each worker holds
    exact = 2 * DOUBLE * inner * d * f  # the MLP in float64
    reach = work.sample * 4 * 4 * d**2 + each + exact if f else 0
    largest = max(n, n_places)
    shared = 4 * largest * JACOBIANS * f + 3 * DOUBLE * 4 * d**2 + 4 * 6 * d * f if f else 0
    sampled = 4 * 5 * d * (work.sample + 1.5 * n) + 4 * 4 * d * (n_places + judging)
    return float(max(fitting, reach, shared) + sampled)


def adapters(shape: ModelShape, recipes: Sequence[Rank], size: int) -> float:
    """``b (2 d r + d)`` for every fitted adapter of rank r, ``b (d² + d)`` at full rank."""
    d = shape.d
    numbers = sum(d * d + d if rank == "full" else 2 * d * rank + d for rank in recipes)
    return float(size * shape.n_layers * numbers)


def generation(shape: ModelShape, work: Workload, size: int) -> float:
    """Of the largest round of prompts: keys and values, every block's states of base and tuned
    model, and logits: the tuned model's three times in float64, a candidate's twice. Or of the
    largest round of questions, whose keys and values are held once.
    """
    cache = size * shape.n_layers * 2 * shape.kv_width
    answering = max(
        q.rows * (cache * (q.length + work.answer_tokens) + size * shape.vocabulary)
        for q in (*work.questions, BatchShape(0, 0))
    )
    if not work.prompts:
        return float(answering)
    prompts = max(
        (*work.prompts, *work.fold_prompts), key=lambda p: p.rows * (p.length + work.new_tokens)
    )
    tokens = prompts.rows * (prompts.length + work.new_tokens)
    caches = CACHES * cache * tokens
    states = 2 * shape.n_layers * shape.d * tokens
    logits = prompts.rows * work.new_tokens * shape.vocabulary
    return max(caches + size * states + logits * (3.0 * DOUBLE + 2 * size), float(answering))


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

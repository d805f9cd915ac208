"""What a run needs in memory and on disk, as written formulas; and what this machine has.

Symbols are those of `toolkit.cost`; b is a number's size in the models' precision. Numbers of
statistics have 8 bytes, of the vectors that enter them 4 (8 where the models run in float64).
"""

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from toolkit.analysis.linear_fit import Rank
from toolkit.cost import MLP_PAIRS, SHARED_FITS, Job, sequential_pairs
from toolkit.errors import InputError
from toolkit.lockstep import INSIDE
from toolkit.shape import ModelShape
from toolkit.survey import MODES, moment_pairs

OFFLOAD = "--offload"  # the option that reads blocks from disk as they are reached
CGROUPS = Path("/sys/fs/cgroup")
DOUBLE = 8
CACHES = 3  # of keys and values at a time: of the prompts, and copies that are gone on from
FIRST_ORDER = 12  # inner states of the MLP's width that the first-order terms hold at a time
BRANCHED = 18  # vectors of width d that a token's statistics hold: states, deltas, shifted copies
JACOBIANS = 8  # inner states of the MLP's width that a shared fit holds of each token

# The option that makes a part smaller, in the words of the message.
HELP = {
    "weights": f"--dtype bfloat16, or {OFFLOAD}",
    "streams": f"fewer documents, a smaller --max-length, {OFFLOAD}, or more processes",
    "activations": "a smaller --batch-tokens",
    "accumulators": "a machine with more memory (they grow with the square of the model's width)",
    "analyses": "a smaller --sample or --shared-sample",
    "adapters": "--dtype bfloat16",
    "generation": "a smaller --max-prompts or --new-tokens",
}


@dataclass(frozen=True)
class Part:
    """Bytes of one part of the memory; `stages` says when it is held: march, replacement."""

    name: str
    bytes: float
    stages: tuple[str, ...] = ("march", "replacement")


@dataclass(frozen=True)
class Memory:
    """The parts of a run's memory, beyond what Python and its libraries hold."""

    parts: tuple[Part, ...]

    def at(self, stage: str) -> float:
        """Bytes held at `stage`."""
        return sum(part.bytes for part in self.parts if stage in part.stages)

    @property
    def peak(self) -> float:
        return max(self.at(stage) for stage in ("march", "replacement"))

    @property
    def largest(self) -> Part:
        """The largest part of the stage that needs most."""
        stage = max(("march", "replacement"), key=self.at)
        return max((p for p in self.parts if stage in p.stages), key=lambda part: part.bytes)


def memory(
    shape: ModelShape, job: Job, size: int, recipes: Sequence[Rank] = (), offload: bool = False
) -> Memory:
    """All parts, for models of `size` bytes a number; `recipes` are the ranks that are fitted.

    With `offload` one block of each half is in memory at a time, and streams are on disk.
    """
    march = ("march",)
    return Memory(
        (
            Part("weights", weights(shape, job, size, offload)),
            Part("streams", 0.0 if offload else streams(shape, job, size), march),
            Part("activations", activations(shape, job, size), march),
            Part("accumulators", accumulators(shape, job), march),
            Part("analyses", analyses(shape, job), march),
            Part("adapters", adapters(shape, recipes, size)),
            Part("generation", generation(shape, job, size), ("replacement",)),
        )
    )


def weights(shape: ModelShape, job: Job, size: int, offload: bool = False) -> float:
    """``b P`` for each half (of a LoRA 4 bytes an entry of its factors in place of the second), and
    the change of every MLP where it is not factored.
    """
    blocks = sum(block.parameters for block in shape.blocks)
    inner = sum(block.mlp for block in shape.blocks)
    held = float(shape.parameters)
    if offload:
        blocks, inner = shape.largest_block.parameters, shape.largest_block.mlp
        held += blocks - sum(block.parameters for block in shape.blocks)
    if job.adapter is not None:
        return size * held + 4.0 * job.adapter
    return size * (2 * held + inner)


def streams(shape: ModelShape, job: Job, size: int) -> float:
    """``b d`` a token and stream: base and tuned over all documents, a steered one over the fit
    documents (and a second state, where its adapter sits behind the MLP).
    """
    everything = sum(batch.n for batch in job.batches)
    fit = sum(batch.n for batch in job.batches if not batch.held_out)
    steered = sum(2 if location == "post_mlp" else 1 for location in job.steered)
    return float(size * shape.d * (2 * everything + steered * fit))


def activations(shape: ModelShape, job: Job, size: int) -> float:
    """Of the largest batch: what every pass captures, and what the sums hold of its tokens."""
    batch = max(job.batches, key=lambda b: b.n)
    wide = max(size, 4)
    n_branches, readable = len(shape.branches), shape.largest_block.d_ff > 0
    captured = 3 * n_branches + 3 * readable  # with mlp_in, resid_mid and heads
    captured += sum(1 if location in INSIDE else 2 for location in job.steered)
    block = 4 * shape.d + 3 * (shape.largest_block.d_ff or 4 * shape.d)
    states = size * batch.n * (captured * shape.d + block)
    return float(
        states
        + wide * batch.counted * (BRANCHED * shape.d + FIRST_ORDER * shape.largest_block.d_ff)
    )


def n_products(shape: ModelShape, job: Job) -> int:
    """Matrices of d² in one block's sums: of each mode and side, steered stream and MLP side."""
    modes = sum(len(moment_pairs(mode, shape.branches)) for mode in MODES)
    readable = shape.largest_block.d_ff > 0
    return 2 * modes + len(sequential_pairs(job)) + 2 * len(MLP_PAIRS) * readable


def accumulators(shape: ModelShape, job: Job) -> float:
    """``8 d²`` for every product of one block, and the same again for the moments made of them:
    those of both sides, and of each vector with itself on both together.
    """
    modes = sum(len(moment_pairs(mode, shape.branches)) for mode in MODES)
    itself = 2 * len(MODES) * len(shape.branches)
    made = 2 * modes + itself
    return float(DOUBLE * shape.d**2 * (n_products(shape, job) + made))


def analyses(shape: ModelShape, job: Job) -> float:
    """The largest of what fits, reachability and shared maps work with, and the sampled tokens."""
    d, f = shape.d, shape.largest_block.d_ff
    n = min(job.shared_sample, max(job.counted(False), 1)) if f else 0
    inner = 3 if shape.largest_block.gated else 2
    fitting = DOUBLE * 8 * d**2
    each = torch.get_num_threads() * (4 * d * f + DOUBLE * 4 * d**2)  # what each worker holds
    exact = 2 * DOUBLE * inner * d * f  # the MLP in float64
    reach = job.sample * 4 * 4 * d**2 + each + exact if f else 0
    shared = 4 * n * JACOBIANS * f + SHARED_FITS * DOUBLE * 4 * d**2 + 4 * 6 * d * f if f else 0
    sampled = 4 * 5 * d * (job.sample + 1.5 * n)
    return float(max(fitting, reach, shared) + sampled)


def adapters(shape: ModelShape, recipes: Sequence[Rank], size: int) -> float:
    """``b (2 d r + d)`` for every fitted adapter of rank r, ``b (d² + d)`` at full rank."""
    d = shape.d
    numbers = sum(d * d + d if rank == "full" else 2 * d * rank + d for rank in recipes)
    return float(size * shape.n_layers * numbers)


def generation(shape: ModelShape, job: Job, size: int) -> float:
    """Of the largest round of prompts: keys and values, every block's states of base and tuned
    model, and logits: the tuned model's three times in float64, a candidate's twice.
    """
    if not job.prompts:
        return 0.0
    prompts = max(job.prompts, key=lambda p: p.rows * (p.length + job.new_tokens))
    tokens = prompts.rows * (prompts.length + job.new_tokens)
    caches = CACHES * shape.n_layers * 2 * shape.kv_width * tokens
    states = 2 * shape.n_layers * shape.d * tokens
    logits = prompts.rows * job.new_tokens * shape.vocabulary
    return float(size * (caches + states) + logits * (3 * DOUBLE + 2 * size))


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes: streams kept between blocks, so that it can go on; results."""

    streams: float
    adapters: float
    statistics: float = 0.0

    @property
    def total(self) -> float:
        return self.streams + self.adapters + self.statistics


def disk(
    shape: ModelShape,
    job: Job,
    size: int,
    recipes: Sequence[Rank] = (),
    keep_statistics: bool = False,
) -> Disk:
    """Streams twice, since the new file is whole before the old one goes; adapters of all blocks;
    and every block's sums where they are kept.
    """
    modes = sum(len(moment_pairs(mode, shape.branches)) for mode in MODES)
    kept = shape.n_layers * DOUBLE * 2 * modes * shape.d**2 if keep_statistics else 0
    return Disk(2 * streams(shape, job, size), adapters(shape, recipes, size), float(kept))


def available_memory(device: str = "cpu") -> float:
    """Bytes that this process may still take: of the machine, of its container, of its own limit;
    on a GPU, what is free there.
    """
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(torch.device(device))[0])
    left = [float(psutil.virtual_memory().available), *_cgroup()]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        left.append(float(limit - psutil.Process().memory_info().vms))
    return max(min(left), 0.0)


def _cgroup(root: Path = CGROUPS) -> list[float]:
    """What a container's limit leaves, where there is one (version 2, then 1)."""
    found = []
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = ((root / name).read_text().strip() for name in (limit, used))
            found.append(float(most) - float(now))
        except (OSError, ValueError):  # no such version, or "max": no limit
            continue
    return found


def require_memory(needed: Memory, available: float) -> None:
    """Raise InputError where `needed` is more than is `available`, with the option that helps."""
    if needed.peak <= available:
        return
    part = needed.largest
    raise InputError(
        f"this run needs about {gib(needed.peak)} of memory and {gib(available)} are free; the "
        f"largest part, {gib(part.bytes)}, are {part.name}: try {HELP[part.name]} "
        "(--dry-run shows all parts, --no-memory-check runs all the same)"
    )


def gib(n: float) -> str:
    """Bytes in words."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 / 10 else f"{n / 2**20:.1f} MiB"

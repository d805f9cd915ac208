"""What a run costs in floating-point operations, as written formulas.

A multiplication and an addition are two operations. Symbols, here and in ``docs/scaling.md``: d
width of the residual stream, f of the MLP's inner states, M entries of a block's matrices, H heads
of width e, L blocks, V vocabulary; n tokens, T tokens of one document. Left out everywhere is what
grows with d and not with d·d: norms, activations, skips, rotations by position.
"""

from collections.abc import Sequence
from dataclasses import replace

from toolkit.analysis.linear_fit import Rank
from toolkit.analysis.reachability import BUDGETS
from toolkit.analysis.shared_map import SHARED_RANKS, probes_each
from toolkit.diagnosis.block_statistics import MODES, PLACE_TOKENS, moment_pairs
from toolkit.diagnosis.first_look import LEAST, SHARE
from toolkit.diagnosis.mlp_statistics import PAIRS as MLP_PAIRS
from toolkit.diagnosis.place_rows import PLACE_RANKS
from toolkit.diagnosis.reach_rows import SCALES, TARGETS
from toolkit.evaluation.allocation import PROBE_TOKENS
from toolkit.evaluation.rank_search import AT_ONCE
from toolkit.evaluation.reference import first_looked_at
from toolkit.models.locations import INSIDE
from toolkit.planning.prompt_operations import (
    close_look,
    elsewhere,
    judged_by_folds,
    questions,
    replacement,
)
from toolkit.planning.shapes import BlockShape, ModelShape
from toolkit.planning.stages import Stage, block_pass, head
from toolkit.planning.workload import BatchShape, Workload
from toolkit.statistics.moments import Pair

# Operations of dense linear algebra, in units of d³ (Golub and Van Loan, Matrix Computations, 4th
# edition). What a unit takes on a machine is measured: an eigenvalue problem runs far below the
# rate of a product.
CHOLESKY = 1 / 3
SOLVE = 1.0  # a triangular system with d right-hand sides
PRODUCT = 2.0
TRIDIAGONAL = 4 / 3  # of a symmetric matrix: eigenvalues, and few eigenvectors, cost little more
GRAM = 5 / 4  # M Mᵀ in four stripes of rows: 10 of 16 squares
SVD = 22.0  # with both sides' vectors
EIGEN = 9.0  # of a symmetric matrix, with all vectors
# A fit: Cholesky factor, two triangular systems, a product, leading eigenvectors; and judging it on
# one side's moments is one product more.
FIT = CHOLESKY + 2 * SOLVE + PRODUCT + TRIDIAGONAL
JUDGED = 2 * PRODUCT
FIT_PAIRS = [("x", "x"), ("t", "x")]  # the products that one fit reads

# What a token is looked at with: `toolkit.diagnosis.reach_rows`, `toolkit.analysis.shared_map`.
SHARED_FITS = len(TARGETS)  # from the MLP's input to each target
CGLS_PRODUCTS = 9.0  # of a run of conjugate gradients: five evaluations of 1 + 0.8 products
PLACE_PRODUCTS = 2.25  # of a run of one iteration: those of the shared map before the MLP
ROUNDS = 2  # of the search for ranks, where its guess is near: each more costs as much as one


def march_passes(work: Workload) -> dict[str, float]:
    """Block passes of one document: base, tuned, and base on the tuned stream; on fit documents one
    more for every steered stream, and the attention branch's once more where an adapter sits inside
    the block (its share of the block is left to `march`).
    """
    return {"all": 3.0, "fit": float(len(work.steered))}


def march(shape: ModelShape, work: Workload) -> list[Stage]:
    """Return the march's passes through all blocks."""
    passes = march_passes(work)
    lockstep = steered = 0.0
    inside = sum(location in INSIDE for location in work.steered)
    for batch in work.batches:
        for block in shape.blocks:
            once = block_pass(shape, block, batch)
            lockstep += passes["all"] * once
            if not batch.held_out:
                again = once - 2.0 * block.mlp * batch.n  # up to the attention branch
                steered += passes["fit"] * once + inside * again
        lockstep += 2.0 * (work.adapter or 0) * batch.n
    return [
        Stage("passes of the march", "block", lockstep),
        Stage("passes of steered streams", "block", steered),
    ]


def product_operations(pairs: Sequence[Pair], d: int) -> float:
    """Ideal operations a token of the products `pairs` of vectors of width d.

    ``2 d²`` for two vectors; ``d (d + 1)`` for one with itself, whose product is symmetric.
    """
    return float(sum(d * (d + 1) if a == b else 2 * d * d for a, b in pairs))


def sketched_operations(pairs: Sequence[Pair], d: int, width: int) -> float:
    """The same through projections: ``2 d k`` for each vector that is projected, and each pair."""
    return 2.0 * d * width * (len({b for _, b in pairs}) + len(pairs))


def sequential_pairs(work: Workload) -> list[Pair]:
    """Return the products of every steered stream: of its state, and of what is missing with it."""
    return [pair for _ in work.steered for pair in (("x", "x"), ("t", "x"))]


def accumulators(shape: ModelShape, work: Workload) -> list[Stage]:
    """Second moments and cross moments of all blocks; the only place that counts them."""
    fit, held_out = work.counted(False), work.counted(True)
    readable = sum(block.d_ff > 0 for block in shape.blocks)
    everything = sum(_moments(moment_pairs(mode, shape.branches), shape, work) for mode in MODES)
    everything *= shape.n_layers * (fit + held_out)
    stream = _moments(FIT_PAIRS, shape, work)
    sequential = shape.n_layers * fit * len(work.steered) * stream
    mlp = readable * (fit + held_out) * product_operations(MLP_PAIRS, shape.d)
    first = sum(first_order(block, shape, work) for block in shape.blocks) * (fit + held_out)
    return [
        Stage("moments", "moments", everything + sequential + mlp),
        Stage("first order of the MLPs", "mlp", first),
    ]


def _moments(pairs: Sequence[Pair], shape: ModelShape, work: Workload) -> float:
    if work.sketch:
        return sketched_operations(pairs, shape.d, work.sketch)
    return product_operations(pairs, shape.d)


def first_order(block: BlockShape, shape: ModelShape, work: Workload) -> float:
    """Of one token: ``2 d f`` for each product with a base matrix (6, without a gate 4) and each
    with a change (4 and 3; a LoRA's are twice its entries).
    """
    base, changes = (6, 4) if block.gated else (4, 3)
    if block.d_ff == 0:
        return 0.0
    dense = 2.0 * shape.d * block.d_ff
    if work.adapter is None:
        return (base + changes) * dense
    return base * dense + 2.0 * work.adapter / shape.n_layers


def n_fits(shape: ModelShape, work: Workload) -> tuple[int, int, int]:
    """Count one block's spectra, fits that are judged on both sides, and sequential fits."""
    n = len(shape.branches)
    inside = sum(location != "post_block" for location in shape.branches)
    readable = 2 * (shape.largest_block.d_ff > 0)
    return len(MODES) * n, 2 * n + inside + readable, len(work.steered)


def fits(shape: ModelShape, work: Workload) -> list[Stage]:
    """Spectra and fits: `TRIDIAGONAL` d³ and `FIT` d³ each, `JUDGED` d³ where both sides judge."""
    spectra, judged, sequential = n_fits(shape, work)
    cubes = spectra * TRIDIAGONAL + judged * (FIT + JUDGED) + sequential * FIT
    blocks = float(shape.n_layers * shape.d**3)
    decomposed = (spectra + judged + sequential) * TRIDIAGONAL * blocks
    return [Stage("spectra and fits", "fit", cubes * blocks, decomposed)]


def reachability(shape: ModelShape, work: Workload) -> list[Stage]:
    """Sampled tokens one by one: ``2 d² f`` to form the MLP's Jacobian, `GRAM` and `TRIDIAGONAL` d³
    for each of the maps that is looked through (the MLP; the branch and the block, where the tail
    can be read), ``2 d² He`` for the heads' slices, and ``6 d f`` for every steering that is put
    through the real MLP.
    """
    d, total, decomposed = shape.d, 0.0, 0.0
    for block in shape.blocks:
        if block.d_ff == 0:
            continue
        maps, tried = (
            (3, 2 * len(TARGETS) + 1 + shape.n_heads) if shape.sublayer else (1, len(TARGETS))
        )
        jacobians = 2 if shape.sublayer else 1
        heads = 2.0 * d * d * shape.n_heads * shape.head_dim if shape.sublayer else 0.0
        inner = 3 if block.gated else 2
        total += jacobians * 2.0 * d * d * block.d_ff + maps * (GRAM + TRIDIAGONAL) * d**3 + heads
        total += tried * len(BUDGETS) * 2.0 * inner * d * block.d_ff
        decomposed += maps * TRIDIAGONAL * d**3
    return [Stage("reachability", "reach", work.sample * total, work.sample * decomposed)]


def map_products(block: BlockShape, d: int, n: int, k: int) -> float:
    """Return the operations of a Jacobian product of one map of k features at n tokens.

    ``6 d f + 2 d²`` a token (4 without a gate). Where ``k (d + n) < n d`` only the down projection
    is a product a token: ``2 d f + 4 f k`` and ``4 d f k`` once.
    """
    inner = 2 if block.gated else 1  # matrices into the MLP
    if k * (d + n) < n * d:
        return 2.0 * block.d_ff * (n * (d + inner * k) + inner * d * k)
    return n * (2.0 * (inner + 1) * d * block.d_ff + 2.0 * d * d)


def run_products(block: BlockShape, d: int, n: int, ranks: Sequence[Rank]) -> float:
    """Return the operations of one product in each run that fits maps of `ranks`.

    The map of all directions is fitted before those of less rank are cut from it.
    """
    features = [d, *(d if rank == "full" else min(rank, d) for rank in ranks)]
    return sum(map_products(block, d, n, k) for k in features)


def shared_maps(shape: ModelShape, work: Workload) -> list[Stage]:
    """One map for all tokens: a run of conjugate gradients for each of five ranks and one more, of
    `CGLS_PRODUCTS` each (`map_products`), and what judges the ranks. Then each
    fit's coordinates (``10 d²`` a token and `SVD` d³), and W̄ᵀW̄ of gate and up. Before the MLP
    `PLACE_PRODUCTS` a run on the tokens on which places are compared, what judges three ranks, and
    the images of the norm's output (where the norm centres too, all products are of the wide kind).
    """
    n = min(work.shared_sample, work.counted(False))
    judges = min(work.shared_sample // 2, work.counted(True))
    n_places, judging = places(work)
    d, total, decomposed = shape.d, 0.0, 0.0
    for block in shape.blocks:
        if block.d_ff == 0 or n == 0:
            continue
        inner = 3 if block.gated else 2
        product = map_products(block, d, 1, d)
        probes = probes_each(n)
        products = n * (probes + len(SHARED_RANKS)) + 3 * len(SHARED_RANKS) * judges
        runs = CGLS_PRODUCTS * run_products(block, d, n, SHARED_RANKS)
        coordinates = (SVD + 2 * CHOLESKY + PRODUCT + 4 * (PRODUCT + SOLVE)) * d**3
        fitted = runs + products * product + 2.0 * (1 + probes) * n * d * d + coordinates
        total += SHARED_FITS * fitted
        if shape.sublayer:
            products = n_places * (len(PLACE_RANKS) + probes_each(n_places))
            products += 3 * len(PLACE_RANKS) * judging
            total += PLACE_PRODUCTS * run_products(block, d, n_places, PLACE_RANKS)
            total += 2.0 * (inner - 1) * n_places * d * block.d_ff
            total += products * product + 12.0 * n_places * d * d + coordinates
        total += 2 * (4.0 * n_places * d * d + (FIT + SVD) * d**3)  # after the MLP
        total += (inner - 1) * 3 * PRODUCT * d * d * block.d_ff  # W̄ᵀW̄, and the identity through it
        total += len(SCALES) * (n + judges) * first_order(block, shape, work)
        decomposed += ((SHARED_FITS + shape.sublayer + 2) * SVD + 2 * TRIDIAGONAL) * d**3
    return [Stage("shared maps", "shared", total, decomposed)]


def low_rank_changes(shape: ModelShape, work: Workload) -> list[Stage]:
    """Second moments of what enters the linear modules, and the pieces of their changes.

    A module with sides o, i: ``2 o i²`` for W C; of a change that is not factored that again, and
    ``2 o² i``, in both metrics; and two decompositions of its smaller side.
    """
    if not work.weights:
        return []
    inputs = pieces = decomposed = 0.0
    for block in shape.blocks:
        widths = (shape.d, shape.n_heads * shape.head_dim, shape.d, block.d_ff or 4 * shape.d)
        inputs += work.counted(False) * sum(width * (width + 1.0) for width in widths)
        for out, into in block.linear:
            pieces += 2.0 * out * into**2 + 2 * TRIDIAGONAL * min(out, into) ** 3
            decomposed += 2 * TRIDIAGONAL * min(out, into) ** 3
            if work.adapter is None:
                pieces += 2.0 * out * into**2 + 4.0 * out**2 * into
    return [
        Stage("inputs of the weights", "moments", inputs),
        Stage("pieces of the weights", "fit", pieces, decomposed),
    ]


def places(work: Workload) -> tuple[int, int]:
    """Count the fit and held-out tokens on which places are compared."""
    size = PLACE_TOKENS if work.shared_sample else 0
    return min(size, work.counted(False)), min(size // 2, work.counted(True))


def weight_side(shape: ModelShape, work: Workload) -> list[Stage]:
    """Of each matrix with sides a ≤ b: ``2 a² b`` for W Wᵀ and `CHOLESKY` a³; of a change that is
    not factored ``2 a² b`` and `TRIDIAGONAL` a³ more, and a triangular system of b columns.
    """
    total = decomposed = 0.0
    for block in shape.blocks:
        for sides in block.linear:
            a, b = min(sides), max(sides)
            total += 2.0 * a * a * b + CHOLESKY * a**3
            if work.adapter is None:
                total += 2.0 * a * a * b + TRIDIAGONAL * a**3 + 2.0 * a * a * b
                decomposed += TRIDIAGONAL * a**3
    return [Stage("changes of the weights", "fit", total, decomposed)]


def first_look(shape: ModelShape, work: Workload) -> list[Stage]:
    """One forced fit on one in `SHARE` of the fit documents, judged on a round of prompts.

    Two passes of every document (tuned, and base on the tuned stream), one fit's moments, ``FIT``
    d³ a block; the tuned model says its tokens, which the run's comparison has it do again.
    """
    fit = [batch for batch in work.batches if not batch.held_out]
    counted = work.counted(False) / SHARE
    if not work.first_look or sum(b.rows for b in fit) < SHARE * LEAST or counted < shape.d:
        return []
    passes = 2 / SHARE * sum(block_pass(shape, block, b) for b in fit for block in shape.blocks)
    moments = shape.n_layers * counted * product_operations(FIT_PAIRS, shape.d)
    some = first_looked_at([prompts.rows for prompts in work.prompts])
    judged = replace(work, prompts=work.prompts[some], everywhere=2, talking=1, single=False)
    return [
        Stage("first look: passes", "block", passes),
        Stage("first look: moments", "moments", moments),
        Stage("first look: fits", "fit", shape.n_layers * FIT * shape.d**3),
        *replacement(shape, judged, "first look"),
    ]


def rank_search(shape: ModelShape, work: Workload) -> list[Stage]:
    """Every block's error at all ranks, and `ROUNDS` of `AT_ONCE` sets of ranks.

    An error: all eigenvectors of the forced fit and its judgement, and a pass of `PROBE_TOKENS`
    from its block on. A round: the tuned model's pass of every fit document and one for each set,
    each with the moments of its stream and a fit in every block; and reading the prompts.
    """
    if not work.search:
        return []
    fit = [batch for batch in work.batches if not batch.held_out]
    once = sum(block_pass(shape, block, b) for b in fit for block in shape.blocks)
    probe = BatchShape(1, min(PROBE_TOKENS, sum(batch.n for batch in fit)))
    probed = (shape.n_layers + 3) / 2 * sum(block_pass(shape, b, probe) for b in shape.blocks)
    probed += (shape.n_layers + 1) * head(shape, probe.n)
    moments = shape.n_layers * work.counted(False) * product_operations(FIT_PAIRS, shape.d)
    cubes = shape.n_layers * shape.d**3
    fits = cubes * (EIGEN - TRIDIAGONAL + JUDGED + ROUNDS * AT_ONCE * FIT)
    read = replacement(
        shape, replace(work, everywhere=AT_ONCE, talking=0, single=False), "rank set", known=True
    )
    return [
        Stage("rank set: passes", "block", probed + ROUNDS * (1 + AT_ONCE) * once),
        Stage("rank set: moments", "moments", ROUNDS * AT_ONCE * moments),
        Stage("rank set: fits", "fit", fits),
        *(replace(stage, operations=ROUNDS * stage.operations) for stage in read),
    ]


def cross_fit(shape: ModelShape, work: Workload) -> list[Stage]:
    """Forced maps by folds: each place's moments once more, summed by fold, a fit for each place
    and fold, and every document's prompt read under the maps of its fold.
    """
    if not work.folds:
        return []
    tokens, places = work.counted(False) + work.counted(True), len(shape.branches)
    moments = shape.n_layers * tokens * places * _moments(FIT_PAIRS, shape, work)
    cubes = float(shape.n_layers * places * work.folds * shape.d**3)
    return [
        Stage("cross-fit: moments", "moments", moments),
        Stage("cross-fit: fits", "fit", FIT * cubes, TRIDIAGONAL * cubes),
        *replacement(shape, judged_by_folds(work), "cross-fit"),
    ]


def run(shape: ModelShape, work: Workload) -> tuple[Stage, ...]:
    """All stages of a run, in order."""
    parts = (
        first_look,
        march,
        accumulators,
        fits,
        reachability,
        shared_maps,
        low_rank_changes,
        weight_side,
        replacement,
        close_look,
        questions,
        elsewhere,
        cross_fit,
        rank_search,
    )
    return tuple(stage for part in parts for stage in part(shape, work) if stage.operations)

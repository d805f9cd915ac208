"""A short timing: operations a second that this machine does of each kind of work.

Every kind is timed with the toolkit's own code on random numbers: a block of the model's own shape,
built from its configuration, on one batch shape of the run; sums, fits and Jacobians at a width
that takes a fraction of a second. The formulas of `toolkit.planning.operations` scale it up.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from toolkit.analysis.divergence import Predictions
from toolkit.analysis.first_order import first_order_terms
from toolkit.analysis.linear_fit import explained, fit_linear
from toolkit.analysis.reachability import BUDGETS, reach
from toolkit.analysis.spectrum import spectrum
from toolkit.blocks.jacobian import MLPJacobian, matrix_of
from toolkit.blocks.mlp import MLP, Change, MLPChange
from toolkit.diagnosis.block_statistics import moment_pairs
from toolkit.documents.batches import Batch
from toolkit.errors import refused
from toolkit.models.locations import resolve
from toolkit.models.runner import BlockRunner
from toolkit.planning.operations import (
    FIT,
    GRAM,
    JUDGED,
    TRIDIAGONAL,
    first_order,
    product_operations,
)
from toolkit.planning.prompt_operations import LOGIT, rows_of_a_token
from toolkit.planning.shapes import ModelShape
from toolkit.planning.stages import Kind, block_pass
from toolkit.planning.workload import BatchShape, Workload
from toolkit.runtime.lapack import quiet_openblas
from toolkit.runtime.placement import analysis_device
from toolkit.statistics import MomentSums

WIDEST = 512  # of a square matrix that is timed
SECONDS = 0.4  # that one timing is to take
FEWEST_TOKENS = 16
BEYOND_CACHES = 2**28  # bytes of weights: more than a processor's caches hold
MOST_COPIES = 32  # of a block
Rates = dict[Kind, float]


@dataclass(frozen=True)
class Timing:
    """Operations a second by kind, and the seconds that measuring them took.

    `token` is the seconds of a pass of the whole model that makes one token in each of the rows
    that passes of the comparison have on average: reading weights is at least half of it.
    """

    rates: Rates
    seconds: float
    token: float = 0.0


@torch.no_grad()
def measure(
    config: Any, shape: ModelShape, work: Workload, dtype: torch.dtype, device: str = "cpu"
) -> Timing:
    """Return the rates of every kind of work in a run of `work`."""
    started = time.perf_counter()
    with quiet_openblas():
        fastest = product_rate(dtype, device)
        blocks = random_block(config, dtype, device)
        batch = _batch_within(shape, work.batches, fastest)
        rates: Rates = {"block": block_rate(blocks, shape, batch)}
        token = token_seconds(blocks, shape, rows_of_a_token(work))
        rates |= statistics_rates(shape, work, batch.n, dtype, device)
        rates["logit"] = _logit_rate(shape, dtype, device)
    return Timing(rates, time.perf_counter() - started, token)


def product_rate(dtype: torch.dtype, device: str, width: int = WIDEST) -> float:
    """Operations a second of a product of two square matrices."""
    a = torch.randn(width, width, device=device).to(dtype)
    return 2.0 * width**3 / seconds_of(lambda: a @ a, device)


def random_block(config: Any, dtype: torch.dtype, device: str) -> BlockRunner:
    """One block of the model that `config` describes, with random weights and a tiny vocabulary."""
    small = copy.deepcopy(config.get_text_config())
    n_layers, small.num_hidden_layers = small.num_hidden_layers, 1
    for name, value in list(vars(small).items()):  # what is said of every block
        if isinstance(value, list) and len(value) == n_layers:
            setattr(small, name, value[:1])
    for name, value in (("num_kv_shared_layers", 0), ("vocab_size_per_layer_input", 8)):
        if hasattr(small, name):
            setattr(small, name, value)
    small.vocab_size = 8
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    with refused("cannot time one block of this model by itself"), torch.device(device):
        model = AutoModelForCausalLM.from_config(small, dtype=dtype)
    model.eval().requires_grad_(False)
    return BlockRunner(model, resolve(model))


def block_rate(runner: BlockRunner, shape: ModelShape, batch: BatchShape) -> float:
    """Time one block that is listened to, as in the march."""
    return block_pass(shape, shape.blocks[0], batch) / _pass_seconds([runner], shape, batch)


def token_seconds(runner: BlockRunner, shape: ModelShape, rows: int) -> float:
    """Time a pass of the whole model on one token of each of `rows`, as candidates generate.

    Every pass reads all weights from memory: copies of the block make more than caches hold. The
    other blocks and the head take as much a number.
    """
    size = sum(p.nbytes for p in runner.sites.blocks[0].parameters())
    n_copies = min(MOST_COPIES, -(-BEYOND_CACHES // max(size, 1)))
    copies = [copy.deepcopy(runner) for _ in range(n_copies)]
    numbers = sum(block.matrices for block in shape.blocks) + shape.d * shape.vocabulary
    return _pass_seconds(copies, shape, BatchShape(rows, 1)) * numbers / shape.blocks[0].matrices


def _pass_seconds(runners: Sequence[BlockRunner], shape: ModelShape, batch: BatchShape) -> float:
    """Return the seconds of a pass through one of like blocks, all passed one after the other."""
    parameter = next(runners[0].model.parameters())
    device = parameter.device
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.long, device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    real = Batch(ids, mask, mask, torch.zeros(batch.n, device=device), batch.held_out)
    hidden = torch.randn(batch.rows, batch.length, shape.d, device=device).to(parameter.dtype)

    def work() -> None:
        for runner in runners:
            runner.run(0, runner.call(0, real), hidden, shape.branches)

    return seconds_of(work, device) / len(runners)


def statistics_rates(
    shape: ModelShape, work: Workload, n: int, dtype: torch.dtype, device: str
) -> Rates:
    """Time moments, first-order terms, fits and reachability, at a width of `WIDEST` at most."""
    d = min(shape.d, WIDEST)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pairs = moment_pairs("forced", shape.branches)
    names = dict.fromkeys(name for pair in pairs for name in pair)
    values = {name: torch.randn(n, d, device=device, dtype=wide) for name in names}
    sums = MomentSums(pairs)
    sums.update(values)
    taken = seconds_of(lambda: sums.update(values), device)
    rates: Rates = {"moments": n * product_operations(pairs, d) / taken}
    rates["fit"] = _fit_rate(sums, pairs[1], d)
    block = shape.largest_block
    if block.d_ff:
        few = replace(
            block,
            d_ff=max(d * block.d_ff // shape.d, 1),
            linear=(),
        )
        rates |= _mlp_rates(replace(shape, d=d, blocks=(few,)), work, n, wide, device)
    return rates


def _fit_rate(sums: MomentSums, pair: tuple[str, str], d: int) -> float:
    """Time a spectrum and a fit that is judged on both sides."""
    target, source = pair
    moments = sums.result()

    def work() -> None:
        spectrum(moments.second_moment(target), moments.mean[target], 1.0, moments.n)
        fit = fit_linear(moments, source, target)
        for _side in range(2):
            explained(fit, moments, source, target, moments.energy(target), (0, "full"))

    where = moments.mean[source].device
    return (TRIDIAGONAL + FIT + JUDGED) * d**3 / seconds_of(work, where)


def _mlp_rates(shape: ModelShape, work: Workload, n: int, dtype: torch.dtype, device: str) -> Rates:
    """Time first-order terms where the models are, and what looks at tokens where analyses run."""
    (block,), d = shape.blocks, shape.d
    mlp, change = _random_mlp(d, block.d_ff, block.gated, work.adapter is None)
    there = mlp.to(dtype, device), change.to(dtype, device)
    h = torch.randn(n, d, dtype=dtype, device=device)
    taken = seconds_of(lambda: first_order_terms(*there, h), device)
    whole = replace(work, adapter=None if work.adapter is None else 8 * 3 * (d + block.d_ff))
    rates: Rates = {"mlp": n * first_order(block, shape, whole) / taken}
    where = analysis_device(torch.device(device))
    own = mlp.to(torch.float32, where)
    one, target = torch.randn(1, d).to(where), torch.randn(1, 1, d).to(where)
    radii = one.norm() * torch.tensor([BUDGETS], dtype=torch.float64, device=where)
    # A map comes with its share of the heads, which are looked through one by one.
    n_slices = max(shape.n_heads // 3, 1) if shape.sublayer else 0
    slices = torch.randn(n_slices, d, shape.head_dim).to(where)

    def look() -> None:
        reach(matrix_of(MLPJacobian.at(own, one)), target, radii)
        for head in slices:
            reach(lambda _, head=head: head, target, radii)  # type: ignore[misc]

    operations = 2.0 * d * d * block.d_ff + (GRAM + TRIDIAGONAL) * d**3
    rates["reach"] = operations / seconds_of(look, where)
    some = torch.randn(max(work.shared_sample, 1), d).to(where)
    products = 2.0 * (3 if block.gated else 2) * d * block.d_ff * len(some)
    jacobian = MLPJacobian.at(own, some)
    rates["shared"] = products / seconds_of(lambda: jacobian.push(some), where)
    return rates


def _random_mlp(d: int, d_ff: int, gated: bool, dense: bool) -> tuple[MLP, MLPChange]:
    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns) / columns**0.5

    def change(rows: int, columns: int) -> Change:
        factors = (matrix(rows, columns),) if dense else (matrix(rows, 8), matrix(8, columns))
        return Change(factors, torch.zeros(rows))

    silu = torch.nn.functional.silu
    inner, outer = torch.zeros(d_ff), torch.zeros(d)
    mlp = MLP(silu, matrix(d_ff, d), inner, matrix(d, d_ff), outer)
    if gated:
        mlp = replace(mlp, up=matrix(d_ff, d), up_bias=inner)
    up = change(d_ff, d) if gated else None
    return mlp, MLPChange(change(d_ff, d), change(d, d_ff), up)


def _logit_rate(shape: ModelShape, dtype: torch.dtype, device: str) -> float:
    """Time one model's divergence from another, a token's logits at a time."""
    logits = torch.randn(8, 1, shape.vocabulary, device=device).to(dtype)
    own = Predictions(logits)
    taken = seconds_of(lambda: own.divergence(logits), device)
    return LOGIT * logits.numel() / taken


def _batch_within(shape: ModelShape, batches: tuple[BatchShape, ...], rate: float) -> BatchShape:
    """The run's middle batch, or as much of it as the product rate says can be timed shortly."""
    middle = sorted(batches, key=lambda b: b.n)[len(batches) // 2]
    each = block_pass(shape, shape.blocks[0], replace(middle, rows=1))
    rows = max(1, min(middle.rows, int(SECONDS * rate / each)))
    if rows > 1 or each <= SECONDS * rate:
        return replace(middle, rows=rows)
    length = max(FEWEST_TOKENS, int(middle.length * SECONDS * rate / each))
    return replace(middle, rows=1, length=min(length, middle.length))


def seconds_of(work: Callable[[], Any], device: Any = "cpu") -> float:
    """The least time of `work`, done until `SECONDS` have passed, after one run that warms up."""
    work()
    best, until = float("inf"), time.perf_counter() + SECONDS
    while True:
        started = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(torch.device(device))
        now = time.perf_counter()
        best = min(best, now - started)
        if now > until:
            return best

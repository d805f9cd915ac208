"""The main job: march, analyse, put fitted maps in the oracle's place, recommend."""

import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from toolkit.analysis.linear_fit import ranks_below
from toolkit.analysis.sequential_kl import Divergences, recovered
from toolkit.checks import Check
from toolkit.documents import (
    MAX_LENGTH,
    POSITIONS,
    Batch,
    Encoded,
    Positions,
    encode_all,
    make_batches,
)
from toolkit.errors import InputError
from toolkit.locations import BRANCHES
from toolkit.lockstep import March
from toolkit.mlp import MLP, MLPChange, mlps
from toolkit.pair import ModelPair
from toolkit.progress import progress
from toolkit.recommend import Recommendation, recommend
from toolkit.replacement import NONE, ORACLE, Candidate, Evaluation, evaluate
from toolkit.steering import Adapters
from toolkit.survey import MLP_INPUT, BlockSums, BlockSurvey, Recipe, survey
from toolkit.table import Table
from toolkit.validity import (
    check_noise,
    check_oracle,
    check_tokens,
    check_upstream,
    first_changed_block,
    noise_floor,
)
from toolkit.weights import fingerprint

# What is fitted, and put in place of the oracle in all blocks; DESIGN names the ranks.
FORCED = [Recipe(location, rank, "forced") for location in BRANCHES for rank in (0, 8, 32)]
SEQUENTIAL = [Recipe("post_block", rank, "sequential") for rank in (0, 8, 32)]
SEQUENTIAL += [Recipe("pre_mlp", 8, "sequential"), Recipe("post_mlp", 8, "sequential")]
FREE = [Recipe("post_block", rank, "free") for rank in (0, 8, 32, "full")]  # type: ignore[list-item]
SINGLE = Recipe("post_block", 8, "free")  # also tried in each block alone
N_SAMPLES = 3


@dataclass(frozen=True)
class Options:
    """What a run can be asked for.

    positions: which tokens count: all, response or last. max_length: tokens a document is cut at.
    new_tokens: tokens generated a prompt. max_prompts: at most so many held-out prompts (None:
    all). sample: tokens a block for reachability (0: none). batch_tokens: tokens a batch. seed: of
    the sample.
    """

    positions: Positions = "all"
    max_length: int = MAX_LENGTH
    new_tokens: int = 32
    max_prompts: int | None = None
    sample: int = 8
    batch_tokens: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise InputError(f"positions is {self.positions!r}: expected {', '.join(POSITIONS)}")
        for name in ("max_length", "new_tokens", "batch_tokens"):
            if getattr(self, name) < 2:
                raise InputError(f"{name} is {getattr(self, name)}: expected 2 or more")
        if self.sample < 0 or (self.max_prompts is not None and self.max_prompts < 1):
            raise InputError("sample must be 0 or more, and max_prompts 1 or more")


@dataclass(frozen=True)
class Run:
    """All that a diagnosis found: seven tables, the recommendation and what stands behind it.

    `adapters` are the recommended ones (None where steering recovers nothing). `samples` are
    held-out prompts with the answers of base, steered and tuned model. `info` is ``run.json``.
    """

    norms: Table
    spectrum: Table
    linear_fit: Table
    first_order: Table
    reachability: Table
    sequential_kl: Table
    steerability: Table
    recommendation: dict[str, Any] | None
    adapters: Adapters | None
    samples: list[dict[str, str]]
    checks: list[Check]
    info: dict[str, Any]

    @property
    def tables(self) -> list[Table]:
        return [value for value in vars(self).values() if isinstance(value, Table)]


@dataclass
class Hooks:
    """Where a caller may listen in: each is called as the run goes on.

    finished(survey, march): a block is passed. resume(march): surveys of blocks passed in an
    earlier, interrupted run, after setting the march to where that stopped. keep(layer, sums):
    each block's statistics.
    """

    finished: Callable[[BlockSurvey, March], None] = lambda survey, march: None
    resume: Callable[[March], list[BlockSurvey]] = lambda march: []
    keep: Callable[[int, BlockSums], None] | None = None


@dataclass
class _Stages:
    """Seconds and peak memory of each stage."""

    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process so far
        seconds = time.perf_counter() - started
        self.figures[name] = {"seconds": round(seconds, 2), "peak_memory_bytes": peak}


def diagnose(
    pair: ModelPair,
    documents: Iterable[Any],
    options: Options | None = None,
    *,
    show_progress: bool = True,
    hooks: Hooks | None = None,
) -> Run:
    """Find where, and with how small an adapter, steering does what fine-tuning did to `pair`.

    `documents` are mappings with ``text``, or ``prompt`` and ``response`` (or plain strings).
    Maps are fitted on four documents in five and judged on the others. Raises InputError where the
    documents do not suffice.
    """
    options, hooks, stages = options or Options(), hooks or Hooks(), _Stages()
    with torch.no_grad():
        encoded = encode_all(documents, pair.tokenizer, options.max_length)
        batches = _batches(pair, encoded, options)
        with stages.stage("march"):
            blocks, recipes = _march(pair, batches, options, hooks, show_progress)
        candidates = _candidates(blocks, recipes)
        prompts = [d.prompt_ids for d in encoded if d.held_out][: options.max_prompts]
        with stages.stage("replacement"):
            evaluation = _evaluate(pair, prompts, candidates, options, show_progress)
        with stages.stage("checks"):
            tables = _tables(pair, blocks, candidates, evaluation)
            floor = noise_floor(pair.base_blocks, _noise_batch(batches))
            checks = _checks(pair, tables, batches, evaluation, floor)
    choice = recommend(candidates, evaluation)
    return Run(
        **tables,
        recommendation=_describe(choice, pair, evaluation),
        adapters=choice.chosen.adapters if choice else None,
        samples=_samples(pair, prompts, choice, evaluation),
        checks=checks,
        info=_info(pair, options, encoded, batches, prompts, stages, floor),
    )


def _batches(pair: ModelPair, encoded: Sequence[Encoded], options: Options) -> list[Batch]:
    pad_id = pair.tokenizer.pad_token_id or 0
    batches = make_batches(
        encoded, options.positions, options.batch_tokens, pad_id, pair.device, options.seed
    )
    for held_out, name in ((False, "fit"), (True, "held-out")):
        if not any(b.counted.any() for b in batches if b.held_out == held_out):
            raise InputError(
                f"no token of the {name} documents counts (positions: {options.positions}): "
                "give more or longer documents"
            )
    return batches


def _march(
    pair: ModelPair, batches: list[Batch], options: Options, hooks: Hooks, show_progress: bool
) -> tuple[list[BlockSurvey], list[Recipe]]:
    d_model = pair.base_blocks.embed(batches[0]).shape[-1]
    recipes = [
        recipe
        for recipe in (*FORCED, *SEQUENTIAL, *FREE)
        if recipe.location in pair.branches and recipe.rank in ranks_below(d_model)
    ]
    matrices = _mlps(pair)
    march = March(
        pair.base_blocks,
        pair.tuned_blocks,
        batches,
        pair.branches,
        extra=(MLP_INPUT,) if matrices else (),
        steered={r.name: r.location for r in recipes if r.fit == "sequential"},
    )
    blocks = hooks.resume(march)
    left = (pair.n_layers - len(blocks)) * len(batches)
    with progress(f"marching through {pair.n_layers} blocks", left, show_progress) as advance:
        for found in survey(
            march, pair.branches, recipes, matrices, options.sample, pair.dtype, advance, hooks.keep
        ):
            blocks.append(found)
            hooks.finished(found, march)
    return blocks, recipes


def _mlps(pair: ModelPair) -> list[tuple[MLP, MLPChange]] | None:
    """The MLPs as matrices, or None, with the reason kept, where there are none to read."""
    if MLP_INPUT not in pair.missing:
        try:
            return mlps(pair.base, pair.tuned)
        except ValueError as error:
            pair.missing["mlp"] = " ".join(str(error).split())
    return None


def _candidates(blocks: list[BlockSurvey], recipes: list[Recipe]) -> list[Candidate]:
    everywhere = {
        recipe: Adapters(recipe.location, {b.layer: b.adapters[recipe] for b in blocks}, recipe.fit)
        for recipe in recipes
    }
    candidates = [Candidate.of(adapters) for adapters in everywhere.values()]
    if SINGLE in everywhere:
        candidates += [Candidate.of(everywhere[SINGLE], block.layer) for block in blocks]
    return candidates


def _evaluate(
    pair: ModelPair,
    prompts: list[tuple[int, ...]],
    candidates: list[Candidate],
    options: Options,
    show_progress: bool,
    batch_size: int = 16,
) -> Evaluation:
    rounds = -(-len(prompts) // batch_size)
    total = rounds * (len(candidates) + 1)
    with progress("putting fits in place of tuning", total, show_progress) as advance:
        return evaluate(pair, prompts, candidates, options.new_tokens, batch_size, advance)


def _tables(
    pair: ModelPair,
    blocks: list[BlockSurvey],
    candidates: list[Candidate],
    evaluation: Evaluation,
) -> dict[str, Table]:
    names = ("norms", "spectrum", "linear_fit", "first_order", "reachability")
    tables = {
        name: Table.of(name, [row for block in blocks for row in block.rows.get(name, [])])
        for name in names
    }
    shown = [NONE, ORACLE, *candidates]
    curves = [
        {**_labels(candidate), "forcing": forcing, "token_index": index, "kl_mean": mean,
         "kl_sem": sem, "n_prompts": n}
        for candidate in shown
        for forcing in ("tuned", "own")
        if (candidate, forcing) in evaluation.divergences
        for index, mean, sem, n in evaluation.divergences[candidate, forcing].curve()  # type: ignore[index]
    ]  # fmt: skip
    tables["sequential_kl"] = Table.of("sequential_kl", curves)
    rows = [_steerability(candidate, evaluation, pair.n_parameters) for candidate in shown]
    tables["steerability"] = Table.of("steerability", rows)
    return tables


def _labels(candidate: Candidate) -> dict[str, Any]:
    names = ("location", "kind", "rank", "fit", "layers")
    return {name: getattr(candidate, name) for name in names}


def _steerability(
    candidate: Candidate, evaluation: Evaluation, n_parameters: int
) -> dict[str, Any]:
    tuned = evaluation.divergences[candidate, "tuned"]
    own: Divergences | None = evaluation.divergences.get((candidate, "own"))
    share, sem = recovered(tuned, evaluation.divergences[NONE, "tuned"])
    return {
        **_labels(candidate),
        "parameters": candidate.parameters,
        "parameters_percent": 100 * candidate.parameters / n_parameters,
        "kl": tuned.mean,
        "kl_sem": tuned.sem,
        "recovered": share,
        "recovered_sem": sem,
        "kl_own": own.mean if own else None,
        "kl_own_sem": own.sem if own else None,
    }


def _noise_batch(batches: list[Batch]) -> Batch:
    """The shortest batch's first rows: rounding needs few tokens."""
    batch = min(batches, key=lambda b: b.n_tokens)
    counted = batch.counted[:4]
    return Batch(batch.ids[:4], batch.mask[:4], counted, batch.keys, batch.held_out)


def _checks(
    pair: ModelPair,
    tables: dict[str, Table],
    batches: list[Batch],
    evaluation: Evaluation,
    floor: list[float],
) -> list[Check]:
    n_fit = sum(int(b.counted.sum()) for b in batches if not b.held_out)
    d_model = pair.base_blocks.embed(batches[0]).shape[-1]
    frame = tables["spectrum"].frame
    missing = [
        Check(f"location {name}", "not applicable", reason) for name, reason in pair.missing.items()
    ]
    return [
        check_tokens(n_fit, d_model),
        check_noise(frame, floor),
        check_oracle(evaluation.divergences[ORACLE, "tuned"]),
        check_upstream(frame, first_changed_block(pair)),
        *pair.checks,
        *missing,
    ]


def _describe(
    choice: Recommendation | None, pair: ModelPair, evaluation: Evaluation
) -> dict[str, Any] | None:
    if choice is None:
        return None

    def described(candidate: Candidate) -> dict[str, Any]:
        row = _steerability(candidate, evaluation, pair.n_parameters)
        return {k: v for k, v in row.items() if not k.startswith("kl_own")}

    return {
        **described(choice.chosen),
        "best": described(choice.best),
        "tied": [described(candidate) for candidate in choice.tied],
    }


def _samples(
    pair: ModelPair,
    prompts: list[tuple[int, ...]],
    choice: Recommendation | None,
    evaluation: Evaluation,
) -> list[dict[str, str]]:
    said: dict[str, list[list[int]]] = {"base": evaluation.tokens[NONE]}
    if choice and choice.chosen in evaluation.tokens:
        said["steered"] = evaluation.tokens[choice.chosen]
    said["tuned"] = evaluation.tokens[None]
    decode = lambda ids: pair.tokenizer.decode(ids, skip_special_tokens=True).strip()  # noqa: E731
    return [
        {"prompt": decode(prompts[i]), **{who: decode(rows[i]) for who, rows in said.items()}}
        for i in range(min(N_SAMPLES, len(prompts)))
    ]


def _info(
    pair: ModelPair,
    options: Options,
    encoded: Sequence[Encoded],
    batches: list[Batch],
    prompts: Sequence[Any],
    stages: _Stages,
    floor: list[float],
) -> dict[str, Any]:
    def side(held_out: bool) -> dict[str, int]:
        counted = sum(int(b.counted.sum()) for b in batches if b.held_out == held_out)
        n = sum(document.held_out == held_out for document in encoded)
        return {"documents": n, "tokens": counted}

    def model(name: str, live: torch.nn.Module) -> dict[str, str]:
        dtype = str(next(live.parameters()).dtype).removeprefix("torch.")
        return {"name": name, "sha256": fingerprint(live), "dtype": dtype}

    return {
        "versions": versions(),
        "commit": commit(),
        "base": model(pair.base_name, pair.base),
        "tuned": model(pair.tuned_name, pair.tuned),
        "family": type(pair.base).__name__,
        "parameters": pair.n_parameters,
        "layers": pair.n_layers,
        "data": {"fit": side(False), "held_out": side(True), "prompts": len(prompts)},
        "statistics_dtype": "float64",
        "device": str(pair.device),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "seed": options.seed,
        "options": asdict(options),
        "noise_floor": floor,
        "not_applicable": pair.missing,
        "stages": stages.figures,
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    names = ("oracle-toolkit", "torch", "transformers", "peft", "interp-engine", "numpy", "pandas")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The commit that the package runs from, where it runs from a checkout of its own."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None

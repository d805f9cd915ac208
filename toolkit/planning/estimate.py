"""What a run will cost, before any weights are read: the plan after ``oracle diagnose --dry-run``.

Configurations, tokenizer and documents are read, so tokens and batches are those of the run;
operations and bytes come from the formulas of `operations` and `memory`, seconds from a short
timing on random numbers. Nothing is written.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Group
from rich.table import Table as Grid

from toolkit.diagnosis.cross_fit import cross_fitted_specs, fold_prompts
from toolkit.diagnosis.grid import SINGLE, grid_for, on_own_tokens
from toolkit.diagnosis.options import Options
from toolkit.diagnosis.other_data import OtherData
from toolkit.diagnosis.weight_candidates import n_weight_candidates
from toolkit.documents.corpus import Corpus
from toolkit.evaluation.accuracy import prompts_of
from toolkit.evaluation.distributions import TOGETHER
from toolkit.evaluation.questions import QUESTIONS_A_BATCH
from toolkit.evaluation.reference import like_lengths
from toolkit.evaluation.response_loss import response_batches
from toolkit.models.loading import parse_dtype
from toolkit.models.outline import Outline
from toolkit.planning import operations
from toolkit.planning.free_memory import Place, gib, places, process_size
from toolkit.planning.memory import STAGES, Disk, Memory, disk, memory
from toolkit.planning.shapes import ModelShape
from toolkit.planning.stages import ANALYSES, Stage
from toolkit.planning.timing import Timing, measure
from toolkit.planning.workload import BatchShape, Workload
from toolkit.runtime.placement import analysis_device


@dataclass(frozen=True)
class RunPlan:
    """Hold what a run of `work` on models of `shape` needs.

    documents: fit and held out. devices: of the models, and of the analyses. places: the memories
    that hold the parts of `memory`. timing: None where nothing was timed. counts_all: whether all
    that is asked for is in `stages`.
    """

    shape: ModelShape
    work: Workload
    documents: tuple[int, int]
    stages: tuple[Stage, ...]
    memory: Memory
    disk: Disk
    places: tuple[Place, ...]
    timing: Timing | None = None
    counts_all: bool = True
    devices: tuple[str, str] = ("cpu", "cpu")

    def seconds(self, stage: Stage) -> float:
        """Return what `stage` will take, at the rate that was timed for its kind."""
        if self.timing is None:
            raise ValueError("nothing was timed: plan(..., timed=True)")
        if stage.kind == "decode":
            return stage.passes * self.timing.token
        return stage.operations / self.timing.rates[stage.kind]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds(stage) for stage in self.stages)

    def __rich__(self) -> Group:
        return Group(self._counts(), "", self._work(), "", self._memory(), *self._notes())

    def _counts(self) -> Grid:
        grid = _grid("", "fit", "held out", "all")
        sides = [[b for b in self.work.batches if b.held_out == held] for held in (False, True)]
        rows = {
            "documents": self.documents,
            "counted tokens": [sum(b.counted for b in side) for side in sides],
            "tokens with padding": [sum(b.n for b in side) for side in sides],
            "batches": [len(side) for side in sides],
        }
        for name, counts in rows.items():
            grid.add_row(name, *(f"{n:,}" for n in (*counts, sum(counts))))
        passes = operations.march_passes(self.work)
        on_fit = passes["all"] + passes["fit"]
        grid.add_row("passes through every block", f"{on_fit:g}", f"{passes['all']:g}", "")
        return grid

    def _work(self) -> Grid:
        timed, one_device = self.timing is not None, self.devices == ("cpu", "cpu")
        where = () if one_device else ("runs on",)
        grid = _grid("work", "operations", *(("a second", "time") if timed else ()), *where)
        for stage in self.stages:
            cells = [stage.name, engineering(stage.operations)]
            if self.timing is not None:
                taken = self.seconds(stage)
                cells += [engineering(stage.operations / taken if taken else 0.0), duration(taken)]
            if not one_device:
                cells.append(self.devices[stage.kind in ANALYSES])
            grid.add_row(*cells)
        total = ["all", engineering(sum(stage.operations for stage in self.stages))]
        grid.add_row(*total, *(("", duration(self.total_seconds)) if timed else ()), style="bold")
        return grid

    def _memory(self) -> Grid:
        grid, held = _grid("memory", *STAGES), self.memory
        for part in held.parts:
            name = f"{part.name}, kept by the C library" if part.name == "freed" else part.name
            grid.add_row(name, *(gib(part.bytes) if s in part.stages else "" for s in STAGES))
        grid.add_row("all", *(gib(held.at(stage)) for stage in STAGES), style="bold")
        grid.add_row("Python and its libraries, held already", *[gib(held.process)] * len(STAGES))
        grid.add_row("streams, mapped from disk", *[gib(held.mapped)] * 2, "")
        sizes = (gib(held.size_at(stage)) for stage in STAGES)
        grid.add_row("size of the process", *sizes, style="bold")
        return grid

    def _notes(self) -> Iterable[str]:
        yield ""
        yield (
            f"on disk while it runs: {gib(self.disk.total)}; kept: "
            f"{gib(self.disk.total - self.disk.streams)}, tables and report besides"
        )
        if not self.counts_all:
            yield "--distil trains through the models, which is not counted here"
        if self.work.search:
            yield (
                f"the search for ranks is counted with {operations.ROUNDS} rounds; where its guess "
                "is far off it takes more"
            )
        for place in self.places:
            verdict = "enough" if place.suffices else "NOT ENOUGH"
            yield f"{place.name}: {verdict}, {gib(place.needed.peak)} of {gib(place.free)} free"
        if self.timing is not None:
            whole, spent = duration(self.total_seconds), duration(self.timing.seconds)
            yield f"estimated time: {whole} (after a timing of {spent})"


# many parameters: all but two say how, and have defaults
def plan(
    known: Outline,
    documents: Iterable[Any] | Corpus,
    options: Options | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
    *,
    timed: bool = True,
    offload: bool = False,
    keep_statistics: bool = False,
    other: OtherData | None = None,
) -> RunPlan:
    """Plan what ``oracle diagnose`` of a pair on these documents needs; no weights are read.

    `known` is the pair's `outline`; the arguments after it are those of `ModelPair.load` and
    `diagnose`. With `timed`, a few seconds of timing on `device` give the run's time.
    """
    options = options or Options()
    if isinstance(dtype, str):
        named = getattr(known.config, "dtype", None) or torch.float32
        parsed = parse_dtype(dtype, "dtype")
        dtype = named if isinstance(parsed, str) else parsed
    shape = ModelShape.of_config(known.config)
    if not isinstance(documents, Corpus):
        documents = Corpus.of(documents, known.tokenizer, **options.reading)
    work, ranks = workload_of(shape, documents, options, known.adapter)
    work = replace(work, first_look=not offload)
    if other:
        work = with_other(work, other, known.tokenizer)
    size = dtype.itemsize
    needed = memory(shape, work, size, ranks, offload, torch.get_num_threads(), process_size())
    timing = measure(known.config, shape, work, dtype, device) if timed else None
    return RunPlan(
        shape=shape,
        work=work,
        documents=(len(documents.fit), len(documents.held_out)),
        stages=operations.run(shape, work),
        memory=needed,
        disk=disk(shape, work, size, ranks, keep_statistics),
        places=places(needed, device),
        timing=timing,
        counts_all=not options.distil,
        devices=(device, str(analysis_device(torch.device(device)))),
    )


def workload_of(
    shape: ModelShape, corpus: Corpus, options: Options, adapter: int | None = None
) -> tuple[Workload, list[Any]]:
    """Count a run's numbers from its documents as tokens; and the ranks of all that it fits."""
    weights = not options.sketch
    through = shape.sublayer and options.shared_sample > 0
    specs = grid_for(shape.branches, shape.d, through)
    asked = corpus.prompts(options.max_prompts)
    by_folds = cross_fitted_specs(specs) if options.folds else []
    reporting = corpus.reporting(options.max_prompts) or corpus.asked(options.max_prompts)
    work = Workload(
        batches=tuple(
            BatchShape(b.ids.shape[0], b.ids.shape[1], int(b.counted.sum()), b.held_out)
            for b in corpus.batches
        ),
        prompts=_like_lengths(asked),
        steered=tuple(spec.location for spec in specs if spec.is_steered),
        everywhere=len(specs) + 1 + (n_weight_candidates(shape.d) if weights else 0),
        talking=2 + sum(on_own_tokens(spec.location, spec.rank) for spec in specs),
        weights=weights,
        single=SINGLE in specs,
        new_tokens=options.new_tokens,
        search=options.max_kl is not None,
        sample=options.sample,
        sketch=options.sketch,
        shared_sample=options.shared_sample,
        adapter=adapter,
        reporting=_rounds([document.prompt_ids for document in reporting], TOGETHER),
        answered=tuple(
            BatchShape(*batch.ids.shape) for batch in response_batches(corpus, reporting)
        ),
        folds=options.folds,
        fold_prompts=tuple(
            shape
            for prompts in fold_prompts(corpus, options).values()
            for shape in _like_lengths(prompts)
        ),
        fold_maps=len(by_folds),
    )
    return work, [spec.rank for spec in (*specs, *(options.folds * by_folds))]


def with_other(work: Workload, other: OtherData, tokenizer: Any) -> Workload:
    """Add what is looked at beside the documents."""
    found = [_like_lengths(prompts) for prompts in other.tokens(tokenizer).values()]
    work = replace(work, elsewhere=tuple(shape for rounds in found for shape in rounds))
    if not other.questions:
        return work
    asked = sorted(prompts_of(tokenizer, other.questions.examples), key=len)
    rounds = _rounds(asked, QUESTIONS_A_BATCH)
    return replace(work, questions=rounds, answer_tokens=other.questions.task.new_tokens)


def _like_lengths(prompts: Sequence[Sequence[int]]) -> tuple[BatchShape, ...]:
    batches = like_lengths([len(prompt) for prompt in prompts])
    return _shapes([[prompts[row] for row in rows] for rows in batches])


def _rounds(prompts: Sequence[Sequence[int]], size: int) -> tuple[BatchShape, ...]:
    return _shapes([prompts[i : i + size] for i in range(0, len(prompts), size)])


def _shapes(rounds: Sequence[Sequence[Sequence[int]]]) -> tuple[BatchShape, ...]:
    return tuple(BatchShape(len(prompts), max(map(len, prompts))) for prompts in rounds)


def _grid(*names: str) -> Grid:
    grid = Grid(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for place, name in enumerate(names):
        grid.add_column(name, justify="right" if place else "left")
    return grid


def engineering(n: float) -> str:
    """Operations with a prefix: 12.3 G."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if n >= size:
            return f"{n / size:.1f} {prefix}"
    return f"{n:.0f}"


def duration(seconds: float) -> str:
    """Seconds in words: 5.2 s, 3.0 min, 2.4 h."""
    for unit, size in (("s", 1), ("min", 60)):
        if seconds < 60 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 3600:.1f} h"

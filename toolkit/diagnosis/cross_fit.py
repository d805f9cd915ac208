"""Cross-fitted maps: every document judges forced maps that its fold had no part in.

All documents, fit and held-out ones, are dealt into folds by their content. The march sums the
moments of each fold by itself; the maps that judge fold k are fitted on those of the other folds
together, so that all folds cost one march (Stone 1974, doi:10.1111/j.2517-6161.1974.tb00994.x).
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.collection import Adapters
from toolkit.analysis.divergence import Divergences
from toolkit.analysis.linear_fit import fit_linear
from toolkit.diagnosis.options import Options
from toolkit.documents.corpus import Corpus
from toolkit.errors import InputError
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import Forcing, evaluate, n_comparisons
from toolkit.evaluation.intervals import recovered_interval
from toolkit.evaluation.reference import Reference
from toolkit.fitting.block_result import BlockResult
from toolkit.fitting.fit_statistics import PAIRS, STATE, TARGET, FitStatistics, values_of
from toolkit.fitting.from_moments import adapter_from
from toolkit.fitting.spec import FitSpec
from toolkit.lockstep.march import Step
from toolkit.models.pair import ModelPair
from toolkit.runtime.processes import ALONE, Processes
from toolkit.runtime.progress import progress
from toolkit.statistics.frame import shared_frames

Row = dict[str, Any]
Found = tuple[dict[str, list[Row]], dict[FitSpec, Adapter]]
RANKS = (0, 8, 32)


def cross_fitted_specs(specs: Sequence[FitSpec]) -> list[FitSpec]:
    """Return those of `specs` that are fitted by folds: forced maps of three sizes a place."""
    return [
        spec
        for spec in specs
        if (spec.fit, spec.target) == ("forced", "own") and spec.rank in RANKS
    ]


def fold_prompts(corpus: Corpus, options: Options) -> dict[int, list[tuple[int, ...]]]:
    """Return the prompts of each fold's documents, at most `max_prompts` a fold; empty unasked.

    Raises InputError where the documents of one fold alone have tokens that count.
    """
    n = options.folds
    if not n:
        return {}
    by_fold = {
        fold: [document for document in corpus.encoded if document.lot % n == fold]
        for fold in range(n)
    }
    fitted_on = [
        any(any(document.counted(corpus.positions)) for document in documents)
        for documents in by_fold.values()
    ]
    if sum(fitted_on) < 2:
        raise InputError(
            f"the documents that count fall into one of {n} folds: give more documents, or leave "
            "out --cross-fit"
        )
    return {
        fold: [document.prompt_ids for document in documents[: options.max_prompts]]
        for fold, documents in by_fold.items()
        if documents
    }


class FoldStatistics:
    """Accumulates, at every place of a block, the moments of a forced fit for each fold apart.

    `specs` are those of the diagnosis; `sketch` is the width of the projections through which
    moments are seen (None: they are exact).
    """

    def __init__(
        self,
        specs: Sequence[FitSpec],
        n_folds: int,
        processes: Processes = ALONE,
        sketch: int | None = None,
    ) -> None:
        self.specs, self.n_folds, self.processes = cross_fitted_specs(specs), n_folds, processes
        self.sums = {
            spec.location: [FitStatistics(spec, processes, sketch) for _ in range(n_folds)]
            for spec in self.specs
        }
        self._started = False

    def update(self, step: Step) -> None:
        """Add one batch, of fit or of held-out documents."""
        values = {place: values_of(step, folds[0].spec) for place, folds in self.sums.items()}
        self._start(values)
        dealt = step.batch.folds(self.n_folds)
        for fold in range(self.n_folds):
            tokens = (dealt == fold).nonzero()[:, 0]
            for place, folds in self.sums.items():
                part = {name: value[tokens] for name, value in values[place].items()}
                moments = folds[fold].moments
                assert moments is not None
                moments.update(part)

    def start(self) -> None:
        """Take the first process's frames where this one had no document."""
        self._start({})

    def reduce(self, processes: Processes) -> None:
        """Add up the sums of all `processes`: then each holds them all."""
        for folds in self.sums.values():
            for statistics in folds:
                statistics.reduce(processes)

    def tasks(self, dtype: torch.dtype) -> list[Callable[[], Found]]:
        """Return what fits the maps of every place without each fold."""
        return [
            partial(self._fitted, place, fold, dtype)
            for place in self.sums
            for fold in range(self.n_folds)
        ]

    def _start(self, values: dict[str, dict[str, Tensor]]) -> None:
        if self._started:
            return
        self._started = True
        frames = shared_frames(values, self.processes)
        for place, folds in self.sums.items():
            for statistics in folds:
                statistics.begin(frames.get(place))

    def _fitted(self, place: str, fold: int, dtype: torch.dtype) -> Found:
        """Fit every size at `place` on all folds but `fold`."""
        others = [
            statistics
            for number, statistics in enumerate(self.sums[place])
            if number != fold and statistics.moments and statistics.moments.n
        ]
        specs = [spec for spec in self.specs if spec.location == place]
        results = (statistics.result() for statistics in others)  # one at a time in memory
        moments = reduce(lambda a, b: a.pooled(b, PAIRS), results)
        fit = fit_linear(moments, STATE, TARGET, max_rank=max(RANKS))
        return {}, {
            replace(spec, fold=fold): adapter_from(fit, spec.rank_at(0), dtype) for spec in specs
        }


@dataclass(frozen=True)
class CrossFit:
    """Judge the maps that were fitted without a fold on the prompts of the fold's documents.

    `kept_of` gives, by name, what an interrupted run compared (None: nothing is kept).
    """

    pair: ModelPair
    corpus: Corpus
    options: Options
    kept_of: Callable[[str], MutableMapping[str, dict[str, Tensor]]] | None = None
    processes: Processes = ALONE

    @torch.no_grad()
    def rows(self, blocks: Sequence[BlockResult], show_progress: bool = False) -> list[Row]:
        """Return the rows of the table ``cross_fitted``, over the prompts of all folds."""
        pair, n_new = self.pair, self.options.new_tokens
        references = {
            fold: Reference(pair.tuned, pair.tokenizer, prompts, n_new)
            for fold, prompts in fold_prompts(self.corpus, self.options).items()
        }
        candidates = {fold: _candidates(blocks, fold) for fold in references}
        kept = {
            fold: self.kept_of(f"cross-fit-{fold}") if self.kept_of else None for fold in references
        }
        n_steps = sum(
            n_comparisons(
                pair, references[fold], candidates[fold], _read, kept[fold], self.processes
            )
            for fold in references
        )
        parts: dict[Candidate, list[Divergences]] = {}
        with progress("judging by folds", n_steps, show_progress) as advance:
            for fold, reference in references.items():
                found = evaluate(
                    pair,
                    reference,
                    candidates[fold],
                    forcings=_read,
                    advance=advance,
                    kept=kept[fold],
                    processes=self.processes,
                )
                for candidate in (NONE, *candidates[fold]):
                    divergences = found.divergences[candidate, "tuned"]
                    parts.setdefault(candidate, []).append(divergences)
        return list(_rows({key: Divergences.join(some) for key, some in parts.items()}))


def _read(candidate: Candidate) -> tuple[Forcing, ...]:
    """Every candidate reads the tuned model's tokens, and generates none."""
    return ("tuned",)


def _candidates(blocks: Sequence[BlockResult], fold: int) -> list[Candidate]:
    """Return the maps of every size and place that `fold` had no part in, in all blocks."""
    return [
        Candidate.of(
            Adapters(spec.location, {b.layer: b.adapters[spec] for b in blocks}, spec.fit),
            key=replace(spec, fold=None),  # one candidate of all folds
        )
        for spec in blocks[0].adapters
        if spec.fold == fold
    ]


def _rows(found: dict[Candidate, Divergences]) -> Iterator[Row]:
    base = found[NONE]
    for candidate in [candidate for candidate in found if candidate != NONE]:
        divergences = found[candidate]
        share = recovered_interval(divergences, base)
        yield {
            "location": candidate.location,
            "kind": candidate.kind,
            "rank": candidate.rank,
            "recovered": share.estimate,
            "recovered_sem": share.sem,
            "recovered_low": share.low,
            "recovered_high": share.high,
            "kl": divergences.mean,
            "base_kl": base.mean,
            "n_prompts": share.n,
        }

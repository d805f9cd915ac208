"""The main job: march, analyse, put fitted maps in the oracle's place, recommend."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from toolkit.blocks.parts import BlockPartsReader
from toolkit.diagnosis.block_statistics import MLP_INPUT, SUBLAYER_STATES
from toolkit.diagnosis.checks import (
    changed_after_blocks,
    check_noise,
    check_oracle,
    check_quantisation,
    check_sketch,
    check_tokens,
    check_upstream,
    first_changed_block,
)
from toolkit.diagnosis.close_look import CloseLook, Reporting, close_look, shown_models, sides
from toolkit.diagnosis.cross_fit import CrossFit, fold_prompts
from toolkit.diagnosis.description import describe_run
from toolkit.diagnosis.distillation_plan import estimated_seconds, plans
from toolkit.diagnosis.first_look import first_look
from toolkit.diagnosis.grid import fitted_candidates, forcings_of, grid_for
from toolkit.diagnosis.noise import Noise, began_alike, measure_noise, quantisation_rows, some_of
from toolkit.diagnosis.options import DISTIL_STEPS, Options
from toolkit.diagnosis.other_data import OtherData
from toolkit.diagnosis.run import Run
from toolkit.diagnosis.summary import N_SAMPLES, describe_choice, make_tables, samples
from toolkit.diagnosis.survey import SurveyPlan, survey
from toolkit.diagnosis.weight_candidates import weight_candidates, why_no_weights
from toolkit.diagnosis.weight_rows import weight_rows
from toolkit.diagnosis.workspace import Workspace, working_in
from toolkit.documents.batches import Batch
from toolkit.documents.corpus import Corpus
from toolkit.documents.tokens import Encoded
from toolkit.evaluation.allocation import BlockErrorRows, BlockErrors
from toolkit.evaluation.candidates import NONE, ORACLE, Candidate
from toolkit.evaluation.compare import Evaluation, evaluate, n_comparisons
from toolkit.evaluation.rank_search import Known, RankSearch, smallest_ranks
from toolkit.evaluation.recommend import Recommendation, recommend
from toolkit.evaluation.reference import Reference
from toolkit.evaluation.standing import Standing
from toolkit.fitting.block_result import BlockResult
from toolkit.fitting.spec import FitSpec
from toolkit.lockstep.driver import shared_out
from toolkit.lockstep.march import March
from toolkit.models.hooks import left_as_found
from toolkit.models.pair import ModelPair
from toolkit.models.quantised import FLOAT8
from toolkit.models.verify import prove_on_documents
from toolkit.runtime.check import Check
from toolkit.runtime.heap import freed_if_interrupted, release_freed
from toolkit.runtime.lapack import quiet_openblas
from toolkit.runtime.placement import decide_together
from toolkit.runtime.processes import ALONE, Processes
from toolkit.runtime.progress import progress
from toolkit.runtime.provenance import Stages
from toolkit.tables.table import Table


@torch.no_grad()
def diagnose(
    pair: ModelPair,
    documents: Iterable[Any] | Corpus,
    options: Options | None = None,
    *,
    other: OtherData | None = None,
    show_progress: bool = True,
    workspace: Workspace | str | Path | None = None,
    processes: Processes = ALONE,
) -> Run:
    """Find where, and with how small an adapter, steering does what fine-tuning did to `pair`.

    `documents` are mappings with ``text``, or ``prompt`` and ``response`` (or plain strings), or a
    `Corpus` of them. Maps are fitted on four documents in five and judged on the others. `other`
    has questions and prompts that the answer is looked at with. All `processes` share the work, and
    each returns the whole run. Raises InputError where the documents do not suffice.

    An interrupted run leaves the models as they were. With a path as `workspace`, what is finished
    is kept in ``PATH.partial``: the same call goes on from there, and removes it at the end. (A
    command gives an open `Workspace`, which becomes its run's folder.)
    """
    options = options or Options()
    corpus = pair.corpus(documents, **options.reading)
    corpus.require_counted()
    other = other or OtherData()
    # What cannot be read is refused before the work.
    n = options.max_prompts
    asked = [document.prompt_ids for document in (*corpus.asked(n), *corpus.reporting(n))]
    asked += [prompt for fold in fold_prompts(corpus, options).values() for prompt in fold]
    pair.require_prompts(asked, options.new_tokens)
    other.prompts(pair, options.new_tokens)
    decide_together(pair.device, processes)
    with (
        quiet_openblas(),
        left_as_found(pair.base, pair.tuned),
        freed_if_interrupted(),
        working_in(workspace, pair, corpus, options, processes) as own,
    ):
        return _Diagnosis(pair, corpus, options, other, own, processes, show_progress).run()


@dataclass
class _Diagnosis:
    """One diagnosis: what every stage of it needs."""

    pair: ModelPair
    corpus: Corpus
    options: Options
    other: OtherData
    workspace: Workspace | None
    processes: Processes
    show_progress: bool
    stages: Stages = field(default_factory=Stages)

    def run(self) -> Run:
        """Run every stage in its order."""
        pair, options, stages = self.pair, self.options, self.stages
        self.show_progress &= self.processes.first
        with stages.stage("noise"):
            noise, about_data = self._noise()
        asked = self.corpus.asked(options.max_prompts)
        prompts = [document.prompt_ids for document in asked]
        reference = Reference(pair.tuned, pair.tokenizer, prompts, options.new_tokens)
        if self._begins():
            with stages.stage("first look"):
                first_look(pair, self.corpus, reference)
        with stages.stage("march"):
            blocks, specs = self._march()
        march_seconds = stages.figures["march"]["seconds"]
        candidates = fitted_candidates(blocks, specs)
        weights = weight_candidates(pair, blocks)
        with stages.stage("replacement"):
            evaluation = self._compare(reference, [*candidates, *weights])
        if options.distil:
            with stages.stage("distillation"):
                distilled = self._distilled(candidates)
                kept = self.workspace.outcomes_of("distilled") if self.workspace else None
                more = evaluate(pair, reference, distilled, kept=kept, processes=self.processes)
                candidates += distilled
                evaluation.join(more)
        with stages.stage("close look"):
            choice, look = self._look_closely(candidates, asked, evaluation)
        if options.folds:
            with stages.stage("cross-fit"):
                kept_of = self.workspace.outcomes_of if self.workspace else None
                folds = CrossFit(pair, self.corpus, options, kept_of, self.processes)
                look.rows["cross_fitted"] = folds.rows(blocks, self.show_progress)
        with stages.stage("checks"):
            rows = weight_rows(pair.base_runner, pair.tuned_runner, self.processes)
            tables = make_tables(pair, blocks, [*candidates, *weights], evaluation, rows)
            tables |= {name: Table.of(name, rows) for name, rows in look.rows.items()}
            tables["noise"] = noise.table
            checks = self._checks(tables, evaluation, noise) + about_data + look.checks
            if options.sketch:
                shares = [row for block in blocks for row in block.rows["sketch"]]
                checks.append(check_sketch(options.sketch, shares))
        rank_search = None
        if options.max_kl is not None:
            with stages.stage("rank set"):
                rank_search = self._search(options.max_kl, blocks, reference)
        return Run(
            tables=tables,
            recommendation=describe_choice(choice, pair, evaluation, look),
            adapters=choice.chosen.adapters if choice else None,
            samples=samples(pair, asked[:N_SAMPLES], choice, evaluation, options.new_tokens),
            checks=checks,
            info={
                **describe_run(pair, options, self.corpus, len(prompts), stages, noise.summary),
                "distillation": self._distillation(candidates, specs, march_seconds),
            },
            rank_search=rank_search,
        )

    def _noise(self) -> tuple[Noise, list[Check]]:
        """Measure what rounding does to states; prove that documents are read for themselves."""
        base, tuned = self.pair.base_runner, self.pair.tuned_runner
        few = self.corpus.together(some_of(self.corpus.encoded, self.options.positions))
        noise = measure_noise(base, few, self.pair.branches)
        if base.model in FLOAT8 and not began_alike(base, tuned):
            noise = noise.joined(*quantisation_rows(base, few, self.pair.branches))
        two = self._shortest_and_longest()
        proofs = [prove_on_documents(n, r, two) for n, r in (("base", base), ("tuned", tuned))]
        return noise, [left_out.check(few) for left_out in self.pair.left_out] + proofs

    def _begins(self) -> bool:
        """Tell whether somebody looks on, and a look is quick and new.

        Weights that come from disk would be read several times for it.
        """
        kept = self.workspace.march if self.workspace else None
        quick = self.processes.size == 1 and self.pair.base_runner.offload is None
        return self.show_progress and quick and not (kept and kept.started)

    def _march(self) -> tuple[list[BlockResult], list[FitSpec]]:
        """March through all blocks; what each gave, and the specs that were fitted."""
        pair, options, batches = self.pair, self.options, self.corpus.batches
        d_model = pair.base_runner.embed(batches[0]).shape[-1]
        reader = _parts_reader(pair, min(batches, key=lambda batch: batch.n_tokens))
        through = bool(reader and reader.has_sublayers and options.shared_sample)
        specs = grid_for(pair.branches, d_model, through)
        release_freed()
        kept = self.workspace.march if self.workspace else None
        blocks = kept.to_go_on_from(pair.base_runner) if kept else []
        march = March(
            pair.base_runner,
            pair.tuned_runner,
            batches,
            pair.branches,
            extra=(MLP_INPUT,) if reader else (),
            forced_extra=SUBLAYER_STATES if reader and reader.has_sublayers else (),
            steered={spec.name: spec.location for spec in specs if spec.is_steered},
            own=shared_out(batches, self.processes),
            folder=kept.folder if kept else None,
            start=len(blocks),
        )
        plan = SurveyPlan(
            pair.branches,
            specs,
            (options.sample, options.shared_sample),
            options.sketch,
            BlockErrorRows(pair, self.corpus) if options.max_kl is not None else None,
            self._has_weights(),
            options.folds,
        )
        keep = self.workspace.keep if self.workspace else None
        n_steps = (pair.n_layers - len(blocks)) * len(march.own or ())
        title = f"marching through {pair.n_layers} blocks"
        with progress(title, n_steps, self.show_progress) as advance:
            for result in survey(march, plan, reader, pair, advance, keep, self.processes):
                blocks.append(result)
                if kept:
                    kept.finished(result)
                release_freed()
        return blocks, specs

    def _has_weights(self) -> bool:
        """Tell whether changes of weights are cut to steering's sizes; else keep why not."""
        if self.options.sketch:
            reason = "sketched moments do not have what the weights read"
        else:
            smallest = min(self.corpus.fit_batches, key=lambda batch: batch.n_tokens)
            reason = why_no_weights(self.pair, smallest)
        if reason:
            self.pair.unavailable["lora"] = reason
        return not reason

    def _distillation(
        self, candidates: list[Candidate], specs: list[FitSpec], march_seconds: float
    ) -> dict[str, Any]:
        """Say how long places were distilled, or what that would take."""
        steps = self.options.distil
        if steps:
            return {"steps": steps}
        n_plans = len(plans(candidates, self.pair.branches))
        n_streams = sum(spec.is_steered for spec in specs)
        seconds = estimated_seconds(self.corpus, n_plans, DISTIL_STEPS, march_seconds, n_streams)
        return {"steps": 0, "would_be": DISTIL_STEPS, "estimated_seconds": round(seconds)}

    def _distilled(self, candidates: list[Candidate]) -> list[Candidate]:
        """Distil adapters at every place."""
        from toolkit.diagnosis.distilled import distilled_candidates  # brings the trainer

        return distilled_candidates(
            self.pair,
            self.corpus,
            candidates,
            self.options,
            folder=self.workspace.distilled if self.workspace else None,
            processes=self.processes,
            show_progress=self.show_progress,
        )

    def _compare(self, reference: Reference, candidates: list[Candidate]) -> Evaluation:
        """Put every candidate in place of fine-tuning."""
        kept = self.workspace.outcomes if self.workspace else None
        n_steps = n_comparisons(self.pair, reference, candidates, forcings_of, kept, self.processes)
        n_adapters = sum(candidate.adapters is not None for candidate in candidates)
        title = "putting fits in place of tuning"
        with progress(title, n_steps, self.show_progress) as advance:
            return evaluate(
                self.pair,
                reference,
                candidates,
                forcings=forcings_of,
                advance=advance,
                seen=Standing(advance.say, n_adapters).seen,
                kept=kept,
                processes=self.processes,
            )

    def _search(
        self, max_kl: float, blocks: Sequence[BlockResult], reference: Reference
    ) -> RankSearch:
        """Find the smallest ranks within `max_kl`, from what the march and the comparison know."""
        rows = [row for block in blocks for row in block.rows["block_errors"]]
        return smallest_ranks(
            self.pair,
            self.corpus,
            max_kl,
            show_progress=self.show_progress,
            known=Known(BlockErrors.of(rows), reference),
            kept=self.workspace.search_round if self.workspace else None,
            processes=self.processes,
        )

    def _look_closely(
        self, candidates: list[Candidate], asked: list[Encoded], evaluation: Evaluation
    ) -> tuple[Recommendation | None, CloseLook]:
        """Choose on the prompts that choose, and look at what was chosen on those that report."""
        documents = self.corpus.reporting(self.options.max_prompts)
        chooses, ours = sides(asked, documents, evaluation.divergences[NONE, "tuned"])
        apart = chooses != ours
        choosing, target = evaluation.of_prompts(chooses), self.options.recover
        choice = recommend(candidates, choosing, target, apart)
        known = [evaluation.tokens[None][row] for row in ours]
        kept = self.workspace.outcomes_of("close-look") if self.workspace else None
        look = close_look(
            self.pair,
            self.corpus,
            Reporting(documents if apart else asked, known, apart, self.options.new_tokens),
            shown_models(choice),
            self.other,
            self.show_progress,
            kept,
            self.processes,
        )
        return choice, look

    def _shortest_and_longest(self) -> Batch:
        fit = sorted(self.corpus.fit, key=lambda document: len(document.ids))
        return self.corpus.together([next(d for d in fit if len(d.ids) > 1), fit[-1]])

    def _checks(
        self, tables: dict[str, Table], evaluation: Evaluation, noise: Noise
    ) -> list[Check]:
        """Return what the run proved about itself."""
        pair, batches = self.pair, self.corpus.batches
        n_fit = sum(int(batch.counted.sum()) for batch in self.corpus.fit_batches)
        d_model = pair.base_runner.embed(batches[0]).shape[-1]
        frame = tables["spectrum"].frame
        unavailable = [
            Check(f"location {name}", "not applicable", reason)
            for name, reason in pair.unavailable.items()
        ]
        return [
            check_tokens(n_fit, d_model),
            check_noise(frame, noise.table.frame, noise.reason),
            *check_quantisation(frame, noise.table.frame, noise.share),
            check_oracle(
                evaluation.divergences[ORACLE, "tuned"],
                evaluation.divergences[NONE, "tuned"],
                changed_after_blocks(pair),
            ),
            check_upstream(frame, first_changed_block(pair)),
            *pair.checks,
            *unavailable,
        ]


def _parts_reader(pair: ModelPair, batch: Batch) -> BlockPartsReader | None:
    """Return the MLPs as matrices, or None, with the reason kept, where there are none to read.

    With them, where a family has one, the path from the attention branch through each.
    """
    if MLP_INPUT in pair.unavailable:
        return None
    try:
        found = BlockPartsReader(pair, batch)
    except ValueError as error:
        pair.unavailable["mlp"] = " ".join(str(error).split())
        return None
    if not found.has_sublayers and "pre_mlp" not in pair.unavailable:
        pair.unavailable["tail"] = found.no_sublayers
    return found

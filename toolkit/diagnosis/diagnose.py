"""The main job: march, analyse, put fitted maps in the oracle's place, recommend."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from toolkit.adapters.collection import Adapters
from toolkit.blocks.parts import BlockPartsReader
from toolkit.diagnosis.block_statistics import MLP_INPUT, SUBLAYER_STATES
from toolkit.diagnosis.checks import (
    check_noise,
    check_oracle,
    check_sketch,
    check_tokens,
    check_upstream,
    first_changed_block,
)
from toolkit.diagnosis.description import describe_run
from toolkit.diagnosis.grid import SINGLE, recipes_for
from toolkit.diagnosis.noise import Noise, measure_noise, some_of
from toolkit.diagnosis.options import Options
from toolkit.diagnosis.run import Run
from toolkit.diagnosis.summary import describe_choice, make_tables, samples
from toolkit.diagnosis.survey import BlockResult, Recipe, survey
from toolkit.diagnosis.weight_rows import weight_rows
from toolkit.diagnosis.workspace import Workspace
from toolkit.documents.batches import Batch, make_batches
from toolkit.documents.tokens import Encoded, encode_all
from toolkit.errors import InputError
from toolkit.evaluation.candidates import ORACLE, Candidate
from toolkit.evaluation.compare import Evaluation, evaluate, n_comparisons
from toolkit.evaluation.rank_search import RankSearch, smallest_ranks
from toolkit.evaluation.recommend import recommend
from toolkit.lockstep.march import March
from toolkit.models.pair import ModelPair
from toolkit.runtime.check import Check
from toolkit.runtime.heap import release_freed
from toolkit.runtime.lapack import quiet_openblas
from toolkit.runtime.processes import ALONE, Processes
from toolkit.runtime.progress import progress
from toolkit.runtime.provenance import Stages
from toolkit.tables.table import Table


def diagnose(
    pair: ModelPair,
    documents: Iterable[Any],
    options: Options | None = None,
    *,
    show_progress: bool = True,
    workspace: Workspace | None = None,
    processes: Processes = ALONE,
) -> Run:
    """Find where, and with how small an adapter, steering does what fine-tuning did to `pair`.

    `documents` are mappings with ``text``, or ``prompt`` and ``response`` (or plain strings).
    Maps are fitted on four documents in five and judged on the others. An open `workspace` keeps
    what is finished and gives what an interrupted run finished. All `processes` share the work,
    and each returns the whole run. Raises InputError where the documents do not suffice.
    """
    options, stages = options or Options(), Stages()
    show_progress &= processes.first
    with torch.no_grad(), quiet_openblas():
        documents = list(documents)
        encoded = encode_all(documents, pair.tokenizer, options.max_length)
        batches = _batches(pair, encoded, options)
        with stages.stage("noise"):
            few = _batched(pair, some_of(encoded, options.positions), options, together=True)
            noise = measure_noise(pair.base_runner, few[0], pair.branches)
        with stages.stage("march"):
            blocks, recipes = _march(pair, batches, options, workspace, processes, show_progress)
        release_freed()
        candidates = _candidates(blocks, recipes)
        asked = [d for d in encoded if d.held_out][: options.max_prompts]
        prompts = [document.prompt_ids for document in asked]
        with stages.stage("replacement"):
            n_steps = n_comparisons(len(prompts), len(candidates), processes)
            with progress("putting fits in place of tuning", n_steps, show_progress) as advance:
                evaluation = evaluate(
                    pair,
                    prompts,
                    candidates,
                    options.new_tokens,
                    advance=advance,
                    kept=workspace.outcomes if workspace else None,
                    processes=processes,
                )
        with stages.stage("checks"):
            rows = weight_rows(pair.base_runner, pair.tuned_runner, processes)
            tables = make_tables(pair, blocks, candidates, evaluation, rows)
            tables["noise"] = noise.table
            checks = _checks(pair, tables, batches, evaluation, noise)
            if options.sketch:
                shares = [row for block in blocks for row in block.rows["sketch"]]
                checks.append(check_sketch(options.sketch, shares))
        rank_search = None
        if options.max_kl is not None:
            with stages.stage("rank set"):
                rank_search = processes.from_first(
                    lambda: _rank_search(pair, documents, options, show_progress)
                )
    choice = recommend(candidates, evaluation)
    return Run(
        tables=tables,
        recommendation=describe_choice(choice, pair, evaluation),
        adapters=choice.chosen.adapters if choice else None,
        samples=samples(pair, asked, choice, evaluation),
        checks=checks,
        info=describe_run(pair, options, encoded, batches, prompts, stages, noise.summary),
        rank_search=rank_search,
    )


def _batched(
    pair: ModelPair, encoded: Sequence[Encoded], options: Options, together: bool = False
) -> list[Batch]:
    """`encoded` in batches; those of one side in a single one, if `together`."""
    n = len(encoded) * max(len(d.ids) for d in encoded) if together else options.batch_tokens
    pad_id = pair.tokenizer.pad_token_id or 0
    return make_batches(encoded, options.positions, n, pad_id, pair.device, options.seed)


def _batches(pair: ModelPair, encoded: Sequence[Encoded], options: Options) -> list[Batch]:
    batches = _batched(pair, encoded, options)
    for held_out, name in ((False, "fit"), (True, "held-out")):
        if not any(b.counted.any() for b in batches if b.held_out == held_out):
            raise InputError(
                f"no token of the {name} documents counts (positions: {options.positions}): "
                "give more or longer documents"
            )
    return batches


def _march(
    pair: ModelPair,
    batches: list[Batch],
    options: Options,
    workspace: Workspace | None,
    processes: Processes,
    show_progress: bool,
) -> tuple[list[BlockResult], list[Recipe]]:
    d_model = pair.base_runner.embed(batches[0]).shape[-1]
    recipes = recipes_for(pair.branches, d_model)
    parts_reader = _parts_reader(pair, min(batches, key=lambda batch: batch.n_tokens))
    release_freed()
    blocks = workspace.passed() if workspace else []
    march = March(
        pair.base_runner,
        pair.tuned_runner,
        batches,
        pair.branches,
        extra=(MLP_INPUT,) if parts_reader else (),
        forced_extra=SUBLAYER_STATES if parts_reader and parts_reader.has_sublayers else (),
        steered={r.name: r.location for r in recipes if r.fit == "sequential"},
        own=_own(batches, processes),
        folder=workspace.streams if workspace else None,
        start=len(blocks),
    )
    left = (pair.n_layers - len(blocks)) * len(march.own or ())
    with progress(f"marching through {pair.n_layers} blocks", left, show_progress) as advance:
        for found in survey(
            march,
            pair.branches,
            recipes,
            parts_reader,
            (options.sample, options.shared_sample),
            pair.dtype,
            advance,
            workspace.keep if workspace else None,
            processes,
            options.sketch,
        ):
            blocks.append(found)
            if workspace:
                workspace.finished(found)
            release_freed()
    return blocks, recipes


def _own(batches: Sequence[Batch], processes: Processes) -> list[int]:
    """This process's batches; the first process begins with one that all statistics can see."""
    lead = next(i for i, b in enumerate(batches) if not b.held_out and b.counted.any())
    return processes.shares([batch.ids.numel() for batch in batches], lead)


def _parts_reader(pair: ModelPair, batch: Batch) -> BlockPartsReader | None:
    """The MLPs as matrices, or None, with the reason kept, where there are none to read.

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


def _candidates(blocks: list[BlockResult], recipes: list[Recipe]) -> list[Candidate]:
    everywhere = {
        recipe: Adapters(recipe.location, {b.layer: b.adapters[recipe] for b in blocks}, recipe.fit)
        for recipe in recipes
    }
    candidates = [Candidate.of(adapters) for adapters in everywhere.values()]
    if SINGLE in everywhere:
        candidates += [Candidate.of(everywhere[SINGLE], block.layer) for block in blocks]
    return candidates


def _rank_search(
    pair: ModelPair, documents: list[Any], options: Options, show_progress: bool
) -> RankSearch:
    assert options.max_kl is not None
    return smallest_ranks(
        pair,
        documents,
        options.max_kl,
        options.max_length,
        options.new_tokens,
        options.max_prompts,
        options.seed,
        show_progress,
    )


def _checks(
    pair: ModelPair,
    tables: dict[str, Table],
    batches: list[Batch],
    evaluation: Evaluation,
    noise: Noise,
) -> list[Check]:
    n_fit = sum(int(b.counted.sum()) for b in batches if not b.held_out)
    d_model = pair.base_runner.embed(batches[0]).shape[-1]
    frame = tables["spectrum"].frame
    unavailable = [
        Check(f"location {name}", "not applicable", reason)
        for name, reason in pair.unavailable.items()
    ]
    return [
        check_tokens(n_fit, d_model),
        check_noise(frame, noise.table.frame, noise.reason),
        check_oracle(evaluation.divergences[ORACLE, "tuned"]),
        check_upstream(frame, first_changed_block(pair)),
        *pair.checks,
        *unavailable,
    ]

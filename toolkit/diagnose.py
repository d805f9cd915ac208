"""The main job: march, analyse, put fitted maps in the oracle's place, recommend."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from toolkit.analysis.linear_fit import ranks_below
from toolkit.block_sums import MLP_INPUT, TAIL_STATES
from toolkit.checks import Check
from toolkit.documents import Batch, Encoded, encode_all, make_batches
from toolkit.errors import InputError
from toolkit.heap import release_freed
from toolkit.insides import Insides
from toolkit.lapack import quiet_openblas
from toolkit.locations import BRANCHES
from toolkit.lockstep import March
from toolkit.noise import Noise, measure_noise, some_of
from toolkit.pair import ModelPair
from toolkit.progress import progress
from toolkit.provenance import Stages, describe_run
from toolkit.rank_set import RankSet, smallest_ranks
from toolkit.recommend import recommend
from toolkit.replacement import ORACLE, Candidate, Evaluation, evaluate, n_comparisons
from toolkit.run import Options, Run
from toolkit.steerability import describe_choice, make_tables, samples
from toolkit.steering import Adapters
from toolkit.survey import BlockSurvey, Recipe, survey
from toolkit.table import Table
from toolkit.validity import (
    check_noise,
    check_oracle,
    check_sketch,
    check_tokens,
    check_upstream,
    first_changed_block,
)
from toolkit.weight_side import weight_rows
from toolkit.workspace import Workspace
from toolkit.world import ALONE, World

# What is fitted, and put in place of the oracle in all blocks; DESIGN names the ranks.
FORCED = [Recipe(location, rank, "forced") for location in BRANCHES for rank in (0, 8, 32)]
SEQUENTIAL = [Recipe("post_block", rank, "sequential") for rank in (0, 8, 32)]
SEQUENTIAL += [Recipe("pre_mlp", 8, "sequential"), Recipe("post_mlp", 8, "sequential")]
FREE = [Recipe("post_block", rank, "free") for rank in (0, 8, 32, "full")]
SINGLE = Recipe("post_block", 8, "free")  # also tried in each block alone


def diagnose(
    pair: ModelPair,
    documents: Iterable[Any],
    options: Options | None = None,
    *,
    show_progress: bool = True,
    workspace: Workspace | None = None,
    world: World = ALONE,
) -> Run:
    """Find where, and with how small an adapter, steering does what fine-tuning did to `pair`.

    `documents` are mappings with ``text``, or ``prompt`` and ``response`` (or plain strings).
    Maps are fitted on four documents in five and judged on the others. An open `workspace` keeps
    what is finished and gives what an interrupted run finished. The processes of `world` share the
    work, and each returns the whole run. Raises InputError where the documents do not suffice.
    """
    options, stages = options or Options(), Stages()
    show_progress &= world.first
    with torch.no_grad(), quiet_openblas():
        documents = list(documents)
        encoded = encode_all(documents, pair.tokenizer, options.max_length)
        batches = _batches(pair, encoded, options)
        with stages.stage("noise"):
            few = _batched(pair, some_of(encoded, options.positions), options, together=True)
            noise = measure_noise(pair.base_blocks, few[0], pair.branches)
        with stages.stage("march"):
            blocks, recipes = _march(pair, batches, options, workspace, world, show_progress)
        release_freed()
        candidates = _candidates(blocks, recipes)
        asked = [d for d in encoded if d.held_out][: options.max_prompts]
        prompts = [document.prompt_ids for document in asked]
        with stages.stage("replacement"):
            n_steps = n_comparisons(len(prompts), len(candidates), world)
            with progress("putting fits in place of tuning", n_steps, show_progress) as advance:
                evaluation = evaluate(
                    pair,
                    prompts,
                    candidates,
                    options.new_tokens,
                    advance=advance,
                    kept=workspace.outcomes if workspace else None,
                    world=world,
                )
        with stages.stage("checks"):
            rows = weight_rows(pair.base_blocks, pair.tuned_blocks, world)
            tables = make_tables(pair, blocks, candidates, evaluation, rows)
            tables["noise"] = noise.table
            checks = _checks(pair, tables, batches, evaluation, noise)
            if options.sketch:
                shares = [row for block in blocks for row in block.rows["sketch"]]
                checks.append(check_sketch(options.sketch, shares))
        rank_set = None
        if options.max_kl is not None:
            with stages.stage("rank set"):
                rank_set = world.from_first(
                    lambda: _rank_set(pair, documents, options, show_progress)
                )
    choice = recommend(candidates, evaluation)
    return Run(
        **tables,
        recommendation=describe_choice(choice, pair, evaluation),
        adapters=choice.chosen.adapters if choice else None,
        samples=samples(pair, asked, choice, evaluation),
        checks=checks,
        info=describe_run(pair, options, encoded, batches, prompts, stages, noise.summary),
        rank_set=rank_set,
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
    world: World,
    show_progress: bool,
) -> tuple[list[BlockSurvey], list[Recipe]]:
    d_model = pair.base_blocks.embed(batches[0]).shape[-1]
    recipes = recipes_for(pair.branches, d_model)
    insides = _insides(pair, min(batches, key=lambda batch: batch.n_tokens))
    release_freed()
    blocks = workspace.passed() if workspace else []
    march = March(
        pair.base_blocks,
        pair.tuned_blocks,
        batches,
        pair.branches,
        extra=(MLP_INPUT,) if insides else (),
        forced_extra=TAIL_STATES if insides and insides.has_tails else (),
        steered={r.name: r.location for r in recipes if r.fit == "sequential"},
        own=_own(batches, world),
        folder=workspace.streams if workspace else None,
        start=len(blocks),
    )
    left = (pair.n_layers - len(blocks)) * len(march.own or ())
    with progress(f"marching through {pair.n_layers} blocks", left, show_progress) as advance:
        for found in survey(
            march,
            pair.branches,
            recipes,
            insides,
            (options.sample, options.shared_sample),
            pair.dtype,
            advance,
            workspace.keep if workspace else None,
            world,
            options.sketch,
        ):
            blocks.append(found)
            if workspace:
                workspace.finished(found)
            release_freed()
    return blocks, recipes


def recipes_for(branches: tuple[str, ...], d_model: int) -> list[Recipe]:
    """The adapters that a run fits to a model of width `d_model` with the locations `branches`."""
    return [
        recipe
        for recipe in (*FORCED, *SEQUENTIAL, *FREE)
        if recipe.location in branches and recipe.rank in ranks_below(d_model)
    ]


def _own(batches: Sequence[Batch], world: World) -> list[int]:
    """This process's batches; the first process begins with one that all statistics can see."""
    lead = next(i for i, b in enumerate(batches) if not b.held_out and b.counted.any())
    return world.shares([batch.ids.numel() for batch in batches], lead)


def _insides(pair: ModelPair, batch: Batch) -> Insides | None:
    """The MLPs as matrices, or None, with the reason kept, where there are none to read.

    With them, where a family has one, the path from the attention branch through each.
    """
    if MLP_INPUT in pair.missing:
        return None
    try:
        found = Insides(pair, batch)
    except ValueError as error:
        pair.missing["mlp"] = " ".join(str(error).split())
        return None
    if not found.has_tails and "pre_mlp" not in pair.missing:
        pair.missing["tail"] = found.no_tails
    return found


def _candidates(blocks: list[BlockSurvey], recipes: list[Recipe]) -> list[Candidate]:
    everywhere = {
        recipe: Adapters(recipe.location, {b.layer: b.adapters[recipe] for b in blocks}, recipe.fit)
        for recipe in recipes
    }
    candidates = [Candidate.of(adapters) for adapters in everywhere.values()]
    if SINGLE in everywhere:
        candidates += [Candidate.of(everywhere[SINGLE], block.layer) for block in blocks]
    return candidates


def _rank_set(
    pair: ModelPair, documents: list[Any], options: Options, show_progress: bool
) -> RankSet:
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
    d_model = pair.base_blocks.embed(batches[0]).shape[-1]
    frame = tables["spectrum"].frame
    missing = [
        Check(f"location {name}", "not applicable", reason) for name, reason in pair.missing.items()
    ]
    return [
        check_tokens(n_fit, d_model),
        check_noise(frame, noise.table.frame, noise.reason),
        check_oracle(evaluation.divergences[ORACLE, "tuned"]),
        check_upstream(frame, first_changed_block(pair)),
        *pair.checks,
        *missing,
    ]

"""An evaluation as tables, a recommendation in words' raw material, and sample answers."""

import math
from dataclasses import asdict
from typing import Any

from toolkit.analysis.divergence import Divergences, recovered
from toolkit.diagnosis.close_look import CloseLook
from toolkit.documents.tokens import Encoded
from toolkit.evaluation.candidates import NONE, ORACLE, Candidate
from toolkit.evaluation.compare import Evaluation
from toolkit.evaluation.intervals import difference_interval, recovered_interval
from toolkit.evaluation.recommend import Recommendation
from toolkit.fitting.block_result import BlockResult
from toolkit.models.generation import end_tokens, greedy, make_prompts, prefill
from toolkit.models.locations import causal_lm
from toolkit.models.pair import ModelPair
from toolkit.tables.spec import specs
from toolkit.tables.table import Table

N_SAMPLES = 3


def make_tables(
    pair: ModelPair,
    blocks: list[BlockResult],
    candidates: list[Candidate],
    evaluation: Evaluation,
    weights: list[dict[str, Any]],
) -> dict[str, Table]:
    """All of the run's tables, by name."""
    names = [n for n in specs() if n not in ("sequential_kl", "steerability", "weights")]
    tables = {
        name: Table.of(name, [row for block in blocks for row in block.rows.get(name, [])])
        for name in names
    }
    tables["sequential_kl"] = Table.of("sequential_kl", curves(candidates, evaluation))
    shown = [NONE, ORACLE, *candidates]
    rows = [_steerability(candidate, evaluation, pair.n_parameters) for candidate in shown]
    tables["steerability"] = Table.of("steerability", rows)
    tables["weights"] = Table.of("weights", weights)
    return tables


def curves(candidates: list[Candidate], evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the rows of the table ``sequential_kl``: no steering, the oracle and `candidates`."""
    return [
        {**_labels(candidate), "forcing": forcing, "token_index": index, "kl_mean": mean,
         "kl_sem": sem, "n_prompts": n, "target": candidate.target}
        for candidate in (NONE, ORACLE, *candidates)
        for forcing in ("tuned", "own")
        if (candidate, forcing) in evaluation.divergences
        for index, mean, sem, n in evaluation.divergences[candidate, forcing].curve()
    ]  # fmt: skip


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
        "target": candidate.target,
    }


def describe_choice(
    choice: Recommendation | None, pair: ModelPair, evaluation: Evaluation, look: CloseLook
) -> dict[str, Any] | None:
    """Describe a recommendation as the report keeps it, with the rows of what stands beside it.

    Rows are those of the table ``steerability``, over all prompts; ``lower`` is what the prompts
    that choose show, and ``reported`` what `look` found on those that report.
    """
    if choice is None:
        return None

    def described(candidate: Candidate) -> dict[str, Any]:
        row = _steerability(candidate, evaluation, pair.n_parameters)
        return {k: v for k, v in row.items() if not k.startswith("kl_own")}

    return {
        **described(choice.chosen),
        "lower": choice.lower,
        "n_choosing": choice.n_prompts,
        "asked": choice.target,
        "reached": choice.reached,
        "n_candidates": choice.n_candidates,
        "best": described(choice.best),
        "smaller": described(choice.smaller) if choice.smaller else None,
        "runner_up": described(choice.runner_up) if choice.runner_up else None,
        "reported": _reported(choice, look),
    }


def _reported(choice: Recommendation, look: CloseLook) -> dict[str, Any]:
    """Return what the reporting prompts say of the chosen, and of it beside the runner-up."""
    found = look.evaluation.divergences
    base, chosen = found[NONE, "tuned"], found[choice.chosen, "tuned"]
    interval = recovered_interval(chosen, base)
    beside = choice.runner_up and difference_interval(
        chosen, found[choice.runner_up, "tuned"], base
    )
    return {
        **_known(asdict(interval)),
        "apart": look.apart,
        "kl": chosen.mean,
        "base_kl": base.mean,
        "half_width_of_four_times": interval.half_width_with(4 * interval.n),
        "more_than_runner_up": _known(asdict(beside)) if beside else None,
    }


def _known(numbers: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers with None for NaN, as they are in JSON: one prompt has no interval."""
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}


def samples(
    pair: ModelPair,
    asked: list[Encoded],
    choice: Recommendation | None,
    evaluation: Evaluation,
    n_new: int,
) -> list[dict[str, str]]:
    """Return the first prompts, `asked`, with what base, steered and tuned model say to them."""
    said: dict[str, list[list[int]]] = {"base": evaluation.tokens[NONE]}
    if choice and choice.chosen.layers == "all":
        known = evaluation.tokens.get(choice.chosen)
        said["steered"] = known or _answers(pair, asked, choice.chosen, n_new)
    said["tuned"] = evaluation.tokens[None]
    decode = lambda ids: pair.tokenizer.decode(ids, skip_special_tokens=True).strip()  # noqa: E731
    return [
        {
            "prompt": document.prompt or decode(document.prompt_ids),
            **{who: decode(rows[i]) for who, rows in said.items()},
        }
        for i, document in enumerate(asked)
    ]


def _answers(
    pair: ModelPair, asked: list[Encoded], candidate: Candidate, n_new: int
) -> list[list[int]]:
    """Return the steered model's greedy tokens for each prompt."""
    prompts = make_prompts([document.prompt_ids for document in asked], pair.pad_id, pair.device)
    ends = end_tokens(causal_lm(pair.tuned), pair.tokenizer)
    with candidate.attached(pair.base, pair.base_runner.sites):
        found, _ = greedy(pair.base, prompts, prefill(pair.base, prompts), n_new, ends)
    return found.tokens

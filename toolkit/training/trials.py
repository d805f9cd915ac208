"""Short trainings of adapters at every place and size, on the responses of documents.

Without a fine-tune there is no delta to look at. What a few steps of training take off the loss of
held-out responses is an estimate of what a longer training would: of all cheap signals in the study
of ``docs/validity.md``, short trainings alone were no worse than the number of parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from toolkit.analysis.divergence import Divergences
from toolkit.documents.batches import Batch
from toolkit.documents.tokens import Encoded
from toolkit.evaluation.intervals import recovered_interval
from toolkit.evaluation.response_loss import excess, response_losses
from toolkit.models.locations import Sites
from toolkit.training.distillation import RATE
from toolkit.training.examples import NOT_SUPERVISED
from toolkit.training.methods import Method, adapted
from toolkit.training.trainer import TrainingOptions, train

PLACES = ("heads", "pre_mlp", "post_mlp", "post_block")
RANKS = (1, 8)
LORA = Method("LoRA r=8", "lora", rank=8)  # beside them: what weights do in as many steps
LORA_RATE = 1e-3
BASE = Method("base", "none")


@dataclass(frozen=True)
class Trial:
    """Hold one short training: losses on the responses of documents that choose and that report.

    Losses are nats at each token. Where there are too few documents to be split, all do both.
    """

    method: Method
    parameters: int
    choosing: Divergences
    reporting: Divergences


def trial_methods(unavailable: Mapping[str, str]) -> list[Method]:
    """Return a vector, rank 1 and rank 8 at each place that the model has, and a LoRA.

    A vector after the MLP is the same adapter as one after the block, and stands there alone.
    """
    found = []
    for place in PLACES:
        if place in unavailable:
            continue
        if place != "post_mlp":
            found.append(Method(f"{place} vector", "vector", place))
        with_bias = {"bias": True}
        found += [
            Method(f"{place} r={rank}", "linear", place, rank, options=with_bias) for rank in RANKS
        ]
    return [*found, LORA]


def rate_of(method: Method, width: int) -> float:
    """Return the learning rate of a short training: what distillation takes, or LoRA's."""
    return LORA_RATE if method.family == "lora" else RATE / width


def training_rows(documents: Sequence[Encoded]) -> list[dict[str, list[int]]]:
    """Return documents as supervised examples: the tokens of their responses are labels."""
    rows = [(list(d.ids), d.response_start or 0) for d in documents if has_response(d)]
    return [
        {"input_ids": ids, "labels": [NOT_SUPERVISED] * start + ids[start:]} for ids, start in rows
    ]


def has_response(document: Encoded) -> bool:
    """Tell whether tokens of a response are left of `document`, which may be cut before them."""
    return document.response_start is not None and document.response_start < len(document.ids)


@dataclass(frozen=True)
class TrialBench:
    """Hold what trials share: the base model, rows to train on, and held-out batches that judge."""

    base: nn.Module
    sites: Sites
    rows: Sequence[dict[str, list[int]]]
    choosing: Sequence[Batch]
    reporting: Sequence[Batch]
    pad_id: int

    def run(
        self, method: Method, options: TrainingOptions, keep: Path, show_progress: bool = False
    ) -> Trial:
        """Train one method and judge it on all held-out responses; its adapters are in `keep`."""
        with adapted(self.base, method, self.sites, options.seed) as found:
            if found.trainee is not None:
                train(found.trainee, self.rows, options, self.pad_id, None, show_progress)
            if found.adapters is not None:
                replace(found.adapters, fit="trained").save_pretrained(keep)
            choosing, reporting = (
                response_losses(found.model, side) for side in (self.choosing, self.reporting)
            )
        return Trial(method, found.parameters, choosing, reporting)


def smallest_with(trials: Sequence[Trial], base: Trial, share: float) -> Trial | None:
    """Return the smallest steering trial that gains `share` of the most that any trial gains.

    On the documents that choose. The one that gains most where none does; None where none gains. A
    training whose loss is no number gains nothing.
    """
    losses = {t.method: excess(base.choosing, t.choosing).mean for t in trials}
    gains = {method: gain if math.isfinite(gain) else -math.inf for method, gain in losses.items()}
    steering = [t for t in trials if t.method.family == "steering"]
    best = max(steering, key=lambda t: gains[t.method])
    if gains[best.method] <= 0:
        return None
    enough = [t for t in steering if gains[t.method] >= share * max(gains.values())]
    return min(enough, key=lambda t: (t.parameters, -gains[t.method]), default=best)


def most_of(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the least loss on the documents that choose."""
    return min(trials, key=lambda t: t.choosing.mean)


def trial_row(trial: Trial, base: Trial, most: Trial, n_parameters: int) -> dict[str, Any]:
    """Return a trial's row: loss, gain over `base`, and its share of what `most` gains.

    On the documents that report, in nats a token; the share has a 95 % interval over documents.
    """
    gain = excess(base.reporting, trial.reporting)
    share = recovered_interval(
        excess(trial.reporting, most.reporting), excess(base.reporting, most.reporting)
    )
    method = trial.method
    return {
        "method": method.name,
        "location": method.location,
        "kind": method.kind,
        "rank": method.rank,
        "parameters": trial.parameters,
        "parameters_percent": 100 * trial.parameters / n_parameters,
        "loss": trial.reporting.mean,
        "loss_sem": trial.reporting.sem,
        "gain": gain.mean,
        "gain_sem": gain.sem,
        "share": share.estimate,
        "share_low": share.low,
        "share_high": share.high,
        "n_documents": len(gain.nats),
    }

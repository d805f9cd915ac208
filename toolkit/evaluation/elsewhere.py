"""What fine-tuning and steering do to prompts that the fine-tune is not about."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from toolkit.analysis.divergence import Divergences, Predictions
from toolkit.evaluation.intervals import recovered_interval
from toolkit.evaluation.named_models import BASE, TUNED, NamedModels
from toolkit.evaluation.reference import PromptBatch, Reference
from toolkit.models.generation import continuation_logits, prefill
from toolkit.runtime.processes import ALONE, Processes

Distances = dict[tuple[str, str], Divergences]


@torch.no_grad()
def elsewhere_rows(
    models: NamedModels, references: Mapping[str, Reference], processes: Processes = ALONE
) -> list[dict[str, Any]]:
    """Return the rows of the table ``elsewhere``: each model's distances from tuned and from base.

    `references` are the tuned model's greedy continuations of some prompts, by their file's name.
    All `processes` share the batches of prompts.
    """
    places = [(file, batch) for file, found in references.items() for batch in found.batches]
    found = processes.spread(
        [partial(distances, models, batch) for _, batch in places],
        [
            batch.prompts.ids.numel() + batch.prompts.ids.shape[0] * batch.n_new
            for _, batch in places
        ],
    )
    rows = []
    for file, reference in references.items():
        parts = [part for (name, _), part in zip(places, found, strict=True) if name == file]
        whole = {key: reference.joined([part[key] for part in parts]) for key in parts[0]}
        rows += [{"file": file, **_row(name, whole)} for name in models]
    return rows


def distances(models: NamedModels, batch: PromptBatch) -> Distances:
    """Return KL(tuned ‖ x) and KL(base ‖ x) along the tuned model's tokens, for each model x.

    The keys are (tuned, x) and (base, x), with x the model's name.
    """
    found: Distances = {}
    counted = batch.generated.counted.cpu()
    base = Predictions(base_logits := _logits(models, BASE, batch))
    for name in models:
        logits = base_logits if name == BASE else _logits(models, name, batch)
        for origin, predictions in ((TUNED, batch.read), (BASE, base)):
            found[origin, name] = Divergences(predictions.divergence(logits).cpu(), counted)
    batch.release()
    return found


def _logits(models: NamedModels, name: str, batch: PromptBatch) -> torch.Tensor:
    with models[name]() as model:
        start = prefill(model, batch.prompts)
        return continuation_logits(model, batch.prompts, start, batch.generated)


def _row(name: str, found: Distances) -> dict[str, Any]:
    kl, from_base = found[TUNED, name], found[BASE, name]
    share = recovered_interval(kl, found[TUNED, BASE])
    return {
        "model": name,
        "kl": kl.mean,
        "kl_sem": kl.sem,
        "kl_base": from_base.mean,
        "kl_base_sem": from_base.sem,
        "recovered": share.estimate,
        "recovered_sem": share.sem,
        "recovered_low": share.low,
        "recovered_high": share.high,
        "n_prompts": share.n,
        "n_tokens": int(kl.counted.sum()),
    }

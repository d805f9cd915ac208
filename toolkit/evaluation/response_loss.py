"""What each model loses on the responses that documents hold, with nothing generated."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.analysis.divergence import Divergences, recovered
from toolkit.documents.batches import Batch
from toolkit.documents.corpus import Corpus
from toolkit.documents.tokens import Encoded
from toolkit.evaluation.named_models import BASE, TUNED, NamedModels, each_model
from toolkit.runtime.processes import ALONE, Processes

TOKENS_AT_ONCE = 512  # whose logits are held, each as large as the vocabulary


@torch.no_grad()
def response_loss_rows(
    models: NamedModels,
    corpus: Corpus,
    documents: Sequence[Encoded],
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Return the rows of the table ``response_loss``: each model's loss on the responses.

    `documents` are of `corpus`; those that are texts have no response and are left out. All
    `processes` share the models.
    """
    batches = response_batches(corpus, documents)
    if not any(bool(batch.counted.any()) for batch in batches):
        return []
    losses = each_model(models, lambda _, model: response_losses(model, batches), processes)
    return [_row(name, losses) for name in losses]


def response_batches(corpus: Corpus, documents: Sequence[Encoded]) -> list[Batch]:
    """Return those of `documents` that have a response in batches, in which its tokens count."""
    answered = tuple(found for found in documents if found.response_start is not None)
    return replace(
        corpus, encoded=answered, positions="response", batch_tokens=TOKENS_AT_ONCE
    ).batches


def response_losses(model: nn.Module, batches: Sequence[Batch]) -> Divergences:
    """Return −log p of every counted token in nats, `[n_documents, length]`; 0 where none counts.

    Documents without a counted token are left out.
    """
    width = max(batch.ids.shape[1] for batch in batches)
    nats, counted = [], []
    for batch in batches:
        for loss, counts in _losses(model, batch):
            nats.append(nn.functional.pad(loss, (1, width - len(counts))))
            counted.append(nn.functional.pad(counts, (0, width - len(counts))))
    return Divergences(torch.stack(nats), torch.stack(counted))


def _losses(model: nn.Module, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Return −log p of each document's tokens after the first, `[length − 1]`, and which count.

    When this returns, nothing holds the logits.
    """
    mask = batch.mask.long()
    logits = model(input_ids=batch.ids, attention_mask=mask, use_cache=False).logits
    found = []
    for row, ids, counts in zip(logits, batch.ids, batch.counted, strict=True):
        if counts.any():
            # Row by row: a batch's vocabularies in float64 would be larger than the models.
            loss = -_log_p(row[:-1], ids[1:]) * counts[1:]
            found.append((loss.cpu(), counts.cpu()))
    return found


def _log_p(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def _row(name: str, losses: dict[str, Divergences]) -> dict[str, Any]:
    loss, tuned = losses[name], losses[TUNED]
    above, gap = excess(loss, tuned), excess(losses[BASE], tuned)
    # What is closed of the gap has the form of `recovered`, with losses for divergences.
    closes = gap.mean > 0
    closed, sem = recovered(above, gap) if closes else (float("nan"), float("nan"))
    return {
        "model": name,
        "loss": loss.mean,
        "loss_sem": loss.sem,
        "difference": above.mean,
        "difference_sem": above.sem,
        "closed": closed,
        "closed_sem": sem,
        "n_documents": len(loss.nats),
        "n_tokens": int(loss.counted.sum()),
    }


def excess(loss: Divergences, other: Divergences) -> Divergences:
    """Return what `loss` is above `other` at each token, `[n_documents, length]`."""
    return Divergences(loss.nats - other.nats, loss.counted)

"""The loss on responses against torch's cross entropy, each document by itself."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from tests.support import tiny
from tests.support.live_bytes import LiveBytes
from tests.support.steering import random_adapters
from toolkit.adapters.attach import steer
from toolkit.evaluation.response_loss import (
    response_batches,
    response_loss_rows,
    response_losses,
)


def plain(model, document):
    """Sum of the cross entropy over a document's response, and its tokens."""
    ids = torch.tensor([document.ids])
    start = max(document.response_start, 1)
    logits = model(input_ids=ids).logits[0, start - 1 : -1].double()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum")
    return float(loss), ids.shape[1] - start


@contextmanager
def put(model, context):
    """The model, in its context."""
    with context():
        yield model


@torch.no_grad()
def test_losses_are_those_of_plain_passes(llama_pair):
    corpus = llama_pair.corpus(tiny.make_documents(60))
    adapters = random_adapters("post_block")
    contexts = {
        "base": (llama_pair.base, nullcontext),
        "tuned": (llama_pair.tuned, nullcontext),
        "recommended": (llama_pair.base, lambda: steer(llama_pair.base, adapters)),
    }
    answered = [d for d in corpus.held_out if d.response_start is not None]
    assert 2 < len(answered) < len(corpus.held_out)
    sums = {}
    for name, (model, context) in contexts.items():
        with context():
            sums[name] = torch.tensor([plain(model, d) for d in answered], dtype=torch.float64)
    named = {name: lambda found=found: put(*found) for name, found in contexts.items()}
    rows = response_loss_rows(named, corpus, corpus.held_out)
    tuned = sums["tuned"]
    gap = sums["base"][:, 0].sum() - tuned[:, 0].sum()
    for row, (name, found) in zip(rows, sums.items(), strict=True):
        total, n = found.sum(0).tolist()
        excess = found[:, 0] - tuned[:, 0]
        assert row["model"] == name
        assert row["n_documents"] == len(answered)
        assert row["n_tokens"] == n
        assert row["loss"] == pytest.approx(total / n, rel=1e-9)
        assert row["difference"] == pytest.approx(float(excess.sum()) / n, rel=1e-9, abs=1e-12)
        closed = 1 - float(excess.sum() / gap) if gap > 0 else float("nan")
        assert row["closed"] == pytest.approx(closed, rel=1e-9, abs=1e-12, nan_ok=True)
        residual = excess - excess.sum() / n * found[:, 1]
        k = len(answered)
        sem = (k / (k - 1) * residual.square().sum()).sqrt() / n
        assert row["difference_sem"] == pytest.approx(float(sem), rel=1e-9, abs=1e-12)


def test_texts_have_no_responses(llama_pair):
    corpus = llama_pair.corpus([{"text": f"w{i} w7 w9 w11"} for i in range(5, 25)])
    models = {name: lambda: nullcontext(llama_pair.base) for name in ("base", "tuned")}
    assert response_loss_rows(models, corpus, corpus.held_out) == []


@torch.no_grad()
def test_no_batchs_logits_are_held_beside_the_nexts(llama_pair):
    corpus = llama_pair.corpus(tiny.make_documents(24))
    batch = response_batches(corpus, corpus.encoded)[0]
    with LiveBytes() as once:
        response_losses(llama_pair.base, [batch])
    with LiveBytes() as thrice:
        response_losses(llama_pair.base, [batch] * 3)
    logits = batch.ids.numel() * tiny.N_VOCABULARY * llama_pair.dtype.itemsize
    assert once.peak > logits
    assert thrice.peak - once.peak < 0.5 * logits

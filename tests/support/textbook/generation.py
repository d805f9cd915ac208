"""Greedy generation, divergences and their means and standard errors."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tests.support.textbook.definitions import Array


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(tuned_logits: Array, logits: Array) -> Array:
    """``Σ p log(p / q)`` over the last axis."""
    p, q = log_softmax(tuned_logits), log_softmax(logits)
    return np.sum(np.exp(p) * (p - q), -1)


def greedy(
    logits_of: Callable[[list[int]], Array], prompt: Sequence[int], n_new: int, ends: set[int]
) -> tuple[list[int], Array]:
    """Continue `prompt` token by token, rereading everything, to an end or to `n_new` tokens.

    The tokens, and the logits `[n, v]` that chose them.
    """
    ids, chosen_by = list(prompt), []
    while len(chosen_by) < n_new and not (chosen_by and ids[-1] in ends):
        chosen_by.append(logits_of(ids)[-1])
        ids.append(int(np.argmax(chosen_by[-1])))
    return ids[len(prompt) :], np.array(chosen_by)


def curve(nats: Sequence[Array]) -> Iterator[dict[str, Any]]:
    """Mean and standard error over the prompts that reach each generated token index."""
    for index in range(max(len(n) for n in nats)):
        at = np.array([n[index] for n in nats if len(n) > index])
        sem = np.std(at, ddof=1) / np.sqrt(len(at)) if len(at) > 1 else np.nan
        yield {"token_index": index, "kl_mean": at.mean(), "kl_sem": sem, "n_prompts": len(at)}


def mean_nats(nats: Sequence[Array]) -> float:
    return float(np.concatenate(list(nats)).mean())


def ratio_sem(numerators: Array, denominators: Array) -> float:
    """Of ``Σ numerators / Σ denominators``: the delta method over independent prompts."""
    n, ratio = len(numerators), numerators.sum() / denominators.sum()
    residual = numerators - ratio * denominators
    return float(np.sqrt(n * np.var(residual, ddof=1)) / denominators.sum())

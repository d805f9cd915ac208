"""How often a model is right, with the uncertainty of having asked so many questions."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from toolkit.documents.corpus import pad_token
from toolkit.documents.documents import Document
from toolkit.documents.tasks.task import Example, Task
from toolkit.documents.tokens import encode
from toolkit.models.generation import WITHOUT_CACHE, end_tokens, make_prompts
from toolkit.models.locations import causal_lm, n_embeddings

RESAMPLES = 2000


@torch.no_grad()
def answers(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    new_tokens: int,
    batch_size: int = 64,
    advance: Callable[[], None] = lambda: None,
) -> list[str]:
    """Return what `model` says greedily to each prompt, up to the end of sequence."""
    prompts = prompts_of(tokenizer, examples)
    language_model = causal_lm(model)
    pad_id = pad_token(tokenizer, n_embeddings(language_model))
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=pad_id,
        eos_token_id=list(end_tokens(model, tokenizer)),
        use_cache=language_model not in WITHOUT_CACHE,
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    said: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = make_prompts([prompts[i] for i in rows], pad_id, language_model.device)
        found = language_model.generate(
            input_ids=batch.ids, attention_mask=batch.mask.long(), generation_config=settings
        )
        texts = tokenizer.batch_decode(found[:, batch.ids.shape[1] :], skip_special_tokens=True)
        said |= dict(zip(rows, texts, strict=True))
        advance()
    return [said[index] for index in range(len(prompts))]


def prompts_of(tokenizer: Any, examples: Sequence[Example]) -> list[tuple[int, ...]]:
    """Return the tokens that a model is given to answer each example."""
    asked = [Document(prompt=example.prompt, response=".") for example in examples]
    return [encode(document, tokenizer, sys.maxsize).prompt_ids for document in asked]


def correct(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    batch_size: int = 64,
    advance: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Return whether `model` answers each example of `task` rightly, bool `[n]`."""
    said = answers(model, tokenizer, examples, task.new_tokens, batch_size, advance)
    return np.array([task.correct(text, e) for text, e in zip(said, examples, strict=True)])


def share_right(right: np.ndarray, among: np.ndarray) -> tuple[float, int]:
    """Return which share is `right` of the questions `among`, and their number; NaN of none.

    Both are bool `[n_questions]`.
    """
    n = int(among.sum())
    return (float(right[among].mean()) if n else math.nan), n


def merit(accuracy: float, loss: float) -> tuple[float, float]:
    """What chooses a learning rate: accuracy, then loss; a loss that is no number comes last."""
    return accuracy, -loss if math.isfinite(loss) else -math.inf


def bootstrap(right: np.ndarray, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `right`, `[n_questions]` or `[seeds, n]`.

    Questions are drawn again; with several seeds, seeds too, so that the interval covers both. Of
    the differences of two models on the same questions it is their paired interval.
    """
    right = np.atleast_2d(np.asarray(right, dtype=float))
    rng = np.random.default_rng(seed)
    n_seeds, n = right.shape
    means = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        rows = right[rng.integers(0, n_seeds, n_seeds)]
        means[index] = rows[:, rng.integers(0, n, n)].mean()
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)

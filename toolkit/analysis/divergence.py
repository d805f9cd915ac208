"""How far a model's generations are from the tuned model's, token by token.

``KL(tuned ‖ x)`` in nats at each generated token index, on held-out prompts. Along a continuation
that is sampled from p, the sum of ``KL(p ‖ q)`` over its tokens is an unbiased estimate of the
divergence of whole continuations (the chain rule: Cover and Thomas 2006, theorem 2.5.3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR_NATS = 1e-6  # a token: a KL below it is rounding


@dataclass(frozen=True)
class Divergences:
    """KL(tuned ‖ x) of every generated token: `nats` float64 and `counted` bool, `[n, n_new]`.

    n is the number of prompts. Other distances of two predictions are summed up in the same way.
    """

    nats: Tensor
    counted: Tensor

    @property
    def by_prompt(self) -> tuple[Tensor, Tensor]:
        """The sum over each prompt's counted tokens, and their number; each `[n]`."""
        return (self.nats * self.counted).sum(1), self.counted.sum(1).double()

    @property
    def mean(self) -> float:
        """Over all counted tokens."""
        total, count = self.by_prompt
        return float(total.sum() / count.sum())

    @property
    def sem(self) -> float:
        """Standard error of `mean` over prompts, which differ in length (ratio estimator)."""
        total, count = self.by_prompt
        return _ratio_sem(total, count)

    @property
    def per_sequence(self) -> tuple[float, float]:
        """The sum over a prompt's counted tokens, mean over prompts, and its standard error."""
        return mean_and_sem(self.by_prompt[0])

    @property
    def top_tenth(self) -> float:
        """The share of all nats that the tenth of the tokens with most of them holds.

        The tenth is rounded up; 0 where there are no nats.
        """
        nats = self.nats[self.counted].sort(descending=True).values
        total = float(nats.sum())
        return float(nats[: math.ceil(len(nats) / 10)].sum()) / total if total > 0 else 0.0

    def of_tokens(self, chosen: Tensor) -> "Divergences":
        """Return the divergences of the tokens `chosen`, bool `[n, n_new]`, alone."""
        return Divergences(self.nats, self.counted & chosen)

    def curve(self) -> list[tuple[int, float, float, int]]:
        """(token index, mean, standard error, prompts) for each index that some prompt reaches."""
        rows = []
        for index in range(self.nats.shape[1]):
            nats = self.nats[self.counted[:, index], index]
            if len(nats):
                rows.append((index, *mean_and_sem(nats), len(nats)))
        return rows

    def of_prompts(self, rows: Sequence[int]) -> "Divergences":
        """Return the divergences of the prompts `rows` alone, `[n_rows, n_new]`."""
        chosen = list(rows)
        return Divergences(self.nats[chosen], self.counted[chosen])

    @staticmethod
    def join(parts: list["Divergences"]) -> "Divergences":
        """Return the divergences of several batches of prompts."""
        return Divergences(
            torch.cat([p.nats for p in parts]), torch.cat([p.counted for p in parts])
        )


class Predictions:
    """A model's next-token distributions, kept as logarithms for many models to be held against.

    `logits` `[n, n_new, vocabulary]`. Held in float64: twice the size of float32 logits.
    """

    def __init__(self, logits: Tensor) -> None:
        self.log_p = [row.double().log_softmax(-1) for row in logits]

    def divergence(self, logits: Tensor) -> Tensor:
        """``KL(self ‖ softmax(logits))`` over the vocabulary, in nats, float64 `[n, n_new]`."""
        # Row by row: a batch's vocabularies in float64 would be larger than the models.
        return torch.stack([_divergence(p, x) for p, x in zip(self.log_p, logits, strict=True)])

    def total_variation(self, logits: Tensor) -> Tensor:
        """``½ Σ |p − q|`` of self and softmax(logits), from 0 to 1, float64 `[n, n_new]`."""
        pairs = zip(self.log_p, logits, strict=True)
        return torch.stack([(p.exp() - x.double().softmax(-1)).abs().sum(-1) / 2 for p, x in pairs])


def likely(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the `n` most likely next tokens, and their probabilities, `[n_prompts, n_new, n]`."""
    found = [row.double().softmax(-1).topk(min(n, row.shape[-1])) for row in logits]
    return torch.stack([f.indices for f in found]), torch.stack([f.values for f in found])


def kl_divergence(tuned_logits: Tensor, logits: Tensor) -> Tensor:
    """``KL(softmax(tuned) ‖ softmax(x))`` over the last dimension, in nats, float64."""
    return Predictions(tuned_logits).divergence(logits)


def _divergence(log_p: Tensor, logits: Tensor) -> Tensor:
    log_ratio = log_p - logits.double().log_softmax(-1)
    return torch.linalg.vecdot(log_p.exp(), log_ratio)


def recovered(steered: Divergences, base: Divergences) -> tuple[float, float]:
    """``1 − KL(tuned‖steered) / KL(tuned‖base)`` and its standard error over prompts.

    1: the tuned model is reproduced; 0: no better than no steering; 0 where base and tuned agree.
    """
    total, base_total = steered.by_prompt[0], base.by_prompt[0]
    if float(base_total.sum()) == 0:
        return 0.0, 0.0
    return 1 - float(total.sum() / base_total.sum()), _ratio_sem(total, base_total)


def recovered_difference(a: Divergences, b: Divergences, base: Divergences) -> tuple[float, float]:
    """`recovered` of `a` less that of `b`, and its standard error over the same prompts."""
    difference, base_total = b.by_prompt[0] - a.by_prompt[0], base.by_prompt[0]
    if float(base_total.sum()) == 0:
        return 0.0, 0.0
    return float(difference.sum() / base_total.sum()), _ratio_sem(difference, base_total)


def mean_and_sem(values: Tensor) -> tuple[float, float]:
    """Return the mean of `values` `[n]` and its standard error; of one value alone NaN."""
    sem = float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return float(values.mean()), sem


def _ratio_sem(numerator: Tensor, denominator: Tensor) -> float:
    """Standard error of ``Σ numerator / Σ denominator`` over independent prompts (delta method)."""
    n = len(numerator)
    if n < 2:
        return float("nan")
    ratio = numerator.sum() / denominator.sum()
    residual = numerator - ratio * denominator
    return float((n / (n - 1) * residual.square().sum()).sqrt() / denominator.sum().abs())

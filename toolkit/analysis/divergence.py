"""How far a model's generations are from the tuned model's, token by token.

``KL(tuned ‖ x)`` in nats at each generated token index, on held-out prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR_NATS = 1e-6  # a token: a KL below it is rounding


@dataclass(frozen=True)
class Divergences:
    """KL(tuned ‖ x) of every generated token: `nats` float64 and `counted` bool, `[n, n_new]`.

    n is the number of prompts.
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

    def curve(self) -> list[tuple[int, float, float, int]]:
        """(token index, mean, standard error, prompts) for each index that some prompt reaches."""
        rows = []
        for index in range(self.nats.shape[1]):
            nats = self.nats[self.counted[:, index], index]
            if len(nats):
                sem = float(nats.std() / len(nats) ** 0.5) if len(nats) > 1 else float("nan")
                rows.append((index, float(nats.mean()), sem, len(nats)))
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


def _ratio_sem(numerator: Tensor, denominator: Tensor) -> float:
    """Standard error of ``Σ numerator / Σ denominator`` over independent prompts (delta method)."""
    n = len(numerator)
    if n < 2:
        return float("nan")
    ratio = numerator.sum() / denominator.sum()
    residual = numerator - ratio * denominator
    return float((n / (n - 1) * residual.square().sum()).sqrt() / denominator.sum().abs())

"""Which tokens an adapter steers."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.errors import InputError
from toolkit.models.edits import steerable


@dataclass(frozen=True)
class Positions:
    """``all`` tokens, the ``last_prompt`` token, or ``first_last(k)``: k at each end of the prompt.

    Padding and each sequence's first token are left alone: its attention-sink state would be
    thrown off by maps made for other tokens. So the first k are tokens 1 to k. What a model
    generates is steered under ``all`` alone, and under ``every``, which is all with the first
    token: what weights do.
    """

    first: int | None = None
    last: int | None = None
    sink: bool = False

    @classmethod
    def parse(cls, text: "Positions | str") -> "Positions":
        """From ``all``, ``every``, ``last_prompt`` or, say, ``first_last(7)``."""
        if isinstance(text, Positions):
            return text
        if text in ("all", "every"):
            return cls(sink=text == "every")
        if text == "last_prompt":
            return cls(0, 1)
        if found := re.fullmatch(r"first_last\(([1-9]\d*)\)", text.replace(" ", "")):
            return cls(int(found[1]), int(found[1]))
        raise InputError(
            f"positions is {text!r}: expected all, every, last_prompt or first_last(k)"
        )

    def __str__(self) -> str:
        if self.first is None:
            return "every" if self.sink else "all"
        return "last_prompt" if self.first == 0 else f"first_last({self.first})"

    def of(self, mask: Tensor, prompt: Tensor) -> Tensor:
        """The tokens to steer, bool, of `mask` (tokens, not padding) and `prompt` (its tokens).

        Both are bool `[batch, length]`, padded on either side.
        """
        where = mask if self.sink else steerable(mask)
        if self.first is None or self.last is None:
            return where
        behind = prompt.cumsum(1)  # 1 for the first token of the prompt
        left = prompt.sum(1, keepdim=True) - behind  # 0 for the last
        return where & prompt & ((behind <= self.first + 1) | (left < self.last))

    def packed(self, mask: Tensor, starts: Tensor) -> Tensor:
        """Return the tokens to steer, bool, in rows of several sequences, begun at `starts`."""
        if self.first is not None:
            raise InputError(
                f"positions {self} cannot be told in rows that hold several sequences: run one "
                "sequence a row"
            )
        return mask if self.sink else mask & ~starts


def prompt_tokens(mask: Tensor, labels: Tensor | None, n_seen: int) -> Tensor:
    """Return which of the tokens that enter a model are the prompt's, bool `[batch, length]`.

    In training, what stands before the first supervised label; else all that a model reads before
    it has a cache: what it generates comes one by one.
    """
    if labels is not None:
        return mask & ((labels != -100).cumsum(1) == 0)
    return mask if n_seen == 0 else torch.zeros_like(mask)

"""The tuned model's own answers, which other models are compared with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from toolkit.analysis.divergence import Divergences, Predictions
from toolkit.models.generation import continuation_logits, end_tokens, greedy, make_prompts, prefill


class Reference:
    """The tuned model's own answers, and how far other models' next tokens are from its own.

    KL(tuned ‖ model) in nats per generated token, all models reading the tuned model's tokens.
    """

    @torch.no_grad()
    def __init__(
        self, tuned: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], n_new: int
    ) -> None:
        device = next(tuned.parameters()).device
        self.prompts = make_prompts(prompts, tokenizer.pad_token_id or 0, device)
        start = prefill(tuned, self.prompts)
        ends = end_tokens(tuned, tokenizer)
        self.said, _ = greedy(tuned, self.prompts, start, n_new, ends)
        logits = continuation_logits(tuned, self.prompts, start, self.said)
        self.predictions = Predictions(logits)

    @torch.no_grad()
    def divergence(self, model: nn.Module) -> Divergences:
        start = prefill(model, self.prompts)
        logits = continuation_logits(model, self.prompts, start, self.said)
        return Divergences(self.predictions.divergence(logits), self.said.counted)

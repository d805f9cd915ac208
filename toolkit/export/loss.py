"""What an export loses: how far the model in the format's terms is from the steered one."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.analysis.divergence import Divergences, recovered
from toolkit.evaluation.reference import Reference
from toolkit.export.format import Base, Fidelity
from toolkit.models.generation import continuation_logits, prefill
from toolkit.models.readable import Readers

NEW_TOKENS = 32


@dataclass(frozen=True)
class Loss:
    """Hold KL(steered ‖ exported) in nats a token, and KL(steered ‖ base) as its scale.

    Both along the steered model's greedy continuations; `kept` is one minus their ratio.
    """

    kl: float
    kl_sem: float
    kl_base: float
    kept: float
    prompts: int
    tokens: int


@torch.no_grad()
def loss(
    base: Base,
    adapters: Adapters,
    found: Fidelity,
    prompts: Sequence[Sequence[int]],
    n_new: int = NEW_TOKENS,
) -> Loss:
    """Measure how far what a format makes of the model is from the one steered by `adapters`."""
    model = base.model
    Readers((model,), base.tokenizer).require_prompts(prompts, n_new)
    exported: list[Divergences] = []
    unsteered: list[Divergences] = []
    reference = Reference(model, base.tokenizer, prompts, n_new)
    for batch in reference.batches:
        with steer(model, adapters):
            steered, counted = batch.read, batch.generated.counted
        for parts, context in ((exported, found.put_into(model)), (unsteered, nullcontext())):
            with context:
                start = prefill(model, batch.prompts)
                logits = continuation_logits(model, batch.prompts, start, batch.generated)
            parts.append(Divergences(steered.divergence(logits), counted))
        batch.release()
    ours, scale = reference.joined(exported), reference.joined(unsteered)
    kept = recovered(ours, scale)[0]
    return Loss(ours.mean, ours.sem, scale.mean, kept, len(prompts), int(ours.counted.sum()))

"""One vocabulary for two models: the token ids that both have.

A fine-tune often has more tokens than its base, or embeddings that were padded or cut. Both models
then keep the rows of the ids that they share. How much probability the rows had that are left out
is measured, on the run's own tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.documents.batches import Batch
from toolkit.errors import InputError
from toolkit.models.locations import causal_lm, n_embeddings
from toolkit.runtime.check import Check

# The tensors that have a row for each token, and the attribute that counts their rows.
ROWS = ("weight", "bias")
COUNTS = ("num_embeddings", "out_features")


@dataclass(frozen=True)
class LeftOut:
    """Hold the rows of one model's embeddings and head that the other has not.

    `cut` holds each module's name of a tensor with the whole one and the part that is kept.
    """

    side: str
    model: nn.Module
    n_kept: int
    n_whole: int
    cut: tuple[tuple[nn.Module, str, nn.Parameter, nn.Parameter], ...]

    @torch.no_grad()
    def check(self, batch: Batch) -> Check:
        """Say what is left out, with its mean probability on the counted tokens of `batch`."""
        with self._whole():
            logits = self.model(
                input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False
            ).logits[batch.counted]
        mass = [float(row.double().softmax(-1)[self.n_kept :].sum()) for row in logits]
        share = sum(mass) / max(len(mass), 1)
        return Check(
            f"vocabulary ({self.side})",
            "passed",
            f"{self.n_whole - self.n_kept} of its {self.n_whole} rows are not in both models and "
            f"left out of every comparison; on {len(mass)} tokens they hold {share:.1e} of the "
            "probability",
        )

    @contextmanager
    def _whole(self) -> Iterator[None]:
        for module, name, whole, _ in self.cut:
            setattr(module, name, whole)
        try:
            yield
        finally:
            for module, name, _, kept in self.cut:
                setattr(module, name, kept)


def share_vocabulary(base: nn.Module, tuned: nn.Module) -> list[LeftOut]:
    """Cut the embeddings and the head of the model that has more of them to the ids of both.

    Returns what was left out: nothing where both have the same number. Raises InputError where an
    adapter holds something else with a place for every token.
    """
    models = {"base": causal_lm(base), "tuned": causal_lm(tuned)}
    kept = min(n_embeddings(model) for model in models.values())
    return [_cut(side, model, kept) for side, model in models.items() if n_embeddings(model) > kept]


def _cut(side: str, model: Any, n_kept: int) -> LeftOut:
    n_whole, cut = n_embeddings(model), []
    parts: dict[int, nn.Parameter] = {}  # tied weights stay one tensor
    for module in _modules(model):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if n_whole not in parameter.shape:
                continue
            if name not in ROWS or len(parameter) != n_whole:
                raise InputError(
                    f"the {side} model has {n_whole} tokens, the other {n_kept}, and its "
                    f"{type(module).__name__} holds something else for each of them: merge the "
                    "adapter into a model folder"
                )
            part = parts.setdefault(id(parameter), _part(parameter, n_kept))
            setattr(module, name, part)
            cut.append((module, name, parameter, part))
        if (getattr(module, "padding_idx", None) or 0) >= n_kept:
            module.padding_idx = None  # type: ignore[assignment] # only training asks for it
        for count in COUNTS:
            if getattr(module, count, None) == n_whole:
                setattr(module, count, n_kept)
    model.config.get_text_config().vocab_size = n_kept
    return LeftOut(side, model, n_kept, n_whole, tuple(cut))


def _part(parameter: nn.Parameter, n_kept: int) -> nn.Parameter:
    kept: Tensor = parameter.detach()[:n_kept]
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def _modules(model: Any) -> list[nn.Module]:
    """Return the modules of the embedding and the head, whatever PEFT wraps them in, once each."""
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    return list(dict.fromkeys(m for part in found if part is not None for m in part.modules()))

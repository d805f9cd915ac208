"""Attaching adapters to a live model, for forward passes, training and generation."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.collection import Adapters
from toolkit.adapters.positions import Positions, prompt_tokens
from toolkit.models.edits import steered_by
from toolkit.models.hooks import Call, Edit, before, replace, within
from toolkit.models.locations import Sites, causal_lm, resolve


@contextmanager
def steer(model: nn.Module, adapters: Adapters, sites: Sites | None = None) -> Iterator[None]:
    """Add what `adapters` give to the states of `model`, in every forward pass and generation.

    Padding on either side and each sequence's first token are never steered; a key-value cache is
    followed; gradients flow to adapters that ask for them. Adapters attached one inside the other
    add up. `sites` saves looking the locations up again. Compile a model inside the context:
    torch.compile takes no notice of hooks that come later.
    """
    sites = sites or resolve(model)
    if reason := sites.unavailable.get(adapters.location):
        raise ValueError(f"this model has no {adapters.location!r}: {reason}")
    if lacking := [k for k in adapters.by_layer if (adapters.location, k) not in sites.at]:
        raise ValueError(
            f"adapters for block {lacking[0]} at {adapters.location!r}: this model has blocks 0 to "
            f"{sites.n_layers - 1}"
        )
    tokens = _Tokens(adapters.positions)
    language_model = causal_lm(model)
    with ExitStack() as stack:
        stack.enter_context(within(language_model, tokens.enter, tokens.leave))
        # Some call the base model directly; and OPT's language model goes round it.
        stack.enter_context(before(language_model.base_model, tokens.read))
        for layer, adapter in adapters.by_layer.items():
            edit = _edit(adapter.to(language_model.device), tokens)
            stack.enter_context(replace(sites.at[adapters.location, layer], edit))
        yield


class _Tokens:
    """Which of the tokens that are in the model now are steered: `where`, `[batch, length]`."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions
        self.labels: Tensor | None = None
        self.where: Tensor | None = None

    def enter(self, call: Call) -> None:
        self.labels = call.kwargs.get("labels")
        self.read(call)

    def leave(self) -> None:
        self.labels = None

    def read(self, call: Call) -> None:
        ids = call.kwargs.get("input_ids", call.args[0] if call.args else None)
        inputs = ids if ids is not None else call.kwargs["inputs_embeds"]
        n_rows, n_new = inputs.shape[:2]
        mask = call.kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            cache = call.kwargs.get("past_key_values")
            seen = int(cache.get_seq_length()) if cache is not None else 0
            attended = mask
            mask = torch.ones(n_rows, seen + n_new, dtype=torch.bool, device=inputs.device)
            if seen == 0:  # padding stands on the left: after a cache there is none
                mask &= _are_tokens(attended)
        mask, n_seen = mask.bool(), mask.shape[1] - n_new
        prompt = torch.zeros_like(mask)
        prompt[:, n_seen:] = prompt_tokens(mask[:, n_seen:], self.labels, n_seen)
        self.where = self.positions.of(mask, prompt)[:, n_seen:]


def _are_tokens(attended: Any) -> Any:
    """Which of a prompt's tokens are no padding, by the mask of who attends to whom (None: all).

    Generation with a static cache makes that mask, `[batch, 1, new, cached]`, or one for each type
    of attention, before it calls the model. Tokens attend to themselves; to padding nobody does.
    """
    masks = attended.values() if isinstance(attended, dict) else [attended]
    if (mask := next((m for m in masks if m is not None), None)) is None:
        return True
    own = mask[:, 0].diagonal(0, 1, 2)
    return own if own.dtype == torch.bool else own == 0


def _edit(adapter: Adapter, tokens: _Tokens) -> Edit:
    dtype = next(adapter.parameters()).dtype

    def change(states: Tensor) -> Tensor:
        return adapter(states.to(dtype))

    def edit(states: Tensor) -> Tensor:
        assert tokens.where is not None
        return steered_by(change, tokens.where)(states)

    return edit

"""Attaching adapters to a live model, for forward passes and for generation."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from toolkit.hooks import Call, before, replace
from toolkit.locations import Sites, causal_lm, resolve
from toolkit.lockstep import steerable, steered_by
from toolkit.steering.adapters import Adapters


@contextmanager
def steer(model: nn.Module, adapters: Adapters, sites: Sites | None = None) -> Iterator[None]:
    """Add what `adapters` give to the states of `model`, in every forward pass and generation.

    Padding on either side and each sequence's first token are never steered; a key-value cache is
    followed. `sites` saves looking the locations up again.
    """
    sites = sites or resolve(model)
    if reason := sites.missing.get(adapters.location):
        raise ValueError(f"this model has no {adapters.location!r}: {reason}")
    where: list[Tensor] = []

    def look(call: Call) -> None:
        where[:] = [_steerable_inputs(call)]

    language_model = causal_lm(model)
    with ExitStack() as stack:
        # Either may be what is called: OPT's language model goes round its base model.
        for module in (language_model, language_model.base_model):
            stack.enter_context(before(module, look))
        for layer, adapter in adapters.by_layer.items():
            edit = _edit(adapter.to(language_model.device), where)
            stack.enter_context(replace(sites.at[adapters.location, layer], edit))
        yield


def _edit(adapter: nn.Module, where: list[Tensor]):
    return lambda states: steered_by(adapter, where[0])(states)


def _steerable_inputs(call: Call) -> Tensor:
    """Which of the tokens that enter the model now may be steered, bool `[batch, length]`."""
    ids = call.kwargs.get("input_ids", call.args[0] if call.args else None)
    inputs = ids if ids is not None else call.kwargs["inputs_embeds"]
    n_rows, n_new = inputs.shape[:2]
    mask = call.kwargs.get("attention_mask")
    if mask is None or mask.ndim != 2:
        cache = call.kwargs.get("past_key_values")
        seen = cache.get_seq_length() if cache is not None else 0
        mask = torch.ones(n_rows, seen + n_new, dtype=torch.bool, device=inputs.device)
    return steerable(mask.bool())[:, -n_new:]

"""The oracle as what steers: the tuned model's own states, put in place in the base model."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from toolkit.models.hooks import Call, Edit, before, capture, replace
from toolkit.models.locations import Sites, causal_lm, resolve


@contextmanager
def steer_by_oracle(
    base: nn.Module,
    tuned: nn.Module,
    location: str = "post_block",
    layers: Sequence[int] | None = None,
    sites: tuple[Sites, Sites] | None = None,
) -> Iterator[None]:
    """Let `base` have the states of `tuned` at `location` (in all blocks, or in `layers`).

    The tuned model reads along, with a key-value cache of its own where the base model has one, so
    generation works, greedy or sampled (not beam search, which shuffles caches). All tokens are
    overwritten, the first one too: ``h + Δ_oracle`` is the tuned state. `sites` saves looking the
    locations of both models up again.
    """
    base_sites, tuned_sites = sites or (resolve(base), resolve(tuned))
    if reason := base_sites.unavailable.get(location):
        raise ValueError(f"this model has no {location!r}: {reason}")
    names = range(base_sites.n_layers) if layers is None else layers
    reader = _Reader(causal_lm(tuned))
    with ExitStack() as stack:
        wanted = {str(layer): tuned_sites.at[location, layer] for layer in names}
        states = stack.enter_context(capture(wanted))
        stack.enter_context(before(causal_lm(base).base_model, reader.read))
        for layer in names:
            site = base_sites.at[location, layer]
            stack.enter_context(replace(site, _edit(states, str(layer))))
        yield


class _Reader:
    """The tuned model, reading what the base model reads."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, DynamicCache()

    @torch.no_grad()
    def read(self, call: Call) -> None:
        kwargs = dict(call.kwargs)
        given = kwargs.pop("past_key_values", None)
        cached = kwargs.get("use_cache", given is not None)
        if given is None or given.get_seq_length() == 0:
            self.cache = DynamicCache()
        if cached:
            kwargs["past_key_values"] = self.cache
        self.model.base_model(*call.args, **kwargs)


def _edit(states: dict[str, Tensor], name: str) -> Edit:
    return lambda state: states[name].reshape(state.shape).to(state.dtype)

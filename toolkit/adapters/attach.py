"""Attaching adapters to a live model, for forward passes, training and generation."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.collection import Adapters
from toolkit.adapters.positions import Positions, prompt_tokens
from toolkit.errors import InputError
from toolkit.models.edits import steered_by
from toolkit.models.hooks import Call, Edit, before, replace, within
from toolkit.models.locations import Sites, causal_lm, resolve, width_of

# Part i of k equal parts of a batch's rows.
Share = tuple[int, int]


@contextmanager
def steer(
    model: nn.Module,
    adapters: Adapters,
    sites: Sites | None = None,
    share: Share | None = None,
) -> Iterator[None]:
    """Add what `adapters` give to the states of `model`, in every forward pass and generation.

    Padding on either side and each sequence's first token are never steered; a key-value cache is
    followed; gradients flow to adapters that ask for them. Adapters attached one inside the other
    add up. `sites` saves looking the locations up again. With a `share` (i, k) only part i of the k
    equal parts of a batch's rows is steered, so that several adapters can be tried in one pass.
    Compile a model inside the context: torch.compile takes no notice of hooks that come later.
    """
    sites = sites or resolve(model)
    language_model = causal_lm(model)
    require_fit(language_model, adapters, sites)
    tokens = _Tokens(adapters.positions)
    with ExitStack() as stack:
        stack.enter_context(within(language_model, tokens.enter, tokens.leave))
        # Some call the base model directly; and OPT's language model goes round it.
        stack.enter_context(within(language_model.base_model, tokens.enter, tokens.leave))
        for layer, adapter in adapters.by_layer.items():
            block = sites.blocks[layer]
            stack.enter_context(before(block, tokens.at_module))
            for module in block.children():  # hooks of the block itself are not run again
                stack.enter_context(before(module, tokens.inside))
            edit = _edit(adapter.to(language_model.device), tokens, share)
            stack.enter_context(replace(sites.at[adapters.location, layer], edit))
        yield


@torch.no_grad()
def require_fit(model: Any, adapters: Adapters, sites: Sites) -> None:
    """Raise InputError where the model lacks the adapters' location, a block or their width."""
    if reason := sites.unavailable.get(adapters.location):
        raise InputError(f"this model has no {adapters.location!r}: {reason}")
    if lacking := [k for k in adapters.by_layer if (adapters.location, k) not in sites.at]:
        raise InputError(
            f"adapters for block {lacking[0]} at {adapters.location!r}: this model has blocks 0 to "
            f"{sites.n_layers - 1}"
        )
    width = width_of(model.config.get_text_config(), adapters.location)
    for layer, adapter in adapters.by_layer.items():
        parameter = next(adapter.parameters())
        state = torch.zeros(1, width, dtype=parameter.dtype, device=parameter.device)
        try:
            fits = adapter(state).shape == state.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise InputError(
                f"the adapter of block {layer} is of another width than this model's {width} at "
                f"{adapters.location!r}: expected adapters that were made for it"
            )


class _Tokens:
    """Which of the tokens that are in the model now are steered: `where`, `[batch, length]`.

    Where gradient checkpointing runs a block again in the backward pass, perhaps after another
    forward pass, the pass that it belongs to is known by the tensors that its modules are given.
    """

    def __init__(self, positions: Positions) -> None:
        self.positions = positions
        self.where: Tensor | None = None
        self._last: int | None = None  # of how many tokens alone logits are wanted
        self._calls: list[Tensor | None] = []  # labels of the calls that are under way
        self._thread = 0
        # The `where` of the one pass that a tensor belongs to; None where several were given it.
        self._passes: Any = WeakTensorKeyDictionary()

    def enter(self, call: Call) -> None:
        labels = call.kwargs.get("labels")
        self._calls.append(labels if labels is not None or not self._calls else self._calls[-1])
        if not torch.compiler.is_compiling():
            thread = threading.get_ident()
            if len(self._calls) > 1 and self._thread != thread:
                raise RuntimeError("a steered model runs in two threads at once: steer one in each")
            self._thread = thread
        self.read(call)

    def leave(self) -> None:
        self._calls.pop()
        if not self._calls:
            self.where = None

    def at_module(self, call: Call) -> None:
        """Remember what a block is called with, or find out which pass it is run again for."""
        if torch.compiler.is_compiling():
            return
        tensors = list(_tensors([call.args[1:], call.kwargs]))
        if self._calls:
            for tensor in tensors:
                only = self._passes.get(tensor, self.where) is self.where
                self._passes[tensor] = self.where if only else None
            return
        known = (self._passes.get(tensor) for tensor in tensors)
        self.where = next((where for where in known if where is not None), self.where)

    def inside(self, call: Call) -> None:
        """Do the same at a module inside a block, where a backward pass may run it again."""
        if torch.is_grad_enabled():
            self.at_module(call)

    def of(self, states: Tensor) -> Tensor:
        """Return which of the tokens with `states` are steered, bool `[batch, length]`.

        Where logits of the last tokens alone are wanted, Gemma 4's later blocks run on these alone.
        """
        if self.where is None:
            raise RuntimeError(
                "a block runs outside of its model's forward pass (gradient checkpointing?), and "
                "which tokens it is to steer cannot be told: train without checkpointing"
            )
        if states.shape[:-1] == (len(self.where), self._last):
            return self.where[:, -states.shape[1] :]
        if states.ndim == 3 and states.shape[:-1] != self.where.shape:
            raise InputError(
                f"states {tuple(states.shape)} of tokens {tuple(self.where.shape)} cannot be "
                "steered: expected [batch, length, width]"
            )
        return self.where

    def read(self, call: Call) -> None:
        labels = self._calls[-1]
        wanted = call.kwargs.get("logits_to_keep")
        self._last = wanted if isinstance(wanted, int) else None
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
        starts = _packed_starts(call.kwargs.get("position_ids"), mask[:, n_seen:])
        if starts is not None:
            self.where = self.positions.packed(mask[:, n_seen:], starts)
            return
        prompt = torch.zeros_like(mask)
        prompt[:, n_seen:] = prompt_tokens(mask[:, n_seen:], labels, n_seen)
        self.where = self.positions.of(mask, prompt)[:, n_seen:]


def _packed_starts(places: Any, mask: Tensor) -> Tensor | None:
    """Return where sequences begin that are packed into one row, by their places; None if none are.

    `mask` says which of the tokens are no padding.
    """
    if not isinstance(places, Tensor) or places.ndim != 2 or places.shape[1] != mask.shape[1]:
        return None
    places = places.expand(len(mask), -1)
    again = (places[:, 1:] != places[:, :-1] + 1) & mask[:, 1:] & mask[:, :-1]
    return places == 0 if bool(again.any()) else None


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in a block's arguments."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


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


def _edit(adapter: Adapter, tokens: _Tokens, share: Share | None) -> Edit:
    dtype = next(adapter.parameters()).dtype
    part, n_parts = share or (0, 1)

    def change(states: Tensor) -> Tensor:
        return adapter(states.to(dtype))

    def edit(states: Tensor) -> Tensor:
        where = tokens.of(states)
        if n_parts == 1:
            return steered_by(change, where)(states)
        # Some families hand their MLP all tokens in one row: then these are what is split.
        parts = list(states.tensor_split(n_parts))
        ours = where.reshape(states.shape[:-1]).tensor_split(n_parts)[part]
        parts[part] = steered_by(change, ours)(parts[part])
        return torch.cat(parts)

    return edit

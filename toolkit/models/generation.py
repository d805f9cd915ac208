"""Greedy and sampled generation, and the logits of generated tokens, batched and left-padded.

A model whose cache does not go on where whole passes would (some state-space models, and those
without a cache of keys and values) reads every token anew: `WITHOUT_CACHE` has it.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from toolkit.models.locations import causal_lm

WITHOUT_CACHE: WeakSet[nn.Module] = WeakSet()
Choice = Callable[[Tensor, int], Tensor]  # logits `[n, vocabulary]` and an index to ids `[n]`


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts: `ids` int64 and `mask` bool, `[n_prompts, length]`."""

    ids: Tensor
    mask: Tensor

    def times(self, n: int) -> "Prompts":
        """Return `n` copies below each other, `[n · n_prompts, length]`."""
        return Prompts(self.ids.repeat(n, 1), self.mask.repeat(n, 1))


@dataclass(frozen=True)
class Generated:
    """Hold what a model said: `ids` int64 and `counted` bool, `[n_prompts, n_new]`.

    A token counts up to and with the first end of sequence.
    """

    ids: Tensor
    counted: Tensor

    def times(self, n: int) -> "Generated":
        """Return `n` copies below each other, `[n · n_prompts, n_new]`."""
        return Generated(self.ids.repeat(n, 1), self.counted.repeat(n, 1))

    def parts(self, n: int) -> list["Generated"]:
        """Split into `n` equal parts, from above to below."""
        pairs = zip(self.ids.chunk(n), self.counted.chunk(n), strict=True)
        return [Generated(ids, counted) for ids, counted in pairs]

    @property
    def tokens(self) -> list[list[int]]:
        """Each row's tokens that count."""
        return [ids[c].tolist() for ids, c in zip(self.ids, self.counted, strict=True)]


def make_prompts(
    prompts: Sequence[Sequence[int]], pad_id: int, device: str | torch.device = "cpu"
) -> Prompts:
    """Prompts as one left-padded batch."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad_id, dtype=torch.long)
    mask = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = True
    return Prompts(ids.to(device), mask.to(device))


@dataclass(frozen=True)
class Prefilled:
    """A model that has read its prompts: the logits after the last token, and its cache.

    `cache` is None where the model reads every token anew.
    """

    logits: Tensor
    cache: Any


@torch.no_grad()
def prefill(model: nn.Module, prompts: Prompts) -> Prefilled:
    """Let `model` read `prompts` once, for `greedy` and `continuation_logits` to go on from."""
    if causal_lm(model) in WITHOUT_CACHE:
        return Prefilled(_whole(model, prompts.ids, prompts.mask, 1)[:, -1], None)
    output = model(
        input_ids=prompts.ids,
        attention_mask=prompts.mask.long(),
        position_ids=positions_of(prompts.mask),
        use_cache=True,
        logits_to_keep=_last(model, prompts.ids, 1),
    )
    return Prefilled(output.logits[:, -1], output.past_key_values)


def _whole(model: nn.Module, ids: Tensor, mask: Tensor, n: int) -> Tensor:
    """Return the logits of the last `n` tokens `[n_rows, n, vocabulary]`, from one pass over all.

    The model is told places, and how many logits are wanted, where it can be told.
    """
    told = {
        "position_ids": positions_of(mask),
        "logits_to_keep": _last(model, ids, n),
    }
    known = inspect.signature(causal_lm(model).forward).parameters
    told = {name: value for name, value in told.items() if name in known}
    return model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **told).logits[:, -n:]


def _last(model: nn.Module, ids: Tensor, n: int) -> int | Tensor:
    """Say that logits of the last `n` tokens are wanted.

    As places where blocks share keys: told a number, Gemma 4 runs its later blocks on these tokens
    alone, and states would be missing.
    """
    if not getattr(causal_lm(model).config.get_text_config(), "num_kv_shared_layers", 0):
        return n
    return torch.arange(ids.shape[1] - n, ids.shape[1], device=ids.device)


def greedy(
    model: nn.Module, prompts: Prompts, start: Prefilled, n_new: int, ends: Sequence[int]
) -> tuple[Generated, Tensor]:
    """The model's `n_new` most likely tokens, one by one, and the logits they were chosen by.

    The logits are `[n_prompts, n_new, vocabulary]`. A row ends at a token of `ends`; what it says
    after it does not count.
    """
    return _generate(model, prompts, start, n_new, ends, lambda logits, _: logits.argmax(-1))


def sampled(
    model: nn.Module, prompts: Prompts, start: Prefilled, draws: Tensor, ends: Sequence[int]
) -> tuple[Generated, Tensor]:
    """Sample tokens at temperature 1; return what `greedy` returns.

    `draws` are uniform random numbers in [0, 1), float64 `[n_prompts, n_new]`: each token is where
    the distribution function passes its number, so that a row depends on its own numbers alone.
    """

    def choose(logits: Tensor, index: int) -> Tensor:
        passed = logits.double().softmax(-1).cumsum(-1)
        drawn = draws[:, index, None] * passed[:, -1:]  # the sum is 1 but for rounding
        found = torch.searchsorted(passed, drawn, right=True)[:, 0]
        return found.clamp_max(logits.shape[-1] - 1)

    return _generate(model, prompts, start, draws.shape[1], ends, choose)


@torch.no_grad()
def _generate(
    model: nn.Module,
    prompts: Prompts,
    start: Prefilled,
    n_new: int,
    ends: Sequence[int],
    choose: Choice,
) -> tuple[Generated, Tensor]:
    """Let `choose` pick `n_new` tokens, one by one; return them and the logits it was shown."""
    cache, logits, mask = copy.deepcopy(start.cache), [start.logits], prompts.mask
    ids = choose(start.logits, 0)[:, None]
    while ids.shape[1] < n_new:
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if cache is None:
            logits.append(_whole(model, torch.cat([prompts.ids, ids], 1), mask, 1)[:, -1])
        else:
            output = model(
                input_ids=ids[:, -1:],
                attention_mask=mask.long(),
                position_ids=positions_of(mask)[:, -1:],
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(output.logits[:, -1])
        ids = torch.cat([ids, choose(logits[-1], ids.shape[1])[:, None]], 1)
    return Generated(ids, counted_tokens(ids, ends)), torch.stack(logits, 1)


@torch.no_grad()
def continuation_logits(
    model: nn.Module, prompts: Prompts, start: Prefilled, generated: Generated
) -> Tensor:
    """The logits by which `model` would choose each generated token, reading `generated` itself.

    `[n_prompts, n_new, vocabulary]`.
    """
    if start.cache is None:
        return whole_logits(model, prompts, generated)
    n_read = generated.ids.shape[1] - 1
    mask = torch.cat([prompts.mask, prompts.mask.new_ones(len(prompts.mask), n_read)], 1)
    if n_read == 0:
        return start.logits[:, None]
    output = model(
        input_ids=generated.ids[:, :-1],
        attention_mask=mask.long(),
        position_ids=positions_of(mask)[:, -n_read:],
        past_key_values=copy.deepcopy(start.cache),
        use_cache=True,
    )
    return torch.cat([start.logits[:, None], output.logits], 1)


@torch.no_grad()
def whole_logits(model: nn.Module, prompts: Prompts, generated: Generated) -> Tensor:
    """Return what `continuation_logits` gives, from one pass over prompts and continuations."""
    ids = torch.cat([prompts.ids, generated.ids[:, :-1]], 1)
    n_new = generated.ids.shape[1]
    mask = torch.cat([prompts.mask, prompts.mask.new_ones(len(prompts.mask), n_new - 1)], 1)
    return _whole(model, ids, mask, n_new)


def positions_of(mask: Tensor) -> Tensor:
    """Return each token's place in its own row, padding left out."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def counted_tokens(ids: Tensor, ends: Sequence[int]) -> Tensor:
    """True up to and with the first token of `ends` in each row of `ids`."""
    ended = torch.isin(ids, torch.tensor(list(ends), device=ids.device, dtype=ids.dtype))
    return ended.cumsum(1) - ended.long() == 0


def end_tokens(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end a response: the model's own and the tokenizer's."""
    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return tuple(sorted({e for e in (*listed, tokenizer.eos_token_id) if e is not None}))

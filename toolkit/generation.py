"""Greedy generation and the logits of generated tokens, batched and left-padded."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts: `ids` int64 and `mask` bool, `[n_prompts, length]`."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Generated:
    """What a model said: `ids` int64 and `counted` bool, `[n_prompts, n_new]`.

    A token counts up to and with the first end of sequence.
    """

    ids: Tensor
    counted: Tensor


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


@torch.no_grad()
def generate(
    model: nn.Module, prompts: Prompts, n_new: int, ends: Sequence[int], pad_id: int
) -> tuple[Generated, Tensor]:
    """Greedy continuations of `n_new` tokens, and the logits they were chosen by.

    The logits are `[n_prompts, n_new, vocabulary]`. A row ends at a token of `ends`; what stands
    behind it is padding that does not count.
    """
    config = GenerationConfig(
        do_sample=False, max_new_tokens=n_new, pad_token_id=pad_id, eos_token_id=list(ends) or None
    )
    output = model.generate(
        input_ids=prompts.ids,
        attention_mask=prompts.mask.long(),
        generation_config=config,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = output.sequences[:, prompts.ids.shape[1] :]
    logits = torch.stack(output.logits, 1)
    unused = n_new - ids.shape[1]  # every row ended early
    counted = torch.nn.functional.pad(counted_tokens(ids, ends), (0, unused))
    ids = torch.nn.functional.pad(ids, (0, unused), value=pad_id)
    return Generated(ids, counted), torch.nn.functional.pad(logits, (0, 0, 0, unused))


def counted_tokens(ids: Tensor, ends: Sequence[int]) -> Tensor:
    """True up to and with the first token of `ends` in each row of `ids`."""
    ended = torch.isin(ids, torch.tensor(list(ends), device=ids.device, dtype=ids.dtype))
    return ended.cumsum(1) - ended.long() == 0


@torch.no_grad()
def continuation_logits(model: nn.Module, prompts: Prompts, generated: Generated) -> Tensor:
    """The logits by which `model` would choose each generated token, reading `generated` itself.

    `[n_prompts, n_new, vocabulary]`.
    """
    n_new = generated.ids.shape[1]
    return model(**continuation_inputs(prompts, generated), logits_to_keep=n_new).logits


def continuation_inputs(prompts: Prompts, generated: Generated) -> dict:
    """Prompt and generated tokens but the last, as a model's arguments."""
    ids = torch.cat([prompts.ids, generated.ids[:, :-1]], 1)
    mask = torch.cat([prompts.mask, torch.ones_like(generated.ids[:, :-1], dtype=torch.bool)], 1)
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0),
        "use_cache": False,
    }


def end_tokens(model: nn.Module, tokenizer) -> tuple[int, ...]:
    """The tokens that end a response: the model's own and the tokenizer's."""
    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return tuple(sorted({e for e in (*listed, tokenizer.eos_token_id) if e is not None}))

"""Examples as training sees them: tokens, and which of them are supervised."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.documents.documents import Document
from toolkit.documents.tasks.task import Example
from toolkit.documents.tokens import encode
from toolkit.errors import InputError

NOT_SUPERVISED = -100


class TooLongError(InputError):
    """An example has more tokens than `max_length`: cut off, it would teach no answer."""

    def __init__(self, example: Example, length: int, max_length: int) -> None:
        self.length = length
        super().__init__(
            f"an example is longer than {max_length} tokens ({example.prompt[:60]!r}..., "
            f"{length}): give a larger --max-length or leave it out"
        )


def supervise_all(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    skip_longer: bool = False,
    ends: Sequence[int] = (),
) -> tuple[list[dict[str, list[int]]], int]:
    """Tokenise `examples` for training; the rows, and how many longer ones were left out.

    `ends` are the tokens at which the model stops (none: the tokenizer's end of sequence).
    Without `skip_longer` a set that has longer ones is refused, with their number and longest
    length.
    """
    rows, longer = [], []
    for example in examples:
        try:
            rows.append(supervised(example, tokenizer, max_length, ends))
        except TooLongError as error:
            longer.append(error.length)
    if longer and not (skip_longer and rows):
        raise InputError(
            f"{len(longer)} of {len(examples)} examples are longer than {max_length} tokens, the "
            f"longest has {max(longer)}: give a larger --max-length, or --longer skip to leave "
            "them out"
        )
    return rows, len(longer)


def supervised(
    example: Example, tokenizer: Any, max_length: int, ends: Sequence[int] = ()
) -> dict[str, list[int]]:
    """``input_ids`` and ``labels``: the response's tokens and one end of sequence.

    The chat template ends a turn itself, where there is one. An example longer than `max_length`
    is refused: cut off, it would teach no answer.
    """
    own = tokenizer.eos_token_id
    ends = tuple(ends) or (() if own is None else (own,))
    if not ends:
        raise InputError(
            "neither the tokenizer nor the model's generation_config.json names an end of "
            "sequence: a model trained so would never stop; set eos_token_id"
        )
    document = Document(prompt=example.prompt, response=example.response)
    encoded = encode(document, tokenizer, sys.maxsize)
    ids, start = list(encoded.ids), encoded.response_start
    if not tokenizer.chat_template and ids[-1] not in ends:  # some add their own
        ids.append(ends[0] if own is None else own)
    if len(ids) > max_length:
        raise TooLongError(example, len(ids), max_length)
    if start is None or start >= len(ids) or not set(ends) & set(ids[start:]):
        raise InputError(
            f"the chat template gives the response of {example.prompt[:60]!r}... no end of "
            "sequence: a model trained so would never stop"
        )
    labels = [NOT_SUPERVISED] * start + ids[start:]
    return {"input_ids": ids, "labels": labels}


def collate(rows: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """Rows as one right-padded batch. Padding is known by its place, never by its token."""

    def padded(lists: list[list[int]], value: int) -> Tensor:
        tensors = [torch.tensor(entries) for entries in lists]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad_id),
        "labels": padded([row["labels"] for row in rows], NOT_SUPERVISED),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
    }

"""Examples as training sees them: tokens, and which of them are supervised."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.documents.documents import Document
from toolkit.documents.tasks.task import Example
from toolkit.documents.tokens import encode
from toolkit.errors import InputError

NOT_SUPERVISED = -100


def supervised(example: Example, tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """``input_ids`` and ``labels``: the response's tokens and one end of sequence.

    The chat template ends a turn itself, where there is one. An example longer than `max_length`
    is refused: cut off, it would teach no answer.
    """
    document = Document(prompt=example.prompt, response=example.response)
    encoded = encode(document, tokenizer, max_length + 1)
    ids, start = list(encoded.ids), encoded.response_start
    if not tokenizer.chat_template and ids[-1:] != [tokenizer.eos_token_id]:  # some add their own
        ids.append(tokenizer.eos_token_id)
    if len(ids) > max_length:
        raise InputError(
            f"an example is longer than {max_length} tokens ({example.prompt[:60]!r}...): "
            "give a larger --max-length or leave it out"
        )
    if start is None or start >= len(ids) or tokenizer.eos_token_id not in ids[start:]:
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

"""Documents: reading, splitting into fit and held-out, tokenising, batching.

A document is ``{"text"}`` or ``{"prompt", "response"}``. Whether it is held out depends on its own
content alone, so that adding documents moves none from one side to the other.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from toolkit.errors import InputError

Positions = Literal["all", "response", "last"]
POSITIONS: tuple[Positions, ...] = ("all", "response", "last")
MAX_LENGTH = 512


@dataclass(frozen=True)
class Document:
    """A text, or a prompt with its response (`text` is then None)."""

    text: str | None = None
    prompt: str | None = None
    response: str | None = None

    @property
    def content(self) -> str:
        """What identifies the document."""
        return self.text if self.text is not None else f"{self.prompt}\n{self.response}"

    @property
    def held_out(self) -> bool:
        """By the first 32 bits of the content's sha256: one document in five."""
        return int(hashlib.sha256(self.content.encode()).hexdigest()[:8], 16) % 5 == 0


@dataclass(frozen=True)
class Encoded:
    """One document as tokens.

    `ids` are its tokens, `response_start` the index of the response's first token (None for a
    text), `prompt_ids` the tokens that a model is given to generate from, `prompt` the document's
    own prompt, without the chat template.
    """

    ids: tuple[int, ...]
    response_start: int | None
    prompt_ids: tuple[int, ...]
    held_out: bool
    prompt: str = ""

    def counted(self, positions: Positions) -> list[bool]:
        """Which tokens count. The first never does; a text is counted whole under `response`."""
        first = 1
        if positions == "last":
            first = max(1, len(self.ids) - 1)
        elif positions == "response" and self.response_start is not None:
            first = max(1, self.response_start)
        return [index >= first for index in range(len(self.ids))]


@dataclass(frozen=True)
class Batch:
    """Right-padded documents that pass through the models together.

    `ids` int64 `[batch, length]`; `mask` bool `[batch, length]`, true for tokens; `counted` bool
    `[batch, length]`, true for tokens that enter statistics; `keys` float64 `[n_counted]`, uniform
    random numbers by which a `Reservoir` samples tokens. All are fit or all are held out.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    counted: torch.Tensor
    keys: torch.Tensor
    held_out: bool

    @property
    def n_tokens(self) -> int:
        return int(self.mask.sum())

    @cached_property
    def places(self) -> torch.Tensor:
        """Where the counted tokens are among all, int64 `[n_counted]`."""
        return self.counted.flatten().nonzero()[:, 0]

    def of_counted(self, states: torch.Tensor) -> torch.Tensor:
        """A copy of the counted tokens' `states` (of all tokens, any shape), `[n_counted, d]`."""
        # Not by the mask: that searches it anew every time, and waits for a GPU to have done so.
        return states.reshape(self.ids.numel(), -1).index_select(0, self.places)


def read_documents(path: str | Path) -> list[Document]:
    """The documents of a JSON-lines file, or of a plain text file (one document a line)."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such data file: {path}")
    try:
        # Not splitlines(): it also cuts at U+2028 and others, which JSON strings may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(f"{path} is empty: expected JSON lines or one text document a line")
    is_json = path.suffix in (".json", ".jsonl") or numbered[0][1].lstrip().startswith("{")
    if not is_json:
        return [Document(text=line) for _, line in numbered]
    return [_parse(line, f"{path}:{number}") for number, line in numbered]


def _parse(line: str, where: str) -> Document:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error}): expected one object a line") from error
    return as_document(fields, where)


def as_document(fields: Any, where: str = "document") -> Document:
    """A mapping with ``text``, or with ``prompt`` and ``response``, as a `Document`."""
    if isinstance(fields, Document):
        return fields
    if isinstance(fields, str):
        return _checked(Document(text=fields), where)
    if isinstance(fields, dict):
        for names in (("text",), ("prompt", "response")):
            if all(isinstance(fields.get(name), str) for name in names):
                return _checked(Document(**{name: fields[name] for name in names}), where)
    found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
    raise InputError(
        f'{where} has {found}: expected an object with the string "text", '
        'or the strings "prompt" and "response"'
    )


def _checked(document: Document, where: str) -> Document:
    """Half of a surrogate pair passes as JSON but is no text."""
    try:
        document.content.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} is not text that UTF-8 can hold: {error}") from error
    return document


def split_documents(documents: Iterable[Any]) -> list[tuple[Document, bool]]:
    """Unique documents, each with whether it is held out; the last moves to an empty side."""
    unique: dict[str, Document] = {}
    for fields in documents:
        document = as_document(fields)
        unique.setdefault(document.content, document)
    split = [(document, document.held_out) for document in unique.values()]
    if len(split) < 2:
        raise InputError(
            f"{len(split)} different document(s): at least 2 are needed, one fit and one held out"
        )
    if len({held_out for _, held_out in split}) == 1:
        document, held_out = split[-1]
        split[-1] = (document, not held_out)
    return split


def encode(document: Document, tokenizer: Any, max_length: int = MAX_LENGTH) -> Encoded:
    """`document` as tokens, cut at `max_length`.

    A text is tokenised as the tokenizer does by default. A prompt and its response go through the
    chat template where the tokenizer has one (which writes its own special tokens), else through
    ``prompt + "\\n" + response``.
    """
    if document.text is not None:
        ids = tokenizer(document.text)["input_ids"]
        cut = 32 if len(ids) >= 64 else max(1, len(ids) // 2)
        return Encoded(tuple(ids[:max_length]), None, tuple(ids[:cut]), document.held_out)
    if tokenizer.chat_template:
        user = {"role": "user", "content": document.prompt}
        assistant = {"role": "assistant", "content": document.response}
        prompt_ids = _chat(tokenizer, [user], add_generation_prompt=True)
        ids = _chat(tokenizer, [user, assistant], add_generation_prompt=False)
    else:
        prompt_ids = tokenizer(f"{document.prompt}\n")["input_ids"]
        ids = tokenizer(document.content)["input_ids"]
    start = _shared_prefix(prompt_ids, ids)
    return Encoded(
        tuple(ids[:max_length]), start, tuple(prompt_ids), document.held_out, document.prompt or ""
    )


def _chat(tokenizer: Any, messages: list[dict], add_generation_prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens agree: a tokenizer may merge across the prompt's end."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def encode_all(
    documents: Iterable[Any], tokenizer: Any, max_length: int = MAX_LENGTH
) -> list[Encoded]:
    """Split and tokenise; documents without a token are left out."""
    encoded = [
        replace(encode(document, tokenizer, max_length), held_out=held_out)
        for document, held_out in split_documents(documents)
    ]
    encoded = [e for e in encoded if e.prompt_ids and e.ids]
    if not any(len(e.ids) > 1 and not e.held_out for e in encoded):
        raise InputError("no fit document has two tokens or more: the first token never counts")
    return encoded


def make_batches(
    documents: Sequence[Encoded],
    positions: Positions = "all",
    batch_tokens: int = 2048,
    pad_id: int = 0,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> list[Batch]:
    """Documents of one side and like length together, at most `batch_tokens` tokens in a batch."""
    keyed = [(index, document) for index, document in enumerate(documents) if len(document.ids) > 1]
    keyed.sort(key=lambda pair: (pair[1].held_out, len(pair[1].ids)))
    groups: list[list[tuple[int, Encoded]]] = []
    for index, document in keyed:
        group = groups[-1] if groups else []
        fits = len(document.ids) * (len(group) + 1) <= batch_tokens
        if group and fits and group[0][1].held_out == document.held_out:
            group.append((index, document))
        else:
            groups.append([(index, document)])
    return [_collate(group, positions, pad_id, device, seed) for group in groups]


def _collate(
    group: Sequence[tuple[int, Encoded]],
    positions: Positions,
    pad_id: int,
    device: str | torch.device,
    seed: int,
) -> Batch:
    length = max(len(document.ids) for _, document in group)
    ids = torch.full((len(group), length), pad_id, dtype=torch.long)
    mask = torch.zeros(len(group), length, dtype=torch.bool)
    counted = torch.zeros(len(group), length, dtype=torch.bool)
    keys = torch.zeros(len(group), length, dtype=torch.float64)
    for row, (index, document) in enumerate(group):
        n = len(document.ids)
        ids[row, :n] = torch.tensor(document.ids)
        mask[row, :n] = True
        counted[row, :n] = torch.tensor(document.counted(positions))
        keys[row, :n] = torch.from_numpy(np.random.default_rng([seed, index]).random(n))
    return Batch(
        ids.to(device),
        mask.to(device),
        counted.to(device),
        keys[counted].to(device),
        group[0][1].held_out,
    )

"""Documents as tokens: the chat template, the cut, and which tokens count."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from toolkit.documents.documents import Document, split_documents
from toolkit.errors import InputError

Positions = Literal["all", "response", "last"]
POSITIONS: tuple[Positions, ...] = ("all", "response", "last")
MAX_LENGTH = 512


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
    """Count how many leading tokens agree: a tokenizer may merge across the prompt's end."""
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

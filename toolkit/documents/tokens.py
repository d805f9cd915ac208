"""Documents as tokens: the chat template, the cut, and which tokens count."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from toolkit.documents.documents import Document, split_documents
from toolkit.errors import InputError, one_line

Positions = Literal["all", "response", "last"]
POSITIONS: tuple[Positions, ...] = ("all", "response", "last")
MAX_LENGTH = 512
DAY = datetime(2024, 7, 26, tzinfo=UTC)  # what Llama's templates say where they know no date


@dataclass(frozen=True)
class Encoded:
    """One document as tokens.

    `ids` are its tokens, `response_start` the index of the response's first token (None for a
    text), `prompt_ids` the tokens that a model is given to generate from, `prompt` the document's
    own prompt, without the chat template. Of the held-out documents some choose among adapters and
    the others report what was chosen (`reports`). `lot` deals all documents into folds.
    """

    ids: tuple[int, ...]
    response_start: int | None
    prompt_ids: tuple[int, ...]
    held_out: bool
    prompt: str = ""
    reports: bool = False
    lot: int = 0

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
        prompt_ids, ids = _chat(document, tokenizer)
    else:
        prompt_ids = _without_end(f"{document.asked}\n", tokenizer)
        ids = tokenizer(document.content)["input_ids"]
    start = _shared_prefix(prompt_ids, ids)
    return Encoded(
        tuple(ids[:max_length]), start, tuple(prompt_ids), document.held_out, document.prompt or ""
    )


def _without_end(text: str, tokenizer: Any) -> list[int]:
    """Return a prompt's tokens without those that the tokenizer appends (an end of sequence).

    A model that is to go on must not read that the text has ended.
    """
    found = tokenizer(text, return_special_tokens_mask=True)
    ids, special = list(found["input_ids"]), found["special_tokens_mask"]
    if not any(special[-1:]):
        return ids
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    while ids and special[len(ids) - 1] and ids[-len(own) :] != own:
        ids.pop()
    return ids


def _chat(document: Document, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens of a chat up to its answer, and of all of it, by the template.

    Some templates take a text as it is, others as a list of parts. Raises InputError where neither
    brings prompt and response into the text.
    """
    said = [*document.turns, ("user", document.prompt), ("assistant", document.response)]
    for parts in (False, True):
        messages = [
            {"role": role, "content": [{"type": "text", "text": what}] if parts else what}
            for role, what in said
        ]
        try:
            asked = _rendered(tokenizer, messages[:-1], True)
            whole = _rendered(tokenizer, messages, False)
        except Exception as error:  # a template is a program: it may raise anything
            reason = f"refuses {', '.join(role for role, _ in said)}: {one_line(error)}"
            continue
        reason = "leaves out the prompt or the response"
        if _holds(asked, document.prompt) and _holds(whole, document.response):
            return tuple(
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, whole)
            )
    raise InputError(f"the chat template {reason}; give documents that it takes, or texts")


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], asked: bool) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=asked, strftime_now=_same_day
    )


def tells_the_date(tokenizer: Any) -> bool:
    """Tell whether the chat template writes today's date, which is `DAY` here."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def _same_day(form: str) -> str:
    """Return the day that templates are told it is: a run is to read the same on every day."""
    return DAY.strftime(form)


def _holds(text: str, part: str | None) -> bool:
    """Return whether a part of a document is in the text, but for white space at its ends."""
    return (part or "").strip() in text


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
        replace(
            encode(document, tokenizer, max_length),
            held_out=held_out,
            reports=held_out and document.reports,
            lot=document.lot,
        )
        for document, held_out in split_documents(documents)
    ]
    encoded = [e for e in encoded if e.prompt_ids and e.ids]
    if not any(len(e.ids) > 1 and not e.held_out for e in encoded):
        raise InputError("no fit document has two tokens or more: the first token never counts")
    return encoded

"""Documents: reading a file, and splitting into fit and held-out documents.

A document is ``{"text"}`` or ``{"prompt", "response"}``. Whether it is held out depends on its own
content alone, so that adding documents moves none from one side to the other.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import InputError


@dataclass(frozen=True)
class Document:
    """A text, or a prompt with its response (`text` is then None)."""

    text: str | None = None
    prompt: str | None = None
    response: str | None = None

    @property
    def content(self) -> str:
        """Tell what identifies the document."""
        return self.text if self.text is not None else f"{self.prompt}\n{self.response}"

    @property
    def held_out(self) -> bool:
        """By the first 32 bits of the content's sha256: one document in five."""
        return int(hashlib.sha256(self.content.encode()).hexdigest()[:8], 16) % 5 == 0


def read_documents(path: str | Path) -> list[Document]:
    """Read the documents of a JSON-lines file, or of a plain text file (one document a line)."""
    return parse_documents(read_bytes(path), Path(path))


def read_bytes(path: str | Path) -> bytes:
    """Read a data file; raises InputError where there is none."""
    if not Path(path).is_file():
        raise InputError(f"no such data file: {path}")
    return Path(path).read_bytes()


def parse_documents(content: bytes, path: Path) -> list[Document]:
    """Make documents of the `content` of the data file `path`."""
    try:
        # Line ends as text files have them. Not splitlines(): it also cuts at U+2028 and others,
        # which JSON strings may hold.
        text = content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
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

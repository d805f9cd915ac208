"""Documents: reading a file, and splitting into fit and held-out documents.

A document is ``{"text"}``, ``{"prompt", "response"}`` or a chat. Whether it is held out depends on
its own content alone, so that adding documents moves none from one side to the other.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.documents.formats import HUB, Turn, fields_of, hub_rows, rows_of
from toolkit.errors import InputError


@dataclass(frozen=True)
class Document:
    """A text, or a prompt with its response (`text` is then None).

    `turns` are a chat's earlier turns, each a role and what was said.
    """

    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    turns: tuple[Turn, ...] = ()

    @property
    def asked(self) -> str:
        """The prompt, after what was said before it."""
        return "\n".join([*(said for _, said in self.turns), self.prompt or ""])

    @property
    def content(self) -> str:
        """Tell what identifies the document."""
        return self.text if self.text is not None else f"{self.asked}\n{self.response}"

    @property
    def held_out(self) -> bool:
        """By the first 32 bits of the content's sha256: one document in five."""
        return self._bits(0) % 5 == 0

    @property
    def reports(self) -> bool:
        """By the next 32 bits: every second held-out document reports, the others choose."""
        return self._bits(1) % 2 == 0

    @property
    def lot(self) -> int:
        """The 32 bits after those: documents are dealt into n folds by their remainder by n."""
        return self._bits(2)

    def _bits(self, place: int) -> int:
        """Return 32 bits of the content's sha256, the first (0), the second (1), and so on."""
        digest = hashlib.sha256(self.content.encode()).hexdigest()
        return int(digest[8 * place : 8 * place + 8], 16)


def read_documents(path: str | Path) -> list[Document]:
    """Read the documents of a data file, or of a hub's data set (``hub:NAME``).

    JSON lines, a JSON array, CSV, TSV, Parquet, or plain text, one document a line.
    """
    if str(path).startswith(HUB):
        return [as_document(row, where) for where, row in hub_rows(str(path))]
    return parse_documents(read_bytes(path), Path(path))


def read_bytes(path: str | Path) -> bytes:
    """Read a data file; raises InputError where there is none."""
    if not Path(path).is_file():
        raise InputError(f"no such data file: {path}")
    return Path(path).read_bytes()


def parse_documents(content: bytes, path: Path) -> list[Document]:
    """Make documents of the `content` of the data file `path`."""
    return [as_document(row, where) for where, row in rows_of(content, path)]


def as_document(fields: Any, where: str = "document") -> Document:
    """A text or a mapping with a document's fields, as a `Document`; see `documents.formats`."""
    if isinstance(fields, Document):
        return fields
    if isinstance(fields, str):
        return _checked(Document(text=fields), where)
    if not isinstance(fields, dict):
        raise InputError(
            f'{where} has {type(fields).__name__}: expected an object with the string "text", '
            'or the strings "prompt" and "response"'
        )
    return _checked(Document(**fields_of(fields, where)), where)


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

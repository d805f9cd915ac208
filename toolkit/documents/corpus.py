"""A corpus: the documents of a run, read once, split once and tokenised once."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch

from toolkit.documents.batches import Batch, make_batches
from toolkit.documents.documents import Document, parse_documents, read_bytes, read_documents
from toolkit.documents.formats import HUB
from toolkit.documents.tokens import MAX_LENGTH, Encoded, Positions, encode_all
from toolkit.errors import InputError

REPORTING = 24  # prompts that report, where there are so many, though fewer are asked for
LEAST_TO_SPLIT = 2  # prompts on either side: of one there is no standard error


class Reading(TypedDict, total=False):
    """How documents become tokens and batches: the arguments of `Corpus.of`."""

    max_length: int
    positions: Positions
    batch_tokens: int
    seed: int


@dataclass(frozen=True)
class DataFile:
    """A data file, read once: its documents, and the sha256 of its bytes."""

    path: Path
    documents: list[Document]
    sha256: str

    @classmethod
    def read(cls, path: str | Path) -> "DataFile":
        """Read the data file at `path`, or a hub's data set."""
        if str(path).startswith(HUB):
            documents = read_documents(path)
            content = "\0".join(document.content for document in documents).encode()
        else:
            content = read_bytes(path)
            documents = parse_documents(content, Path(path))
        return cls(Path(path), documents, hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Corpus:
    """Documents as tokens, and the batches and prompts that are made of them.

    `encoded` are all documents, fit and held-out ones, in their order. `positions` says which
    tokens count, `batch_tokens` how many tokens a batch holds at most; `seed` draws the keys by
    which tokens are sampled. Make one with `of`, or with `ModelPair.corpus`.
    """

    encoded: tuple[Encoded, ...]
    positions: Positions = "all"
    batch_tokens: int = 2048
    pad_id: int = 0
    device: str | torch.device = "cpu"
    seed: int = 0

    @classmethod
    def of(
        cls,
        documents: Iterable[Any],
        tokenizer: Any,
        device: str | torch.device = "cpu",
        max_length: int = MAX_LENGTH,
        positions: Positions = "all",
        batch_tokens: int = 2048,
        seed: int = 0,
    ) -> "Corpus":
        """Split `documents` and tokenise each once.

        Raises InputError where there are fewer than two different ones, or none has two tokens.
        """
        encoded = tuple(encode_all(documents, tokenizer, max_length))
        return cls(encoded, positions, batch_tokens, pad_token(tokenizer), device, seed)

    @property
    def fit(self) -> list[Encoded]:
        """The documents that maps are fitted on."""
        return [document for document in self.encoded if not document.held_out]

    @property
    def held_out(self) -> list[Encoded]:
        """The documents that maps are judged on."""
        return [document for document in self.encoded if document.held_out]

    @property
    def sha256(self) -> str:
        """The hash of the tokens and of how they are read, on whichever device."""
        read = (self.encoded, self.positions, self.batch_tokens, self.pad_id, self.seed)
        return hashlib.sha256(repr(read).encode()).hexdigest()

    @cached_property
    def batches(self) -> list[Batch]:
        """All documents in batches of one side each, fit documents first."""
        return self._batched(self.encoded, self.batch_tokens)

    @cached_property
    def fit_batches(self) -> list[Batch]:
        """The fit documents in batches."""
        return [batch for batch in self.batches if not batch.held_out]

    def together(self, documents: Sequence[Encoded]) -> Batch:
        """Pad `documents`, all of one side, to one batch."""
        longest = max(len(document.ids) for document in documents)
        (batch,) = self._batched(documents, len(documents) * longest)
        return batch

    def asked(self, n: int | None = None) -> list[Encoded]:
        """Return the first `n` held-out documents (None: all), whose prompts are generated from."""
        return self.held_out[:n]

    def reporting(self, n: int | None = None) -> list[Encoded]:
        """Return the held-out documents whose prompts report what was chosen with `asked(n)`.

        They had no part in choosing: those of `asked(n)` that do not choose, and further ones where
        there are fewer than `REPORTING`. Empty where either side would have fewer than two.
        """
        asked = self.asked(n)
        ours = [document for document in asked if document.reports]
        more = [document for document in self.held_out[len(asked) :] if document.reports]
        found = ours + more[: max(REPORTING - len(ours), 0)]
        fewest = min(len(found), len(asked) - len(ours))
        return found if fewest >= LEAST_TO_SPLIT else []

    def prompts(self, n: int | None = None) -> list[tuple[int, ...]]:
        """Return the tokens of the prompts of the first `n` held-out documents (None: all)."""
        return [document.prompt_ids for document in self.asked(n)]

    def on(self, device: str | torch.device) -> "Corpus":
        """Return the same documents, with batches on `device`."""
        # As words: a name and a torch.device never compare as equal.
        return self if str(self.device) == str(device) else replace(self, device=device)

    def require_counted(self) -> None:
        """Raise InputError unless tokens of fit and of held-out documents count."""
        for held_out, name in ((False, "fit"), (True, "held-out")):
            if not any(b.counted.any() for b in self.batches if b.held_out == held_out):
                cut = any(
                    document.response_start is not None
                    and len(document.ids) <= document.response_start
                    for document in (self.held_out if held_out else self.fit)
                )
                remedy = (
                    "documents are cut before their response, raise --max-length"
                    if cut
                    else "give more or longer documents"
                )
                raise InputError(
                    f"no token of the {name} documents counts (positions: {self.positions}): "
                    f"{remedy}"
                )

    def _batched(self, documents: Sequence[Encoded], batch_tokens: int) -> list[Batch]:
        return make_batches(
            documents, self.positions, batch_tokens, self.pad_id, self.device, self.seed
        )


def pad_token(tokenizer: Any, rows: float = float("inf")) -> int:
    """The token that pads: the tokenizer's, or 0 where a model of `rows` embeddings lacks it.

    Padding is known by its place; any token will do.
    """
    found = tokenizer.pad_token_id or 0
    return found if found < rows else 0

"""Check that models can read tokens: those that they have embeddings of, at positions they know."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from toolkit.documents.corpus import Corpus, pad_token
from toolkit.documents.tokens import Encoded
from toolkit.errors import InputError
from toolkit.models.locations import learned_positions, n_embeddings


class Readers:
    """One model, or the two of a pair, and their tokenizer: what all of them can read."""

    def __init__(self, models: Sequence[nn.Module], tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._n_tokens = min(n_embeddings(model) for model in models)
        self._positions = min(learned_positions(model) for model in models)
        several = len(models) > 1
        self._whose = "models'" if several else "model's"
        self._who = "one of the models" if several else "the model"

    @property
    def pad_id(self) -> int:
        """The token that pads: the tokenizer's, where the models have it."""
        return pad_token(self.tokenizer, self._n_tokens)

    def checked(self, corpus: Corpus) -> Corpus:
        """Return `corpus` with a token that pads; raise InputError where it cannot be read."""
        self._require_documents(corpus.encoded)
        return corpus if corpus.pad_id == self.pad_id else replace(corpus, pad_id=self.pad_id)

    def require_prompts(
        self, prompts: Sequence[Sequence[int]], n_new: int, whose: str = "the data"
    ) -> None:
        """Raise InputError unless `prompts` can be read, and `n_new` tokens after each.

        `whose` says in the message where the prompts come from.
        """
        self._require_tokens(prompts, f"prompts of {whose}")
        longest = max(len(prompt) for prompt in prompts)
        if longest + n_new > self._positions:
            raise InputError(
                f"a prompt of {whose} has {longest} tokens, and with {n_new} new ones passes the "
                f"{self._whose} {self._positions} learned positions: leave out such long prompts "
                "(prompts are never cut), or generate fewer tokens"
            )

    def _require_documents(self, documents: Sequence[Encoded]) -> None:
        """Raise InputError where `documents` hold tokens or positions that a model lacks."""
        self._require_tokens([(*d.ids, *d.prompt_ids) for d in documents], "documents")
        longest = max(len(document.ids) for document in documents)
        if longest > self._positions:
            raise InputError(
                f"a document has {longest} tokens, the {self._whose} learned positions end at "
                f"{self._positions}: give --max-length {self._positions}"
            )

    def _require_tokens(self, rows: Sequence[Sequence[int]], what: str) -> None:
        """Raise InputError where `rows` hold a token that a model lacks."""
        largest = max(max(row) for row in rows)
        if largest >= self._n_tokens:
            raise InputError(
                f"{what} hold token {largest} ({self.tokenizer.decode([largest])!r}), which "
                f"{self._who} lacks (it has embeddings of {self._n_tokens} tokens): leave them "
                "out, or give the tokenizer that belongs to the weights"
            )

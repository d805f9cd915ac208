"""Where the difference sits: the rows of the tables ``tokens`` and ``prompts``."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.analysis.divergence import Divergences
from toolkit.documents.phases import ThinkingMarks, phases_said
from toolkit.documents.tokens import Encoded
from toolkit.evaluation.candidates import Candidate
from toolkit.evaluation.distributions import Distributions, NextTokens

Row = dict[str, Any]
SHOWN = 40  # tokens of each list
CONTEXT = 12  # tokens before one that are shown with it
LISTS = {"changed": "base", "left": "recommended"}  # whose distance from the tuned model it is


def token_rows(
    tokenizer: Any,
    found: Distributions,
    models: Mapping[str, Candidate],
    nats: Mapping[str, Divergences],
    marks: ThinkingMarks,
) -> list[Row]:
    """Return the tokens that hold most of what was changed, and most of what steering leaves."""
    text = _Text(tokenizer)
    following = {"tuned": found.next_tokens} | {
        short: found.likeness[models[name]].next_tokens
        for short, name in (("base", "base"), ("steered", "recommended"))
        if name in models
    }
    rows = []
    for of, name in LISTS.items():
        for place, (prompt, index, value) in enumerate(_largest(nats.get(name))):
            said, before = found.answers[prompt], found.prompts[prompt]
            rows.append(
                {
                    "of": of,
                    "place": place + 1,
                    "prompt": prompt,
                    "token_index": index,
                    "token": text.token(said[index]),
                    "phase": phases_said(before, said, marks)[index],
                    "nats": value,
                    "share": _share(value, nats[name]),
                    "n_tokens": int(nats[name].counted.sum()),
                    "context": text.of([*before, *said[:index]][-CONTEXT:]),
                    **{
                        f"next_{short}": text.next_tokens(likely, prompt, index)
                        for short, likely in following.items()
                    },
                }
            )
    return rows


def prompt_rows(
    tokenizer: Any, documents: Sequence[Encoded], nats: Mapping[str, Divergences]
) -> list[Row]:
    """Return each prompt's nats, summed over its tokens: base, and steered where there is such."""
    text, rows = _Text(tokenizer), []
    for index, document in enumerate(documents):
        asked = _quoted(document.prompt) if document.prompt else text.of(document.prompt_ids)
        row: Row = {"prompt": index, "text": asked}
        for short, name in (("base", "base"), ("steered", "recommended")):
            if name in nats:
                totals, counts = nats[name].by_prompt
                value = float(totals[index])
                row |= {"n_tokens": int(counts[index]), short: value}
                row[f"{short}_share"] = _share(value, nats[name])
        rows.append(row)
    return rows


def _largest(nats: Divergences | None) -> list[tuple[int, int, float]]:
    """Return prompt, index and nats of the tokens that have most of them, the most first."""
    if nats is None:
        return []
    every = [
        (int(prompt), int(index), float(nats.nats[prompt, index]))
        for prompt, index in nats.counted.nonzero().tolist()
    ]
    return sorted(every, key=lambda token: -token[2])[:SHOWN]


def _share(value: float, nats: Divergences) -> float:
    total = float(nats.by_prompt[0].sum())
    return value / total if total > 0 else 0.0


def _quoted(text: str) -> str:
    """Quote `text` as JSON does, so that spaces show and a line stays one."""
    return json.dumps(text, ensure_ascii=False)


class _Text:
    """Tokens as text in quotes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def of(self, ids: Sequence[int]) -> str:
        """Return several tokens as one text."""
        return _quoted(self._decoded(ids))

    def token(self, token: int) -> str:
        """Return one token with the space before it, which SentencePiece drops at a beginning."""
        text = self._decoded([token])
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        if piece.startswith("▁") and not text.startswith(" "):
            text = f" {text}"
        return _quoted(text)

    def next_tokens(self, likely: NextTokens, prompt: int, index: int) -> str:
        """Return the most likely next tokens with their probabilities."""
        ids, probabilities = (
            part[prompt, index].tolist() for part in (likely.ids, likely.probabilities)
        )
        pairs = zip(ids, probabilities, strict=True)
        return ", ".join(f"{self.token(token)} {p:.3f}" for token, p in pairs)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

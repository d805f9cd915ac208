"""Diagnoses of tiny models and the textbook beside them, each made once for all tests."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.support import tiny
from tests.support.textbook import Textbook
from toolkit import Options, Run, diagnose
from toolkit.documents.tokens import encode_all

N_NEW = 6
ENDS = {tiny.EOS, *range(20, 26)}  # many, so that some prompts end early
FEW = [{"text": "w5 w6 w7 w8"}, {"text": "w30 w11 w9"}, {"text": "w40 w21 w16 w5"}]
WITH_A_TAIL = ("llama", "gemma3", "gpt2", "phi3")
INSIDE = ("shared_reach", "forced_reach", "normalisation", "inner_pair", "first_order_scale")
INSIDE += ("mlp_fit", "weights")
FAMILIES = ("llama", "gemma3", "qwen3", "gpt2", "neox", "phi3", "opt")
CASES = [(family, torch.float64) for family in FAMILIES]
CASES += [(family, torch.float32) for family in ("llama", "gemma3", "qwen3", "gpt2")]
each_case = pytest.mark.parametrize(
    ("family", "dtype"), CASES, ids=[f"{f}-{str(t)[6:]}" for f, t in CASES]
)

# Relative to the quantity itself where it keeps its sign, else to its scale (a share's is 1).
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-5}


@dataclass
class Case:
    """A diagnosis and the textbook on the same models and documents."""

    run: Run
    book: Textbook
    prompts: list[tuple[int, ...]]
    reports: np.ndarray  # whether each prompt reports; the others choose
    parameters: int
    tolerance: float


@functools.cache
def case(family: str, dtype: torch.dtype) -> Case:
    tokenizer = tiny.make_tokenizer()
    pair = tiny.make_pair(family, dtype, tokenizer)
    pair.tuned.generation_config.eos_token_id = sorted(ENDS)
    options = Options(new_tokens=N_NEW, sample=1, batch_tokens=200)
    documents = tiny.make_documents(24)
    run = diagnose(pair, documents, options, show_progress=False)
    encoded = encode_all(documents, tokenizer)
    book = Textbook(pair.base, pair.tuned, [(e.ids, e.held_out) for e in encoded])
    prompts = [e.prompt_ids for e in encoded if e.held_out]
    reports = np.array([e.reports for e in encoded if e.held_out])
    return Case(run, book, prompts, reports, pair.n_parameters, TOLERANCE[dtype])


def assert_tables_equal(
    ours: pd.DataFrame, rows: Any, keys: list[str], rtol: float, atol: float = 0.0
) -> None:
    """The same rows by `keys`, and every other column of `rows` within tolerance."""
    theirs = pd.DataFrame(rows)
    both = theirs.merge(ours, on=keys, suffixes=("_book", ""), validate="one_to_one")
    assert len(both) == len(theirs) == len(ours)
    for column in set(theirs) - set(keys):
        expected, found = (both[c].to_numpy(float) for c in (f"{column}_book", column))
        np.testing.assert_allclose(found, expected, rtol, atol, err_msg=column)


@functools.cache
def few(family: str, dtype: torch.dtype) -> Run:
    """A diagnosis that looks at every counted token of few documents by itself."""
    pair = tiny.make_pair(family, dtype, tiny.make_tokenizer())
    options = Options(new_tokens=2, sample=100, shared_sample=8)
    return diagnose(pair, FEW, options, show_progress=False)


@functools.cache
def book_of_few(family: str) -> Textbook:
    """In float64, whatever the diagnosis ran in."""
    pair = tiny.make_pair(family, torch.float64, tiny.make_tokenizer())
    documents = encode_all(FEW, pair.tokenizer)
    return Textbook(pair.base, pair.tuned, [(e.ids, e.held_out) for e in documents])


def kl_tolerance(c: Case) -> tuple[float, float]:
    """A KL is second order in the logits' difference: where it is small, their rounding counts."""
    return c.tolerance, c.tolerance / 10


NONE = {"location": "", "kind": "none", "rank": None, "fit": "", "layers": "all", "target": ""}
ORACLE = {**NONE, "location": "post_block", "kind": "oracle"}


@functools.cache
def every_candidate(family: str, dtype: torch.dtype) -> list[tuple[dict, dict]]:
    """Every candidate that the run compared, with its divergences by the textbook.

    But for those before the MLP that are fitted through it and changes of weights, which have tests
    of their own.
    """
    c = case(family, dtype)
    found = [(NONE, c.book.divergences(c.prompts, N_NEW, ENDS))]
    found.append((ORACLE, c.book.divergences(c.prompts, N_NEW, ENDS, oracle=True)))
    names = list(NONE)
    for candidate in c.run.steerability.frame[names].to_dict("records")[2:]:
        if candidate["target"] == "block" or candidate["kind"] == "lora":
            continue
        maps = textbook_maps(family, dtype, *(candidate[n] for n in ("location", "rank", "fit")))
        if candidate["layers"] != "all":
            maps = {candidate["layers"]: maps[candidate["layers"]]}
        nats = c.book.divergences(c.prompts, N_NEW, ENDS, candidate["location"], maps)
        found.append((candidate, nats))
    return found


@functools.cache
def textbook_maps(family: str, dtype: torch.dtype, location: str, rank: int | str, fit: str):
    return case(family, dtype).book.maps(location, rank, fit)


def of_candidate(frame: pd.DataFrame, candidate: dict[str, Any]) -> pd.DataFrame:
    same = pd.Series(True, frame.index)
    for name, value in candidate.items():
        same &= frame[name].isna() if value is None else frame[name] == value
    return frame[same]


def n_numbers(candidate: dict[str, Any]) -> int:
    d, rank = tiny.D_MODEL, candidate["rank"]
    n_blocks = tiny.N_LAYERS if candidate["layers"] == "all" else 1
    if candidate["kind"] not in ("vector", "linear"):
        return 0
    return n_blocks * (d * d + d if rank == "full" else 2 * rank * d + d)

"""A first look: one adapter from a few documents, judged before the long work begins.

A map of rank 8 after the block is fitted block by block on a fifth of the fit documents. It is a
floor, and not a part of the run's tables. The tuned model's predictions on the way, which are as
large as the vocabulary, are not kept while the march runs: it answers these prompts twice.
"""

import math
from dataclasses import replace

from toolkit.analysis.divergence import recovered
from toolkit.documents.corpus import Corpus
from toolkit.documents.tokens import Encoded
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import evaluate
from toolkit.evaluation.reference import Reference
from toolkit.fitting.closed_form import fit_adapters
from toolkit.fitting.spec import FitSpec
from toolkit.models.pair import ModelPair
from toolkit.runtime.progress import progress

SHARE = 5  # one fit document in so many is read
LEAST = 4  # documents
SPEC = FitSpec.linear("post_block", 8, "forced")


def first_look(pair: ModelPair, corpus: Corpus, reference: Reference) -> str:
    """Show and return a sentence with what one adapter recovers; empty where there is no quick one.

    `reference` are the run's own prompts, of which some are used.
    """
    documents = _few(corpus)
    if sum(sum(d.counted(corpus.positions)) for d in documents) < pair.d_model:
        return ""
    with progress("a first look", 2) as advance:
        few = replace(corpus, encoded=tuple(documents))
        adapters = Candidate.of(fit_adapters(pair, few, [SPEC])[SPEC])
        advance()
        found = evaluate(pair, reference.for_a_first_look(), [adapters]).divergences
        advance()
        share, sem = recovered(found[adapters, "tuned"], found[NONE, "tuned"])
        error = "" if math.isnan(sem) else f" ± {sem:.2f}"
        said = (
            f"first look: a map of rank {SPEC.rank} after every block, fitted on "
            f"{len(documents)} documents, recovers {share:.2f}{error} of the KL on "
            f"{len(found[NONE, 'tuned'].nats)} prompts; what follows measures it, and all other "
            "places and sizes, on all documents"
        )
        advance.say(said)
    return said


def _few(corpus: Corpus) -> list[Encoded]:
    """Return the documents that are looked at; none where there are not enough to save time."""
    n = len(corpus.fit) // SHARE
    return corpus.fit[:n] if n >= LEAST else []

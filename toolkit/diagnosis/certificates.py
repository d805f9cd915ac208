"""Certificates: that a run's own prompts are read alike however they are read, and begin alike."""

from collections import Counter
from collections.abc import Sequence

from toolkit.documents.corpus import Corpus
from toolkit.evaluation.named_models import RUNNER_UP, NamedModels, each_model
from toolkit.models.verify import certify
from toolkit.runtime.check import Check, check
from toolkit.runtime.processes import ALONE, Processes


def certificates(
    models: NamedModels,
    corpus: Corpus,
    prompts: Sequence[Sequence[int]],
    processes: Processes = ALONE,
) -> list[Check]:
    """Check base, tuned and recommended on the shortest and the longest of `prompts`.

    Where all are of one length the shorter is the first half of a prompt. All `processes` share the
    models.
    """
    shortest, longest = min(prompts, key=len), max(prompts, key=len)
    if len(shortest) == len(longest):  # padding is tested too
        shortest = shortest[: -(-len(shortest) // 2)]
    two = [shortest, longest]
    shown = {name: put for name, put in models.items() if name != RUNNER_UP}
    found = each_model(
        shown, lambda name, model: certify(name, model, two, corpus.pad_id), processes
    )
    return [check_first_tokens(corpus, prompts), *found.values()]


def check_first_tokens(corpus: Corpus, prompts: Sequence[Sequence[int]]) -> Check:
    """Check that all documents and `prompts` begin with one token, which tells nothing apart."""
    texts = [document.ids for document in corpus.encoded]
    first, _ = Counter(ids[0] for ids in texts).most_common(1)[0]
    others = sum(ids[0] != first for ids in texts)
    asked = sum(prompt[0] != first for prompt in prompts)
    if not others + asked:
        return check("first tokens", True, f"all {len(texts)} documents begin with the same token")
    return Check(  # a fact about the documents, at which no adapter is at fault
        "first tokens",
        "not applicable",
        f"{others} of {len(texts)} documents and {asked} of the {len(prompts)} prompts that report "
        "begin with another token than most: what fine-tuning does at a first token is neither "
        "counted nor steered",
    )

"""Which documents choose and which report, by their hashes alone."""

import pytest

from toolkit.documents.corpus import LEAST_TO_SPLIT, REPORTING, Corpus

DOCUMENTS = [{"prompt": f"w5 w{5 + i % 30} w{5 + i // 30}", "response": "w7"} for i in range(400)]


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return Corpus.of(DOCUMENTS, tokenizer)


def test_reporting_documents_had_no_part_in_choosing(corpus):
    asked = corpus.asked()
    reporting = corpus.reporting()
    assert reporting == [document for document in asked if document.reports]
    assert REPORTING < len(reporting) < len(asked)


@pytest.mark.parametrize("n", range(1, 9))
def test_few_prompts_that_choose_are_reported_on_many(corpus, n):
    """However few prompts are asked for, further documents report, where two are left to choose."""
    asked, reporting = corpus.asked(n), corpus.reporting(n)
    choosing = [document for document in asked if not document.reports]
    assert not {id(d) for d in choosing} & {id(d) for d in reporting}
    assert len(reporting) == (REPORTING if len(choosing) >= LEAST_TO_SPLIT else 0)

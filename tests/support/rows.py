"""Rows of supervised tokens that the tests of training share."""

import numpy as np

from tests.support import tiny
from toolkit.documents.tasks.task import Example
from toolkit.training.examples import supervised


def make_rows(n=24, seed=0):
    """Prompts and responses of various lengths."""
    rng, tokenizer = np.random.default_rng(seed), tiny.make_tokenizer()
    return [
        supervised(Example(tiny.random_text(rng, a), tiny.random_text(rng, b), "?"), tokenizer, 64)
        for a, b in rng.integers(1, 9, (n, 2))
    ]

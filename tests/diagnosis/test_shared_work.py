"""A run that distils and searches for ranks does nothing again that a plain one has done."""

import hashlib
from collections import Counter
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch

from tests.support import tiny
from toolkit import FitSpec, Options, diagnose, fit_adapters
from toolkit.evaluation.reference import greedy
from toolkit.training.distillation import continuations

PLAIN = {"new_tokens": 4, "sample": 2, "shared_sample": 16}
DECOMPOSITIONS = {
    torch.linalg: ("cholesky", "cholesky_ex", "eigh", "eigvalsh", "svd", "svdvals", "qr", "inv"),
    scipy.linalg: ("eigh",),
}


def again(calls):
    """Count calls beyond the first of each key."""
    return sum(n - 1 for n in calls.values())


def counted(function, calls, key, *args, **kwargs):
    calls[key(*args)] += 1
    return function(*args, **kwargs)


def of_matrix(name, function, calls):
    return partial(counted, function, calls, lambda matrix, *_: (name, content(matrix)))


def content(matrix, *_):
    return hashlib.sha256(np.ascontiguousarray(matrix).tobytes()).hexdigest()


def work_of(pair, options):
    """Diagnose, and count decompositions by matrix, generations by prompts, samplings."""
    decompositions, generations, samplings = Counter(), Counter(), Counter()
    with pytest.MonkeyPatch.context() as patch:
        for library, names in DECOMPOSITIONS.items():
            for name in names:
                patch.setattr(
                    library, name, of_matrix(name, getattr(library, name), decompositions)
                )
        patch.setattr(
            "toolkit.evaluation.reference.greedy",
            partial(counted, greedy, generations, lambda _, prompts, *__: content(prompts.ids)),
        )
        patch.setattr(
            "toolkit.diagnosis.distilled.continuations",
            partial(counted, continuations, samplings, lambda *_: "all"),
        )
        run = diagnose(pair, tiny.make_documents(30), options, show_progress=False)
    return run, decompositions, generations, samplings


def test_distillation_and_the_search_for_ranks_share_what_is_there(llama_pair):
    plain, few, *_ = work_of(llama_pair, Options(**PLAIN))
    run, many, generations, samplings = work_of(llama_pair, Options(**PLAIN, max_kl=1e-9, distil=2))
    sets = len(run.rank_search.tried) - 1
    assert sets > 1
    # Every set of ranks is fitted by itself. In the first block, where nothing steers yet, that is
    # the forced fit once more: one factor and one set of eigenvectors.
    assert again(many) - again(few) == 2 * sets
    assert set(generations.values()) == {1}
    assert samplings == {"all": 1}
    for name in ("spectrum", "linear_fit", "norms"):
        assert plain.tables[name].frame.equals(run.tables[name].frame), name


@pytest.mark.parametrize(("fit", "expected"), [("sequential", 1), ("forced", 1), ("blended", 2)])
def test_a_fit_runs_the_blocks_that_it_reads(llama_pair, monkeypatch, fit, expected):
    """Passes of a base block over each batch: of the steered stream, and of the tuned one."""
    corpus, passes = llama_pair.corpus(tiny.make_documents(12)), Counter()
    runner = llama_pair.base_runner
    monkeypatch.setattr(
        runner, "run", partial(counted, runner.run, passes, lambda layer, *_: layer)
    )
    fit_adapters(llama_pair, corpus, [FitSpec.linear("post_block", 2, fit)])
    assert passes == dict.fromkeys(range(tiny.N_LAYERS), expected * len(corpus.fit_batches))

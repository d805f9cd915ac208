"""The best of several fits is the best of them on documents that none was fitted on."""

import torch

from tests.support import tiny
from toolkit.evaluation.allocation import allocated
from toolkit.evaluation.best_of import best_fit, candidates_of
from toolkit.fitting.spec import FitSpec
from toolkit.models.pair import ModelPair


def test_what_is_kept_recovers_most(tokenizer):
    pair = tiny.make_pair("llama", torch.float64, tokenizer)
    plans = candidates_of(FitSpec("post_block", "linear", 2, "sequential"))
    documents = tiny.make_documents(40)
    found, shares = best_fit(pair, documents, plans, new_tokens=6)
    assert {plan.fit for plan in plans} == {"forced", "sequential", "blended"}
    assert len(shares) == len(plans) == len({share for share, _ in shares.values()})
    best = max(shares, key=lambda plan: shares[plan][0])
    assert found.fit == best.fit
    assert found.info["recovered"]["mean"] == max(share for share, _ in shares.values())


def test_a_block_that_changed_alone_gets_the_ranks(tokenizer):
    """tuned = base but for block 1, whose forced delta is the only one that is not zero."""
    base = tiny.make_model("llama")
    tuned = tiny.copy_of(base)
    for name, parameter in tiny.blocks_of(tuned)[1].named_parameters():
        if "proj" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    pair = ModelPair.from_models(base, tuned, tokenizer)
    plan = allocated(
        pair, tiny.make_documents(30), FitSpec("post_block", "linear", 3, "sequential")
    )
    assert plan.rank == (1, 3 * tiny.N_LAYERS - 2, 1)

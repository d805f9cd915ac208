"""What a replica costs is read from the same prompts as everything else."""

import numpy as np

from tests.support import tiny
from toolkit.documents.tokens import encode_all
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import evaluate
from toolkit.fitting.closed_form import fit_adapters
from toolkit.fitting.spec import FitSpec
from toolkit.theory.replication import replicate
from toolkit.theory.replication_cost import replication_cost

DOCUMENTS, RANK = tiny.make_documents(40), 2


def test_the_cost_is_what_is_left_of_the_adapters_own_recovery(llama_pair):
    frame = replication_cost(llama_pair, DOCUMENTS, RANK, streams=("own",), n_prompts=4, n_new=5)
    assert len(frame) == 2 * 3
    for _, rows in frame.groupby("fit"):
        recovered = rows.set_index("adapter").recovered
        ours = rows.set_index("adapter").lost
        np.testing.assert_allclose(ours, recovered["post-MLP A"] - recovered, atol=1e-12)
        assert ours["post-MLP A"] == 0
        assert ours["post-block A P*"] != 0
    assert (frame.n_prompts == 4).all()
    assert (frame.recovered - (1 - frame.kl / frame.kl_base)).abs().max() < 1e-12
    assert frame.steer_r2_median.notna().tolist() == [False, True, False] * 2
    assert set(frame.parameters) == {tiny.N_LAYERS * (2 * RANK + 1) * tiny.D_MODEL}


def test_a_row_is_the_evaluation_of_its_adapters(llama_pair, tokenizer):
    """Fitted, replicated and evaluated by hand."""
    frame = replication_cost(
        llama_pair, DOCUMENTS, RANK, ("forced",), ("base",), n_prompts=3, n_new=4
    )
    plan = FitSpec("post_mlp", "linear", RANK, "forced")
    behind_mlp = fit_adapters(llama_pair, DOCUMENTS, [plan])[plan]
    made = Candidate.of(replicate(llama_pair, DOCUMENTS, behind_mlp, "base"))
    prompts = [e.prompt_ids for e in encode_all(DOCUMENTS, tokenizer) if e.held_out][:3]
    found = evaluate(llama_pair, prompts, [made], 4).divergences
    row = frame[frame.adapter == "post-block A P*"].iloc[0]
    assert row.kl == found[made, "tuned"].mean
    assert row.kl_base == found[NONE, "tuned"].mean

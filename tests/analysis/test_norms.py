"""The MLP's share of the branches' norms."""

import pytest
import torch

from toolkit.analysis.norms import branch_norms
from toolkit.statistics import NormSums


def norms_of(**lengths):
    sums = NormSums()
    one = torch.eye(3)[:1].double()
    sums.update({("base", name): length * one for name, length in lengths.items()})
    (row,) = branch_norms(sums.result())
    return row


def test_share_of_means():
    row = norms_of(pre_mlp=1.0, post_mlp=3.0, post_block=2.0)
    assert (row.of, row.pre_mlp, row.post_mlp, row.post_block) == ("base", 1, 3, 2)
    assert row.mlp_share == pytest.approx(0.75)


def test_a_share_of_nothing_is_zero_and_a_missing_branch_has_none():
    assert norms_of(pre_mlp=0.0, post_mlp=0.0, post_block=0.0).mlp_share == 0
    row = norms_of(post_block=2.0)
    assert row.mlp_share is row.pre_mlp is row.post_mlp is None

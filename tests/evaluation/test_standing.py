"""Checks what a comparison says while it runs: the best so far, on as many prompts."""

import torch

from toolkit.adapters.collection import Adapters
from toolkit.adapters.vector import FixedVector
from toolkit.evaluation.candidates import NONE, ORACLE, Candidate
from toolkit.evaluation.standing import Standing


def adapters(location):
    return Candidate.of(Adapters(location, {0: FixedVector(torch.zeros(2))}, "forced", {}))


def outcome(nats, n=2):
    return {"tuned.nats": torch.full((n, 3), nats), "tuned.counted": torch.ones(n, 3).bool()}


def test_better_ones_are_said_in_the_first_batch_and_the_best_after_later_ones():
    lines = []
    before, after = adapters("pre_mlp"), adapters("post_block")
    standing = Standing(lines.append, 2)
    standing.seen(None, {})
    for candidate, nats in ((NONE, 4.0), (ORACLE, 0.0), (before, 1.0), (after, 2.0)):
        standing.seen(candidate, outcome(nats))
    assert lines == [
        "best so far: pre-MLP vector forced recovers 0.750 of the KL on 2 prompts (1 of 2 looked "
        "at)"
    ]
    for candidate, nats in ((NONE, 4.0), (ORACLE, 0.0), (before, 4.0), (after, 1.0)):
        standing.seen(candidate, outcome(nats, 4))
    # 1 − (2·2 + 1·4) / (4·2 + 4·4) = 2/3; before the MLP 1 − (2 + 16) / 24
    assert lines[1:] == [
        "best so far: post-block vector forced recovers 0.667 of the KL on 6 prompts (2 of 2 "
        "looked at)"
    ]


def test_nothing_is_said_of_what_is_no_better_than_no_steering_or_stands_alone():
    lines = []
    standing = Standing(lines.append, 1)
    standing.seen(adapters("pre_mlp"), outcome(1.0))  # another process has no steering
    standing = Standing(lines.append, 1)
    standing.seen(NONE, outcome(1.0))
    standing.seen(adapters("pre_mlp"), outcome(2.0))
    assert lines == []

"""The gates: fixed in evaluation, hard-concrete draws in training."""

import pytest
import torch

from toolkit.adapters.gated_heads import GatedHeads

HEADS, HEAD_DIM = 6, 4
LOGITS = (-4.0, -2.0, -0.5, 0.0, 1.0, 3.0)


def gated(logits=LOGITS, l0=0.5):
    """Scales of 2 and vectors of 3, so that a gate can be read off what is added."""
    shape = (HEADS, HEAD_DIM)
    gates = torch.tensor([logits, logits[::-1]])
    return GatedHeads(torch.full(shape, 2.0), torch.full(shape, 3.0), gates, l0)


def test_the_formula():
    """``g^m a ⊙ z + g^a v``, head by head."""
    adapter = gated()
    states = torch.randn(2, 5, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(0))
    scales, vectors = adapter.open_gates()
    change = adapter(states)
    for head in range(HEADS):
        part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        expected = scales[head] * 2 * states[..., part] + vectors[head] * 3
        assert torch.allclose(change[..., part], expected)


def test_in_evaluation_gates_are_fixed_and_may_be_shut_or_open():
    """``clip(1.2 σ(logit) − 0.1, 0, 1)``: exactly 0 and 1 can be reached."""
    adapter = gated((-10.0, -3.0, -1.0, 0.0, 3.0, 10.0))
    first = adapter.open_gates()
    assert torch.equal(adapter.open_gates(), first)
    assert first[0, 0] == 0
    assert first[0, 1] == 0
    assert first[0, 3] == pytest.approx(0.5)
    assert first[0, 4] == 1
    assert first[0, 5] == 1
    assert 0 < first[0, 2] < 0.5
    assert torch.equal(first[1], first[0].flip(0))
    shut = GatedHeads(adapter.scale, adapter.vector, torch.full((2, HEADS), -10.0))
    assert not shut(torch.randn(3, HEADS * HEAD_DIM)).any()


def test_in_training_gates_are_drawn_with_the_known_chances():
    """P(open at all) is ``σ(logit − β log(0.1/1.1))``; `penalty` is its sum times `l0`.

    P(fully open), by the symmetry of the distribution, is P(open at all) at minus the logit turned
    round. Each share of 20,000 draws is within five standard errors.
    """
    adapter = gated()
    adapter.train()
    torch.manual_seed(0)
    n = 20_000
    with torch.no_grad():
        draws = torch.stack([adapter.open_gates() for _ in range(n)])
    assert draws.min() == 0
    assert draws.max() == 1
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    shift = 2 / 3 * torch.log(torch.tensor(0.1 / 1.1, dtype=torch.float64))
    expected = torch.sigmoid(logits - shift)
    fully = 1 - torch.sigmoid(-logits - shift)
    for row, (some, all_) in enumerate(
        [(expected, fully), (expected.flip(0), fully.flip(0))],
    ):
        for chance, seen in ((some, draws[:, row] > 0), (all_, draws[:, row] == 1)):
            error = (chance * (1 - chance) / n).sqrt()
            assert ((seen.double().mean(0) - chance).abs() < 5 * error).all()
    n_open = (draws > 0).double().sum((1, 2))
    error = float(n_open.std()) / n**0.5
    assert float(adapter.penalty()) / adapter.l0 == pytest.approx(
        float(n_open.mean()), abs=5 * error
    )


def test_without_l0_there_is_no_penalty_and_with_it_gates_are_pulled_shut():
    assert gated(l0=0.0).penalty() == 0
    adapter = gated()
    adapter.requires_grad_(True)
    adapter.penalty().backward()
    assert (adapter.gates.grad > 0).all()


def test_each_pass_in_training_draws_anew_and_reaches_the_gates_by_gradients():
    adapter = gated((0.0,) * HEADS)
    adapter.requires_grad_(True).train()
    torch.manual_seed(0)
    states = torch.ones(1, HEADS * HEAD_DIM)
    passes = [adapter(states) for _ in range(20)]
    assert not torch.equal(passes[0], passes[1])
    sum(change.sum() for change in passes).backward()
    assert (adapter.gates.grad != 0).all()
    adapter.eval()
    assert torch.equal(adapter(states), adapter(states))

"""A matrix's change: singular values by numpy, and what lies outside its columns by hand."""

import numpy as np
import pytest
import torch

from tests.support import textbook
from toolkit.analysis.weight_change import singular_values, weight_row
from toolkit.blocks.mlp import Change


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def of(weight, *factors):
    return weight_row(weight, Change(factors, weight.new_zeros(len(weight))))


@pytest.mark.parametrize("shape", [(8, 8), (6, 15), (15, 6)])
def test_every_number_is_numpys(shape):
    W, dW = draw(*shape), 0.1 * draw(*shape, seed=1)
    expected = textbook.weight_row(W.numpy(), dW.numpy())
    assert vars(of(W, dW)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", [(8, 8), (6, 15), (15, 6)])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_loras_numbers_are_those_of_its_product(shape, rank):
    """Without the product: its rank is that of the factors, exactly."""
    W, B, A = draw(*shape), draw(shape[0], rank, seed=1), draw(rank, shape[1], seed=2)
    expected = textbook.weight_row(W.numpy(), (B @ A).numpy())
    found = of(W, B, A)
    assert vars(found) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found.rank == rank
    values = singular_values(Change((B, A), W.new_zeros(len(W))))
    assert values.shape == (rank,)
    assert values.numpy() == pytest.approx(np.linalg.svd(B @ A, compute_uv=False)[:rank])


def test_dense_singular_values_are_numpys():
    dW = draw(7, 12) @ torch.diag(torch.logspace(0, -6, 12).double())
    found = singular_values(Change((dW,), dW.new_zeros(7)))
    assert found.numpy() == pytest.approx(np.linalg.svd(dW, compute_uv=False), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dense_changes_rank_is_that_of_the_product(dtype):
    """As merged from a LoRA of rank 3 and written out."""
    dW = (draw(20, 3) @ draw(3, 15, seed=1)).to(dtype)
    assert of(draw(20, 15, seed=2).to(dtype), dW).rank == 3


def test_by_hand():
    """ΔW = diag(3, 4, 0), W = 2 I: norms 4 and 5, of 25 there are 9 and 16 squares."""
    row = of(2 * torch.eye(3).double(), torch.diag(torch.tensor([3.0, 4.0, 0.0]).double()))
    assert (row.rows, row.columns, row.rank, row.k90) == (3, 3, 2, 2)
    assert (row.norm_2, row.norm_fro) == pytest.approx((4, 5))
    assert row.relative == pytest.approx(5 / 12**0.5)
    assert row.stable_rank == pytest.approx(25 / 16)
    assert row.outside == 0


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("shape", [(9, 9), (9, 14), (14, 9)])
def test_what_lies_outside_by_a_known_share(factored, shape):
    """W of rank 4; ΔW of rank 2, one direction in col(W) and one orthogonal to it, 1 to 3."""
    U = torch.linalg.qr(draw(shape[0], shape[0]))[0]
    V = torch.linalg.qr(draw(shape[1], 2, seed=1))[0]
    W = U[:, :4] @ draw(4, shape[1], seed=2)
    B = torch.stack([U[:, 0], 3 * U[:, -1]], 1)
    factors = (B, V.T) if factored else (B @ V.T,)
    assert of(W, *factors).outside == pytest.approx(0.9, abs=1e-10)


@pytest.mark.parametrize("factored", [True, False])
def test_a_tall_matrix_leaves_directions_out_though_its_rank_is_full(factored):
    """A gate has more rows than columns: against numpy's projection."""
    W, B, A = draw(14, 5), draw(14, 2, seed=1), draw(2, 5, seed=2)
    Q = np.linalg.qr(W.numpy())[0]
    product = (B @ A).numpy()
    expected = np.sum((product - Q @ Q.T @ product) ** 2) / np.sum(product**2)
    factors = (B, A) if factored else (B @ A,)
    assert of(W, *factors).outside == pytest.approx(expected, rel=1e-10)
    assert 0.3 < expected < 1


@pytest.mark.parametrize("shape", [(6, 6), (6, 9)])
def test_a_wide_matrix_of_full_rank_reaches_all(shape):
    assert of(draw(*shape), draw(*shape, seed=1)).outside == 0


@pytest.mark.parametrize("shape", [(6, 6), (6, 9), (9, 6)])
def test_directions_that_float32_cannot_hold_are_outside(shape):
    """Singular values 1, 10⁻³ and 10⁻⁸: the last is rounding. ΔW lies along them, 1 to 2 to 4."""
    U, V = (torch.linalg.qr(draw(n, 3, seed=n))[0] for n in shape)
    W = U @ torch.diag(torch.tensor([1, 1e-3, 1e-8]).double()) @ V.T
    sizes = torch.diag(torch.tensor([1.0, 2.0, 4.0]).double())
    assert of(W, U @ sizes @ V.T).outside == pytest.approx(16 / 21, abs=1e-8)


def test_what_did_not_change_is_zero():
    row = of(draw(4, 3), torch.zeros(4, 3).double())
    assert (row.rows, row.columns) == (4, 3)
    assert not any(list(vars(row).values())[2:])


def test_a_matrix_of_zeros_changes_by_infinitely_much():
    """All of it lies outside the columns."""
    row = of(torch.zeros(4, 3).double(), draw(4, 3))
    assert row.relative == float("inf")
    assert row.outside == pytest.approx(1)

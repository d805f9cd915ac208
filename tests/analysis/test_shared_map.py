"""One map for all tokens: cases with a known answer, dense least squares, and early stopping."""

import numpy as np
import pytest
import torch

from toolkit.analysis.shared_map import Problem, explained, fit_shared
from toolkit.blocks.jacobian import Jacobian


class Matrices(Jacobian):
    """A Jacobian that is written out, `[n, d_out, d_in]`."""

    def __init__(self, J):
        self.J = J

    def push(self, v):
        return torch.einsum("noi,n...i->n...o", self.J, v)

    def pull(self, u):
        return torch.einsum("noi,n...o->n...i", self.J, u)

    def dense(self):
        return self.J

    def tokens(self, some):
        return Matrices(self.J[some])


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(J, x, wanted, dtype=torch.float64):
    J = J.expand(len(x), -1, -1)
    return Problem(Matrices(J.to(dtype)), x.to(dtype), wanted.to(dtype))


def share(p, shared):
    """What the map explains, by numpy."""
    left = p.wanted - p.jacobian.push(shared(p.x))
    return 1 - float((left**2).sum() / (p.wanted**2).sum())


def well_conditioned(d, seed):
    U, _, Vt = torch.linalg.svd(draw(d, d, seed=seed))
    return U @ torch.diag(torch.linspace(1, 3, d).double()) @ Vt


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_identity_recovers_the_map(dtype):
    """J = I and v = B₀ x + c₀: B₀ and c₀ themselves."""
    x = draw(300, 6) + 2
    B, c = draw(6, 6, seed=1), draw(6, seed=2)
    p = problem(torch.eye(6), x, x @ B.T + c, dtype)
    maps = fit_shared(p, p, iterations=40)
    full = maps["full"]
    assert full.bias.dtype == dtype
    np.testing.assert_allclose(full.matrix, B, atol=1e-4)
    np.testing.assert_allclose(full.bias, c, atol=1e-3)
    np.testing.assert_allclose(full(p.x), p.wanted, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_map_of_low_rank_is_found_at_its_rank(rank):
    """And no sooner: one rank less leaves something, in as few iterations as there are."""
    x = draw(300, 8)
    B = draw(8, rank, seed=1) @ draw(rank, 8, seed=2)
    p = problem(well_conditioned(8, 3), x, x @ B.T + 1)
    p = Problem(p.jacobian, x, p.jacobian.push(x @ B.T + 1))
    maps = fit_shared(p, p, (0, 1, 2, "full"))
    assert np.linalg.matrix_rank(maps[rank].matrix) == rank
    assert share(p, maps[rank]) > 0.999
    assert share(p, maps[rank - 1]) < 0.95
    assert share(p, fit_shared(p, p, (rank,), iterations=60)[rank]) == pytest.approx(1, abs=1e-8)


def test_what_is_wanted_of_all_alike_is_one_vector():
    """v = J c: rank 0 explains all, and no rank is worse."""
    x, J = draw(200, 6), well_conditioned(6, 1)
    p = problem(J, x, (J @ draw(6, seed=2)).expand(200, -1))
    maps = fit_shared(p, p, iterations=40)
    np.testing.assert_allclose(maps[0].bias, draw(6, seed=2), atol=1e-6)
    assert maps[0].matrix is None
    assert maps[0](x).shape == (200, 6)
    for shared in maps.values():
        assert share(p, shared) == pytest.approx(1, abs=1e-10)


def reduced_rank(J, x, v, rank):
    """``min Σ‖v − J (B x + c)‖²`` with B of `rank`, for one J: what is explained.

    In coordinates J Δ it is reduced-rank regression of v on x.
    """
    X, V = (t.numpy() - t.numpy().mean(0) for t in (x, v))
    fitted = X @ np.linalg.lstsq(X, V, rcond=None)[0]
    if rank != "full":
        top = np.linalg.svd(fitted, full_matrices=False)[2][:rank]
        fitted = fitted @ top.T @ top
    return 1 - np.sum((V - fitted) ** 2) / np.sum(v.numpy() ** 2)


@pytest.mark.parametrize("rank", [0, 1, 4, "full"])
def test_with_one_jacobian_it_is_reduced_rank_regression(rank):
    """In the metric JᵀJ; the rank's directions are found from a noisy estimate of that metric."""
    x, J = draw(400, 8) @ draw(8, 8, seed=1), well_conditioned(8, 2)
    v = torch.tanh(x @ draw(8, 8, seed=3)) + 0.3 * draw(400, 8, seed=4) + 0.2
    p = problem(J, x, v)
    best = reduced_rank(J, x, v, rank)
    found = share(p, fit_shared(p, p, (rank,), iterations=200)[rank])
    assert found <= best + 1e-10
    assert found == pytest.approx(best, abs=1e-8 if rank in (0, "full") else 5e-3)
    few = share(p, fit_shared(p, p, (rank,))[rank])
    assert best - 0.03 < few <= best + 1e-10


def least_squares(J, x, v, rank):
    """Dense: ``J (B x + c)`` is linear in B and c, with design matrix ``[x ⊗ J, J]``."""
    J, x, v = J.numpy(), x.numpy(), v.numpy()
    rows = J
    if rank == "full":
        design = [np.hstack([np.kron(t, M), M]) for M, t in zip(J, x, strict=True)]
        rows = np.stack(design)
    A = rows.reshape(-1, rows.shape[-1])
    solution = np.linalg.lstsq(A, v.reshape(-1), rcond=None)[0]
    return 1 - np.sum((v.reshape(-1) - A @ solution) ** 2) / np.sum(v**2), solution


@pytest.mark.parametrize("rank", [0, "full"])
@pytest.mark.parametrize("d_out", [6, 9])
def test_with_a_jacobian_for_every_token_it_is_least_squares(rank, d_out):
    """d = 6: the dense normal equations can be written down."""
    d, n = 6, 150
    J, x, v = 1 + draw(n, d_out, d, seed=1), draw(n, d, seed=2), draw(n, d_out, seed=3)
    v += torch.einsum("noi,ni->no", J, x @ draw(d, d, seed=4))
    best, solution = least_squares(J, x, v, rank)
    p = problem(J, x, v)
    shared = fit_shared(p, p, (rank,), iterations=500)[rank]
    assert share(p, shared) == pytest.approx(best, abs=1e-10)
    np.testing.assert_allclose(shared.bias, solution[-d:], atol=1e-4)
    if rank == "full":
        matrix = solution[:-d].reshape(d, d).T  # kron(x, J): x's index is the slower one
        np.testing.assert_allclose(shared.matrix, matrix, atol=1e-4)


def test_more_ranks_explain_more_and_none_more_than_full():
    d, n = 6, 200
    J, x = draw(n, d, d, seed=1), draw(n, d, seed=2)
    p = problem(J, x, torch.einsum("noi,ni->no", J, torch.tanh(x @ draw(d, d, seed=4))))
    maps = fit_shared(p, p, (0, 1, 2, 4, "full"), iterations=300)
    shares = [share(p, shared) for shared in maps.values()]
    assert list(maps) == [0, 1, 2, 4, "full"]
    assert (np.diff(shares) > -1e-9).all()
    for rank in (1, 2, 4):
        assert np.linalg.matrix_rank(maps[rank].matrix.numpy(), rtol=1e-9) == rank


def test_validation_stops_what_would_only_fit_noise():
    """v of noise alone: stopped by other tokens, it does less harm on those and on new ones."""
    d = 12
    tokens = [problem(torch.eye(d), draw(30, d, seed=s), draw(30, d, seed=s + 9)) for s in range(3)]
    fit, validation, new = tokens
    stopped = fit_shared(fit, validation, iterations=40)["full"]
    overfitted = fit_shared(fit, fit, iterations=40)["full"]
    assert share(fit, overfitted) > 0.3 > share(fit, stopped)
    assert share(new, overfitted) < share(new, stopped)
    assert share(validation, stopped) >= 0


def test_validation_lets_a_true_map_be():
    """Where new tokens follow the same map, nothing is stopped short."""
    B, J = draw(6, 6, seed=1), well_conditioned(6, 2)
    tokens = [problem(J, x, x @ (J @ B).T) for x in (draw(100, 6, seed=s) for s in (3, 4, 5))]
    maps = fit_shared(*tokens[:2])
    assert share(tokens[2], maps["full"]) > 0.9999


def test_explained_is_a_quotient_of_sums_and_its_error_a_bootstraps():
    rng = np.random.default_rng(0)
    wanted = rng.standard_normal((150, 4)) * rng.exponential(size=(150, 1))
    left = 0.6 * wanted + 0.3 * rng.standard_normal((150, 4))
    found, sem = explained(torch.from_numpy(left), torch.from_numpy(wanted))
    assert found == pytest.approx(1 - np.sum(left**2) / np.sum(wanted**2), abs=1e-12)
    draws = rng.integers(0, 150, (4000, 150))
    numerators, denominators = (np.sum(t**2, 1)[draws].sum(1) for t in (left, wanted))
    assert sem == pytest.approx(np.std(1 - numerators / denominators), rel=0.1)
    single = explained(torch.from_numpy(left[:1]), torch.from_numpy(wanted[:1]))
    assert np.isnan(single[1])


def test_a_few_tokens_with_large_jacobians_do_not_stop_a_short_fit():
    """Three of 1,600 tokens amplify one direction by hundreds (massive activations do).

    One iteration is enough where every token is probed: the others' share is what is explained.
    """
    n, d = 1600, 8
    J = well_conditioned(d, 1).expand(n, d, d).clone()
    u = torch.nn.functional.normalize(draw(d, seed=2), dim=0)
    J[[1300, 1400, 1500]] += 300 * torch.outer(u, u)
    x = draw(n, d, seed=3)
    wanted = (draw(d, d, seed=4) @ x.T).T + 5 * draw(d, seed=5)
    wanted[[1300, 1400, 1500]] = 0
    p = Problem(Matrices(J), x, wanted)
    maps = fit_shared(p, p, (0, 2, "full"), iterations=1)
    others = Problem(Matrices(J[:1024]), x[:1024], wanted[:1024])
    assert share(others, fit_shared(others, others, (0,), iterations=1)[0]) > 0.5
    assert share(p, maps[0]) > 0.4
    assert share(p, maps["full"]) > 0.6


def test_a_first_iterate_that_is_worse_for_validation_is_gone_on_from():
    """A fit of one iteration does not stay at nothing because its first step was too far."""
    x = draw(400, 6)
    c = torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    J = torch.eye(6, dtype=torch.float64).repeat(400, 1, 1)
    J[:, 1, 1] = 0.0
    J[0] = torch.diag(torch.tensor([1.0, 4000, 1, 1, 1, 1], dtype=torch.float64))
    wanted = c.expand(400, 6).clone()
    wanted[0, 1] = 3e3
    fit = Problem(Matrices(J), x, wanted)
    judge = Problem(Matrices(J[1:]), x[1:], wanted[1:])
    found = fit_shared(fit, judge, (0,), iterations=1)[0]
    assert share(judge, found) > 0.5

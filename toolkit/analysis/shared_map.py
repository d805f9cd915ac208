"""One steering map for all tokens: what a real adapter before a Jacobian can bring about.

``Δ = B x + c`` minimises ``E‖v − J Δ‖²`` over the fit tokens, J each token's own Jacobian and v
what it should bring about. Nothing is a d² × d² system: conjugate gradients on the normal equations
(CGLS, Hestenes and Stiefel 1952) with one Jacobian product each way an iteration, in coordinates
where the tokens' mean ``JᵀJ`` and the covariance of x are the identity. Stopping early is what
regularises; when to stop is read off validation tokens, which are fit tokens too.

Rank r: the leading r singular directions of B in those coordinates (exact if ``JᵀJ`` were the same
for all tokens), then B's left factor and c are fitted again. Rank 0 is one vector for all tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import torch
from torch import Tensor

from toolkit.analysis.linear_fit import Rank, leading_part, ranks_below
from toolkit.blocks.jacobian import Jacobian

SHARED_RANKS: tuple[Rank, ...] = (0, 1, 8, 32, "full")
_SHRINK = 1e-2  # of the mean JᵀJ towards a multiple of the identity, in the preconditioner
_RELATIVE_RIDGE = 1e-4  # of the covariance of x, where it is whitened
# Random pulls that estimate the mean JᵀJ, at most four a token, at least one of each: a few tokens
# whose Jacobians are a hundred times larger would spoil the coordinates if they were left out.
PROBES = 4096
TOGETHER = 1024  # tokens whose products are made at a time: an MLP's inner states stay in the cache


@dataclass(frozen=True)
class Problem:
    """Tokens with what a map of their states `x` `[n, d_x]` should bring about, `wanted` `[n, d]`,
    through `jacobian`.
    """

    jacobian: Jacobian
    x: Tensor
    wanted: Tensor

    @cached_property
    def jacobians(self) -> list[Jacobian]:
        """The Jacobian of `TOGETHER` tokens each."""
        starts = range(0, len(self.x), TOGETHER)
        return [self.jacobian.tokens(slice(start, start + TOGETHER)) for start in starts]


@dataclass(frozen=True)
class SharedMap:
    """``Δ = B x + c``: `matrix` `[d, d_x]` (None for one vector), `bias` `[d]`.

    `remaining` is what it leaves of what is wanted of the tokens that it was fitted on, and of
    those that stopped it, `[n, d]`.
    """

    matrix: Tensor | None
    bias: Tensor
    remaining: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        if self.matrix is None:
            return self.bias.expand(len(x), -1)
        return x @ self.matrix.T + self.bias

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return ``B = up @ down``, `[d, r]` and `[r, d_x]`, of a map of rank r."""
        assert self.matrix is not None
        return leading_part(self.matrix, rank)


def probes_each(n: int) -> int:
    """Return how often each of `n` fit tokens is probed."""
    return max(1, min(4, PROBES // max(n, 1)))


def fit_shared(
    fit: Problem,
    validation: Problem,
    ranks: Sequence[Rank] = SHARED_RANKS,
    iterations: int = 4,
    seed: int = 0,
) -> dict[Rank, SharedMap]:
    """Return the shared map of every rank, fitted on `fit`, each stopped by `validation`."""
    scale = _Coordinates.of(fit, seed)
    inputs = [scale.whiten(problem.x) for problem in (fit, validation)]
    problems = (fit, validation)
    nothing = [z[:, :0] for z in inputs]
    d_in, d_x = len(scale.root), fit.x.shape[1]
    still = (fit.x.new_zeros(d_in, 0), fit.x.new_zeros(d_in))
    wanted = (fit.wanted, validation.wanted)
    (_, vector), remaining = _cgls(problems, nothing, scale, still, iterations, wanted)
    maps: dict[Rank, SharedMap] = {
        0: SharedMap(None, scale.unscale(vector), torch.cat(tuple(remaining)))
    }
    start = (fit.x.new_zeros(d_in, d_x), vector)
    (first, bias), remaining = _cgls(problems, inputs, scale, start, iterations, remaining)
    cut = [rank for rank in ranks_below(d_x, ranks) if rank != "full" and rank > 0]
    if cut:
        up, down = leading_part(first, max(cut))
    widest = (first, bias), remaining
    for rank in cut:
        features = [z @ down[:rank].T for z in inputs]
        start = (up[:, :rank], bias)
        (factor, c), remaining = _cgls(problems, features, scale, start, iterations)
        widest = (factor @ down[:rank], c), remaining
        maps[rank] = scale.map(*widest[0], remaining)
    if "full" in ranks:  # on from the widest: so that its rank costs it nothing
        start, remaining = widest
        found, remaining = _cgls(problems, inputs, scale, start, iterations, remaining)
        maps["full"] = scale.map(*found, remaining)
    return maps


def explained(left: Tensor, wanted: Tensor) -> tuple[float, float]:
    """``1 − Σ‖left‖² / Σ‖wanted‖²`` over tokens, and its standard error (delta method)."""
    numerator = left.double().square().sum(-1)
    denominator = wanted.double().square().sum(-1)
    ratio = float(numerator.sum() / denominator.sum())
    n = len(numerator)
    if n < 2:
        return 1 - ratio, float("nan")
    spread = float((numerator - ratio * denominator).std()) * n**0.5
    return 1 - ratio, spread / float(denominator.sum())


@dataclass(frozen=True)
class _Coordinates:
    """Say where the problem is well conditioned: ``z = W (x − x̄)``, ``Δ = root⁻ᵀ w``.

    `whitener` is W, `root` the Cholesky factor of the tokens' mean ``JᵀJ``.
    """

    mean: Tensor
    whitener: Tensor
    root: Tensor

    @classmethod
    def of(cls, fit: Problem, seed: int) -> "_Coordinates":
        x, n = fit.x, len(fit.x)
        centred = (x - x.mean(0)).double()
        whitener = torch.linalg.inv(_root(centred.T @ centred / n, _RELATIVE_RIDGE)).to(x.dtype)
        generator = torch.Generator().manual_seed(seed)
        probes = torch.randn(n, probes_each(n), fit.wanted.shape[1], generator=generator)
        pulled = fit.jacobian.pull(probes.to(x)).flatten(0, 1).double()
        root = _root(pulled.T @ pulled / len(pulled), _SHRINK).to(x.dtype)
        return cls(x.mean(0), whitener, root)

    def whiten(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.whitener.T

    def unscale(self, w: Tensor) -> Tensor:
        """``root⁻ᵀ w`` of rows w."""
        rows = w.reshape(-1, len(self.root))
        return torch.linalg.solve_triangular(self.root, rows, upper=False, left=False).view(w.shape)

    def rescale(self, pulled: Tensor) -> Tensor:
        """``root⁻¹ g`` of columns g: the adjoint of `unscale`."""
        return torch.linalg.solve_triangular(self.root, pulled, upper=False)

    def map(self, matrix: Tensor, bias: Tensor, remaining: Sequence[Tensor]) -> SharedMap:
        in_x = self.unscale((matrix @ self.whitener).T).T
        return SharedMap(in_x, self.unscale(bias) - in_x @ self.mean, torch.cat(tuple(remaining)))


def _root(second_moment: Tensor, relative_ridge: float) -> Tensor:
    """Return the Cholesky factor with a ridge relative to the mean eigenvalue."""
    d = len(second_moment)
    level = float(second_moment.trace()) / d or 1.0
    eye = torch.eye(d, device=second_moment.device).double()
    return torch.linalg.cholesky(second_moment + relative_ridge * level * eye)


Parameters = tuple[Tensor, Tensor]  # a factor [d, k] of k features, and a bias [d]


def _cgls(
    problems: tuple[Problem, Problem],
    features: Sequence[Tensor],
    scale: _Coordinates,
    start: Parameters,
    iterations: int,
    remaining: Sequence[Tensor] | None = None,
) -> tuple[Parameters, Sequence[Tensor]]:
    """Factor and bias that bring about most on the fit tokens, stopped by the validation ones.

    Of all iterates the one with the least validation error is returned, with what it leaves of what
    is wanted on both sides. Two worse ones in a row end it; a single iteration that is worse than
    `start` is followed by another. `remaining` is what `start` leaves, where that is known.
    """

    def effect(problem: Problem, z: Tensor, parameters: Parameters) -> Tensor:
        matrix, bias = scale.unscale(parameters[0].T).T, scale.unscale(parameters[1])
        pieces = zip(problem.jacobians, z.split(TOGETHER), strict=True)
        return torch.cat([jacobian.push_map(some, matrix, bias) for jacobian, some in pieces])

    def gradient(left: Tensor) -> Parameters:
        tokens = left.split(TOGETHER), features[0].split(TOGETHER)
        pieces = zip(problems[0].jacobians, *tokens, strict=True)
        pulled = [jacobian.pull_map(some, z) for jacobian, some, z in pieces]
        matrix, bias = (torch.stack(parts).sum(0) for parts in zip(*pulled, strict=True))
        return scale.rescale(matrix), scale.rescale(bias[:, None])[:, 0]

    parameters = start
    left = remaining or [
        p.wanted - effect(p, z, start) for p, z in zip(problems, features, strict=True)
    ]
    best, least, worse = (start, left), float(left[1].square().sum()), 0
    steepest = direction = gradient(left[0])
    size = _dot(steepest, steepest)
    for iteration in count(1):
        moved = [effect(p, z, direction) for p, z in zip(problems, features, strict=True)]
        step = size / max(float(moved[0].double().square().sum()), 1e-300)
        parameters = _plus(parameters, step, direction)
        left = [a - step * b for a, b in zip(left, moved, strict=True)]
        error = float(left[1].square().sum())
        if error < least:
            best, least, worse = (parameters, left), error, 0
        elif (worse := worse + 1) == 2:
            break
        if iteration >= iterations and best[0] is not start:  # another would not be taken
            break
        steepest = gradient(left[0])
        last, size = size, _dot(steepest, steepest)
        direction = _plus(steepest, size / last if last else 0.0, direction)
    return best


def _dot(a: Parameters, b: Parameters) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _plus(a: Parameters, by: float, b: Parameters) -> Parameters:
    return a[0] + by * b[0], a[1] + by * b[1]

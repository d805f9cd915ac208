"""What steering before a block's MLP can reach, as rows of tables.

Everything here works on the parts of one block (`BlockParts`) and on tokens that the march sampled
(`Sample`): the MLP as matrices, what fine-tuning changed of it, and the path that leads from the
attention branch through it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from toolkit.analysis.first_order import FirstOrderSums, first_order_terms
from toolkit.analysis.gate_up import inner_pair
from toolkit.analysis.reachability import BUDGETS, Reach, median, reach, residual_quartiles
from toolkit.analysis.shared_map import Problem, SharedMap, explained, fit_shared
from toolkit.blocks.jacobian import FunctionJacobian, MLPJacobian, matrix_of
from toolkit.blocks.mlp import MLP, MLPChange
from toolkit.blocks.parts import BlockParts, Sample
from toolkit.blocks.sublayer import MLPSublayer

Row = dict[str, Any]
TARGETS = ("down", "exact")  # the post's test, and all that fine-tuning did to the MLP
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
_VALIDATION = 5  # one fit token in so many stops the shared fits


def parts_tasks(
    parts: BlockParts, tokens: Sample, fit: Sample, held_out: Sample
) -> dict[str, Callable[[], list[Row]]]:
    """Return what gives the rows of one block, by table.

    `tokens` are analysed one by one; shared maps are fitted on `fit` and judged on `held_out`.
    """
    tasks: dict[str, Callable[[], list[Row]]] = {}
    if len(tokens):
        tasks["reachability"] = lambda: list(reachability_rows(parts, tokens.h))
        tasks["forced_reach"] = lambda: list(forced_reach_rows(parts, tokens))
        tasks["normalisation"] = lambda: list(normalisation_rows(parts, tokens))
    if len(fit) > _VALIDATION and len(held_out):
        tasks["shared_reach"] = lambda: list(shared_reach_rows(parts, fit, held_out))
        tasks["inner_pair"] = lambda: inner_pair_rows(parts, fit.h, held_out.h)
        both = torch.cat([fit.h, held_out.h])
        tasks["first_order_scale"] = lambda: list(scale_rows(parts, both))
    return tasks


def inner_pair_rows(parts: BlockParts, fit: Tensor, held_out: Tensor) -> list[Row]:
    """Maps inside the MLP, fitted on its inputs `fit` and judged on `held_out`, `[n, d]` each."""
    changes = (parts.mlp.to(fit.dtype, fit.device), parts.change.to(fit.dtype, fit.device))
    return [asdict(row) for row in inner_pair(*changes, fit, held_out)]


def reachability_rows(parts: BlockParts, h: Tensor) -> Iterator[Row]:
    """From the MLP's own input, for the targets that are not zero."""
    exact = parts.mlp.to(torch.float64, h.device)
    targets = mlp_targets(exact, parts.change, h)
    if not targets:
        return
    radii = _radii(h)
    wanted = torch.stack(list(targets.values()), 1)
    found = reach(matrix_of(MLPJacobian.at(parts.mlp.to(h.dtype, h.device), h)), wanted, radii)
    left = _through_real(exact, h, found, wanted)
    for i, target in enumerate(targets):
        for j, budget in enumerate(BUDGETS):
            yield {
                "target": target,
                "budget": budget,
                **residual_quartiles(found.residual[:, i, j]),
                "nonlinear_residual_median": median(left[:, i, j]),
                "min_norm_median": median(found.min_norm[:, i] / h.double().norm(dim=1)),
                "rank_median": median(found.rank),
                "n_tokens": len(h),
            }


def mlp_targets(mlp: MLP, change: MLPChange, h: Tensor) -> dict[str, Tensor]:
    """Return what fine-tuning did to `mlp` at `h`, `[n, d]` float64: ``down`` and ``exact``.

    `mlp` is in float64.
    """
    h = h.double()
    terms = first_order_terms(mlp, change.to(h.dtype, h.device), h)
    found = {name: getattr(terms, name) for name in TARGETS}
    return {name: v for name, v in found.items() if bool(v.any(1).all())}


def forced_reach_rows(parts: BlockParts, tokens: Sample) -> Iterator[Row]:
    """From every location, through norms and skip, on one scale: steering's size over the stream's.

    Target ``block`` is the forced delta of the block; ``down`` and ``exact`` are the MLP's, as they
    reach the stream.
    """
    x, forced_delta = tokens.stream, tokens.forced_delta
    if (
        parts.sublayer is None
        or x is None
        or forced_delta is None
        or not bool(forced_delta.any(1).all())
    ):
        return
    sublayer, radii = parts.sublayer.to(x.dtype, x.device), _radii(x)
    exact_tail = parts.sublayer.to(torch.float64, x.device)
    to_branch = sublayer.to_branch(x).dense()
    targets = _branch_targets(parts, exact_tail, x)
    if targets:
        wanted = torch.stack(list(targets.values()), 1)
        found = reach(to_branch.__getitem__, wanted, radii)
        left = _through_real(exact_tail.branch, x, found, wanted)
        for i, target in enumerate(targets):
            labels = {"location": "pre_mlp", "target": target}
            yield from _curve_rows(labels, found.residual[:, i], wanted[:, i], left[:, i])
    to_block = to_branch + torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    block = forced_delta.double()[:, None]
    found = reach(to_block.__getitem__, block, radii)
    left = _through_real(exact_tail, x, found, block)
    labels = {"location": "pre_mlp", "target": "block"}
    yield from _curve_rows(labels, found.residual[:, 0], block[:, 0], left[:, 0])
    yield from _head_rows(parts, tokens, to_block, exact_tail)
    added = (1 - radii / block.norm(dim=-1)).clamp_min(0)  # whatever is added arrives
    for location in ("post_mlp", "post_block"):
        labels = {"location": location, "target": "block"}
        yield from _curve_rows(labels, added, block[:, 0], added)


def _branch_targets(parts: BlockParts, sublayer: MLPSublayer, x: Tensor) -> dict[str, Tensor]:
    """`mlp_targets` as the stream sees them, after the norm on the MLP's output.

    `sublayer` is that of `parts` in float64: an MLP's matrices are not made twice.
    """
    h = sublayer.inputs(x.double())
    targets = mlp_targets(sublayer.mlp, parts.change, h)
    if sublayer.post is None or not targets:
        return targets
    y = sublayer.mlp(h)
    through = {"exact": sublayer.contributed(y + targets["exact"]) - sublayer.contributed(y)}
    if "down" in targets:
        through = {"down": FunctionJacobian(sublayer.post, y).push(targets["down"])} | through
    return through


def _head_rows(
    parts: BlockParts, tokens: Sample, to_block: Tensor, sublayer: Callable[[Tensor], Tensor]
) -> Iterator[Row]:
    """Yield each head alone: it moves the stream within what its slice of the projection spans."""
    x, forced_delta = tokens.stream, tokens.forced_delta
    if parts.heads is None or tokens.heads is None or x is None or forced_delta is None:
        return
    wanted = forced_delta.double()[:, None]
    for head, basis in enumerate(parts.heads.directions(tokens.heads).unbind(1)):
        found = reach((to_block @ basis).__getitem__, wanted, _radii(x))
        in_stream = found.steering @ basis.mT[:, None].double()
        moved = Reach(found.rank, found.residual, in_stream, found.min_norm)
        left = _through_real(sublayer, x, moved, wanted)
        labels = {"location": "heads", "head": head, "target": "block"}
        yield from _curve_rows(labels, found.residual[:, 0], wanted[:, 0], left[:, 0])


def _curve_rows(labels: Row, residual: Tensor, wanted: Tensor, left: Tensor) -> Iterator[Row]:
    """One row a budget: `residual` and `left` (through the real functions) `[n, b]`."""
    energy = wanted.square().sum(-1)
    for j, budget in enumerate(BUDGETS):
        share = float((residual[:, j].square() * energy).sum() / energy.sum())
        yield {
            **labels,
            "budget": budget,
            "explained": 1 - share,
            **residual_quartiles(residual[:, j]),
            "nonlinear_residual_median": median(left[:, j]),
            "n_tokens": len(residual),
        }


def normalisation_rows(parts: BlockParts, tokens: Sample) -> Iterator[Row]:
    """What the norms do to a small change, relative to what they are given; medians over tokens.

    A gain of 1: a change of 1% of the stream becomes one of 1% of the MLP's input, on average over
    directions. `radial_gain` is that of the stream's own direction, `post_gain` that of the norm
    after the MLP, `attention_share` the attention branch's contribution over the stream.
    """
    x = tokens.stream
    if parts.sublayer is None or x is None or tokens.attended is None:
        return
    x = x.double()
    sublayer = parts.sublayer.to(torch.float64, x.device)
    gain, radial = _gains(sublayer.norm, x)
    post_gain, _ = _gains(sublayer.post, sublayer.mlp(sublayer.inputs(x)))
    yield {
        "norm_gain": median(gain),
        "radial_gain": median(radial),
        "post_gain": median(post_gain),
        "attention_share": median(tokens.attended.double().norm(dim=1) / x.norm(dim=1)),
        "n_tokens": len(x),
    }


def _gains(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Relative gain over directions (root mean square) and of x's own direction, `[n]` each."""
    if norm is None:
        return x.new_ones(len(x)), x.new_ones(len(x))
    jacobian, scale = FunctionJacobian(norm, x), x.norm(dim=1) / norm(x).norm(dim=1)
    # Token by token: a Jacobian in float64 and what autograd keeps of it are large.
    matrix = matrix_of(jacobian)
    squares = torch.stack([matrix(token).square().sum() for token in range(len(x))])
    everywhere = squares.div(x.shape[1]).sqrt()
    radial = jacobian.push(x / x.norm(dim=1, keepdim=True)).norm(dim=1)
    return everywhere * scale, radial * scale


def shared_reach_rows(parts: BlockParts, fit: Sample, held_out: Sample) -> Iterator[Row]:
    """One map for all tokens, from the MLP's input."""
    like = (fit.h.dtype, fit.h.device)
    mlp, change = parts.mlp.to(*like), parts.change.to(*like)

    def at_mlp(target: str) -> Callable[[Sample], Problem]:
        def problem(s: Sample) -> Problem:
            wanted = getattr(first_order_terms(mlp, change, s.h), target)
            return Problem(MLPJacobian.at(mlp, s.h), s.h, wanted)

        return problem

    for target in TARGETS:
        labels = {"location": "mlp_in", "target": target}
        problem = at_mlp(target)
        stops = validating(len(fit))
        seen = problem(Sample(fit.h[~stops])), problem(Sample(fit.h[stops]))
        unseen = problem(held_out)
        if not any(bool(p.wanted.any()) for p in seen) or not bool(unseen.wanted.any()):
            continue
        judged = Judged(seen, unseen, mlp, held_out.h)
        for rank, shared in fit_shared(*seen).items():
            yield {**labels, "rank": rank} | judged.row(shared)


def validating(n: int) -> Tensor:
    """Return which of n fit tokens say when a shared fit is to stop: every fifth, bool `[n]`."""
    return torch.arange(n) % _VALIDATION == 0


class Judged:
    """Judge maps for all tokens by what they bring about, on fit tokens and on held-out ones.

    `function` is what the Jacobian is of; it is taken at `x` on the held-out tokens, and steered.
    """

    def __init__(
        self,
        seen: tuple[Problem, Problem],
        unseen: Problem,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
    ) -> None:
        self.wanted = torch.cat([problem.wanted for problem in seen])
        self.unseen, self.function, self.x = unseen, function, x
        self.plain = function(x)

    def row(self, shared: SharedMap) -> Row:
        """Return the numbers of one map."""
        unseen, steering = self.unseen, shared(self.unseen.x)
        reached = self.function(self.x + steering) - self.plain
        share, sem = explained(unseen.wanted - unseen.jacobian.push(steering), unseen.wanted)
        return {
            "explained_fit": explained(shared.remaining, self.wanted)[0],
            "explained_heldout": share,
            "explained_heldout_sem": sem,
            "nonlinear_heldout": explained(unseen.wanted - reached, unseen.wanted)[0],
            "size": float(steering.norm() / self.x.norm()),
            "n_fit": len(self.wanted),
            "n_heldout": len(unseen.x),
        }


def scale_rows(parts: BlockParts, h: Tensor, scales: Sequence[float] = SCALES) -> Iterator[Row]:
    """First order at multiples of the update."""
    mlp, change = parts.mlp.to(h.dtype, h.device), parts.change.to(h.dtype, h.device)
    for scale in scales:
        sums = FirstOrderSums(mlp, change.scaled(scale))
        sums.update(h)
        yield {"scale": scale, **asdict(sums.result()), "n_tokens": len(h)}


def _radii(states: Tensor) -> Tensor:
    """Return the budgets as norms, `[n, b]`."""
    sizes = states.double().norm(dim=1)[:, None]
    return sizes * torch.tensor(BUDGETS, dtype=torch.float64, device=states.device)


def _through_real(
    function: Callable[[Tensor], Tensor], x: Tensor, found: Reach, wanted: Tensor
) -> Tensor:
    """``‖f(x + Δ) − f(x) − v‖ / ‖v‖`` of every Δ in `found`, `[n, m, b]`, in float64."""
    x = x.double()[:, None, None]
    moved = function(x + found.steering) - function(x)
    return (moved - wanted[:, :, None]).norm(dim=-1) / wanted.norm(dim=-1)[:, :, None]

"""What a step before or behind the MLP reaches, by dense Jacobians, and the norms' gains."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.support.textbook.definitions import BUDGETS, Array, to_numpy
from tests.support.textbook.mlp import mlp_terms
from tests.support.textbook.modules import (
    branch_modules,
    heads_output,
    mlp_output,
    per_token_jacobian,
    sublayer,
)
from tests.support.textbook.reachability import budgeted, residual_by_svd


@dataclass
class Tokens:
    """States of some tokens: the base's own MLP inputs, and those of the forced base block."""

    h: Array
    x: Array  # the stream behind the first skip
    attended: Array
    heads: Array
    forced_delta: Array  # the forced delta of the block's output


def forced_reach(base: Any, tuned: Any, at: Tokens, n_heads: int) -> Iterator[dict[str, Any]]:
    """Rows for one block; `base` and `tuned` are its float64 blocks."""
    whole = functools.partial(sublayer, base)
    only = lambda t: sublayer(base, t) - t  # noqa: E731
    J, eye = per_token_jacobian(whole, at.x), np.eye(at.x.shape[1])
    for target, v in branch_targets(base, tuned, at.x).items():
        labels = {"location": "pre_mlp", "head": np.nan, "target": target}
        yield from _reach_rows(labels, at.x, J - eye, v, only)
    labels = {"location": "pre_mlp", "head": np.nan, "target": "block"}
    yield from _reach_rows(labels, at.x, J, at.forced_delta, whole)
    z = per_token_jacobian(lambda t: heads_output(base, t), at.heads)
    for head, columns in enumerate(np.split(z, n_heads, axis=2)):
        spanned = np.linalg.svd(columns, full_matrices=False)[0]
        labels = {"location": "heads", "head": head, "target": "block"}
        yield from _reach_rows(labels, at.x, J, at.forced_delta, whole, spanned)
    for location in ("post_mlp", "post_block"):
        labels = {"location": location, "head": np.nan, "target": "block"}
        yield from _reach_rows(
            labels, at.x, np.broadcast_to(eye, J.shape), at.forced_delta, lambda t: t
        )


def branch_targets(base: Any, tuned: Any, x: Array) -> dict[str, Array]:
    """What fine-tuning did to the MLP at the stream `x`, as the stream sees it."""
    stream = torch.from_numpy(x)
    ours = sublayer(base, stream) - stream
    seen: dict[str, Array] = {}
    h = mlp_input(base, x)
    terms = mlp_terms(base, tuned, h)
    outer = branch_modules(base)["post_mlp"]
    if "Norm" not in type(outer).__name__:
        return {name: terms[name] for name in ("down", "exact")}
    y = mlp_output(base, h)
    slopes = per_token_jacobian(outer, y)
    seen["down"] = np.einsum("noi,ni->no", slopes, terms["down"])
    seen["exact"] = to_numpy(outer(torch.from_numpy(y + terms["exact"])) - ours)
    return seen


def mlp_input(block: Any, x: Array) -> Array:
    """What the MLP module reads when the stream behind the first skip is `x`."""
    seen: list[Array] = []
    handle = block.mlp.register_forward_pre_hook(lambda m, args: seen.append(to_numpy(args[0])))
    with torch.no_grad():
        sublayer(block, torch.from_numpy(x))
    handle.remove()
    return seen[0]


def _reach_rows(
    labels: dict[str, Any],
    x: Array,
    J: Array,
    wanted: Array,
    function: Callable[[torch.Tensor], torch.Tensor],
    bases: Array | None = None,
) -> Iterator[dict[str, Any]]:
    """`bases` `[n, d, k]`: orthonormal, what the steering must lie in.

    A budget that more than suffices is spent along directions that the map annihilates, where any
    step will do: what the real function makes of it is then NaN.
    """
    energy = np.sum(wanted**2, 1)
    for budget in BUDGETS:
        residuals, left = [], []
        for i, v in enumerate(wanted):
            basis = np.eye(x.shape[1]) if bases is None else bases[i]
            radius = budget * np.linalg.norm(x[i])
            step = basis @ budgeted(J[i] @ basis, v, radius)
            free, _, rank, _ = np.linalg.lstsq(J[i] @ basis, v, rcond=1e-5)
            if rank < basis.shape[1] and np.linalg.norm(free) <= radius:
                step = np.full_like(step, np.nan)
            residuals.append(residual_by_svd(J[i] @ basis, v, radius))
            both = torch.from_numpy(np.stack([x[i] + step, x[i]]))
            moved, still = to_numpy(function(both))
            left.append(np.linalg.norm(moved - still - v) / np.linalg.norm(v))
        squares = np.square(residuals)
        yield {
            **labels,
            "budget": budget,
            "explained": 1 - np.sum(squares * energy) / np.sum(energy),
            "residual_q25": np.quantile(residuals, 0.25),
            "residual_median": np.median(residuals),
            "residual_q75": np.quantile(residuals, 0.75),
            "nonlinear_residual_median": np.median(left),
            "n_tokens": len(x),
        }


def normalisation(base: Any, at: Tokens) -> dict[str, float]:
    """Median relative gains of the norms, from dense Jacobians at every token."""
    kind = type(base).__name__
    names = {"Gemma": "pre_feedforward_layernorm", "GPT2": "ln_2", "Olmo2": ""}
    found = (name for start, name in names.items() if kind.startswith(start))
    name = next(found, "post_attention_layernorm")
    outer = branch_modules(base)["post_mlp"]
    y = mlp_output(base, mlp_input(base, at.x))
    gain, radial = _gains(getattr(base, name), at.x) if name else (np.ones(1), np.ones(1))
    post = _gains(outer, y)[0] if "Norm" in type(outer).__name__ else np.ones(1)
    share = np.linalg.norm(at.attended, axis=1) / np.linalg.norm(at.x, axis=1)
    medians = map(np.median, (gain, radial, post, share))
    columns = ("norm_gain", "radial_gain", "post_gain", "attention_share")
    return {**dict(zip(columns, medians, strict=True)), "n_tokens": len(at.x)}


def _gains(norm: Any, x: Array) -> tuple[Array, Array]:
    """Relative to size in and out: the root mean square over directions, and the radial one."""
    J, d = per_token_jacobian(norm, x), x.shape[1]
    out = np.linalg.norm(to_numpy(norm(torch.from_numpy(x))), axis=1)
    size = np.linalg.norm(x, axis=1)
    mean = np.sqrt(np.mean(np.sum(J**2, axis=1), axis=1))
    radial = np.linalg.norm(np.einsum("noi,ni->no", J, x / size[:, None]), axis=1)
    assert J.shape[2] == d
    return mean * size / out, radial * size / out

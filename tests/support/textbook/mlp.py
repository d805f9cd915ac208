"""The MLP's matrices, the first-order terms of its change and its inner pair."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special

from tests.support.textbook.activations import ACTIVATION_OF, ACTIVATIONS
from tests.support.textbook.definitions import SHARED_RANKS, Array, to_numpy
from tests.support.textbook.generation import ratio_sem
from tests.support.textbook.modules import mlp_output


@dataclass
class Matrices:
    """An MLP's weights `[out, in]` and biases; `up` is None where there is no gate."""

    gate: Array
    gate_bias: Array
    down: Array
    down_bias: Array
    up: Array | None
    up_bias: Array | None
    activation: str

    @classmethod
    def of(cls, block: Any) -> "Matrices":
        name = type(block).__name__
        found = (value for start, value in ACTIVATION_OF.items() if name.startswith(start))
        activation = next(found, "silu")

        def weight(module: Any, transposed: bool = False) -> Array:
            return to_numpy(module.weight.T if transposed else module.weight)

        def bias(module: Any, n: int) -> Array:
            return to_numpy(module.bias) if module.bias is not None else np.zeros(n)

        if name.startswith("GPT2"):
            outer = (weight(block.mlp.c_proj, True), to_numpy(block.mlp.c_proj.bias))
            inner = (weight(block.mlp.c_fc, True), to_numpy(block.mlp.c_fc.bias))
            return cls(*inner, *outer, None, None, activation)
        if name.startswith("GPTNeoX"):
            modules = block.mlp.dense_h_to_4h, block.mlp.dense_4h_to_h
            return cls(*(to_numpy(p) for m in modules for p in (m.weight, m.bias)), None, None,
                       activation)  # fmt: skip
        if name.startswith("OPT"):
            modules = block.fc1, block.fc2
            return cls(*(to_numpy(p) for m in modules for p in (m.weight, m.bias)), None, None,
                       activation)  # fmt: skip
        if name.startswith("Phi3"):
            gate, up = np.split(weight(block.mlp.gate_up_proj), 2)
        else:
            gate, up = weight(block.mlp.gate_proj), weight(block.mlp.up_proj)
        down = weight(block.mlp.down_proj)
        zeros = np.zeros(len(gate))
        return cls(gate, zeros, down, bias(block.mlp.down_proj, len(down)), up, zeros, activation)


def mlp_terms(base: Any, tuned: Any, h: Array) -> dict[str, Array]:
    """The exact change of the MLP on `h` `[n, d]` and its first-order terms, token by token."""
    B, T = Matrices.of(base), Matrices.of(tuned)
    value, slope = ACTIVATIONS[B.activation]
    exact = mlp_output(tuned, h) - mlp_output(base, h)
    terms = {name: np.zeros_like(exact) for name in ("down", "gate", "up")}
    for i, token in enumerate(h):
        a_g = B.gate @ token + B.gate_bias
        change_g = (T.gate - B.gate) @ token + T.gate_bias - B.gate_bias
        if B.up is None:
            m = value(a_g)
            terms["up"][i] = B.down @ (slope(a_g) * change_g)
        else:
            a_u = B.up @ token + B.up_bias
            change_u = (T.up - B.up) @ token + T.up_bias - B.up_bias
            m = value(a_g) * a_u
            terms["gate"][i] = B.down @ (slope(a_g) * a_u * change_g)
            terms["up"][i] = B.down @ (value(a_g) * change_u)
        terms["down"][i] = (T.down - B.down) @ m + T.down_bias - B.down_bias
    return {**terms, "exact": exact}


def first_order(base: Any, tuned: Any, h: Array) -> dict[str, float]:
    """The terms of the MLP's change on `h` `[n, d]`; `base` and `tuned` are blocks."""
    terms, y = mlp_terms(base, tuned, h), mlp_output(base, h)
    exact = terms.pop("exact")
    energy = np.mean(np.sum(exact**2, 1))
    shares = {k: np.mean(np.sum(term * exact, 1)) / energy for k, term in terms.items()}
    rest = exact - sum(terms.values())
    return {
        **shares,
        "remainder": np.mean(np.sum(rest**2, 1)) / energy,
        "relative_change": np.sqrt(energy / np.mean(np.sum(y**2, 1))),
    }


def jacobian(M: Matrices, h: Array) -> Array:
    """``A(h) = W_d J(h)``."""
    value, slope = ACTIVATIONS[M.activation]
    a_g = M.gate @ h + M.gate_bias
    if M.up is None:
        return M.down @ np.diag(slope(a_g)) @ M.gate
    a_u = M.up @ h + M.up_bias
    return M.down @ (np.diag(slope(a_g) * a_u) @ M.gate + np.diag(value(a_g)) @ M.up)


def inner_pair(base: Any, tuned: Any, h: Array, held_out: Array) -> Iterator[dict[str, Any]]:
    """One map ``Δh`` for all tokens that does to gate and up what fine-tuning did."""
    B, T = Matrices.of(base), Matrices.of(tuned)
    parts = ("gate",) if B.up is None else ("gate", "up")
    W = np.vstack([getattr(B, p) for p in parts])
    dW = np.vstack([getattr(T, p) - getattr(B, p) for p in parts])
    db = np.concatenate([getattr(T, f"{p}_bias") - getattr(B, f"{p}_bias") for p in parts])
    free = lambda some: np.linalg.lstsq(W, (some @ dW.T + db).T, rcond=None)[0].T  # noqa: E731
    best, root = free(h), scipy.linalg.sqrtm(W.T @ W)
    U = np.linalg.svd(root @ (best - best.mean(0)).T, full_matrices=False)[0]
    for rank in [r for r in SHARED_RANKS if r == "full" or r < h.shape[1]]:
        keep = U if rank == "full" else U[:, :rank]
        P = np.linalg.solve(root, keep @ keep.T @ root)

        def steering(some: Array, P: Array = P) -> Array:
            return best.mean(0) + (free(some) - best.mean(0)) @ P.T

        shares = []
        for some in (h, held_out):
            t = some @ dW.T + db
            left = t - steering(some) @ W.T
            shares.append(1 - np.sum(left**2) / np.sum(t**2))
        residual = np.linalg.norm(left, axis=1) / np.linalg.norm(t, axis=1)
        sizes = np.linalg.norm(steering(held_out), axis=1) / np.linalg.norm(held_out, axis=1)
        sums = np.sum(left**2, 1), np.sum(t**2, 1)
        yield {
            "rank": rank,
            "explained_fit": shares[0],
            "explained_heldout": shares[1],
            "explained_heldout_sem": ratio_sem(*sums),
            "residual_q25": np.quantile(residual, 0.25),
            "residual_median": np.median(residual),
            "residual_q75": np.quantile(residual, 0.75),
            "size_median": np.median(sizes),
            "n_tokens": len(held_out),
        }

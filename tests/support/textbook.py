"""The definitions, slowly: one document at a time, unpadded, uncached, in float64 numpy.

Nothing here knows the toolkit. States are read by plain hooks on modules that are named by hand,
and everything after them is linear algebra as it stands in a textbook.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special
import torch

from tests.support.tiny import blocks_of

BRANCHES = ("pre_mlp", "post_mlp", "post_block")
BUDGETS = (0.01, 0.03, 0.1, 0.3, 1.0)
RANKS = (0, 1, 2, 4, 8, 16, 32, 64)
SHARED_RANKS = (0, 1, 8, 32, "full")
Array = np.ndarray
Map = tuple[Array, Array]  # A [d, d] and b [d]


def branch_modules(block: Any) -> dict[str, Any]:
    """The modules whose outputs are added to, and become, the residual stream."""
    kind = type(block).__name__
    if kind.startswith("Gemma"):
        pair = block.post_attention_layernorm, block.post_feedforward_layernorm
    elif kind.startswith("GPT2"):
        pair = block.attn, block.mlp
    elif kind.startswith("GPTNeoX"):
        pair = block.attention, block.mlp
    elif kind.startswith("OPT"):
        pair = block.self_attn, block.fc2
    elif kind.startswith("Olmo2"):
        pair = block.post_attention_layernorm, block.post_feedforward_layernorm
    else:
        pair = block.self_attn, block.mlp
    return {"pre_mlp": pair[0], "post_mlp": pair[1], "post_block": block}


def mlp_input_module(block: Any) -> Any:
    return block.fc1 if hasattr(block, "fc1") else block.mlp


WITH_A_TAIL = ("Llama", "Gemma", "Qwen3", "Olmo2", "Phi3", "GPT2")


def attention_projection(block: Any) -> Any:
    """The projection of the attention heads' outputs, in families whose MLP follows attention."""
    return block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj


def heads_output(block: Any, z: torch.Tensor) -> torch.Tensor:
    """What the heads' outputs `z` `[n, d_z]` add to the stream, by the block's own modules."""
    attended = attention_projection(block)(z)
    post = branch_modules(block)["pre_mlp"]
    is_norm = "Norm" in type(post).__name__
    return post(attended) if is_norm else attended


def sublayer(block: Any, x: torch.Tensor) -> torch.Tensor:
    """The block behind the first skip, on tokens `[n, d]`, by its own modules."""
    kind = type(block).__name__
    if kind.startswith("Gemma"):
        inner = block.mlp(block.pre_feedforward_layernorm(x))
        return x + block.post_feedforward_layernorm(inner)
    if kind.startswith("Olmo2"):
        return x + block.post_feedforward_layernorm(block.mlp(x))
    if kind.startswith("GPT2"):
        return x + block.mlp(block.ln_2(x))
    return x + block.mlp(block.post_attention_layernorm(x))


def per_token_jacobian(function: Callable[[torch.Tensor], torch.Tensor], x: Array) -> Array:
    """``[n, d_out, d_in]`` of a map of tokens, one token at a time by reverse mode."""
    one = torch.func.jacrev(lambda token: function(token[None])[0])
    return np.stack([to_numpy(one(token)) for token in torch.from_numpy(x)])


def mlp_output(block: Any, h: Array) -> Array:
    """The MLP module itself on `h` `[n, d]`, in the precision of its weights."""
    parameter = next(block.parameters())
    x = torch.from_numpy(h).to(parameter.dtype)
    is_opt = hasattr(block, "fc1")
    return to_numpy(block.fc2(block.activation_fn(block.fc1(x))) if is_opt else block.mlp(x))


def to_numpy(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


@dataclass
class Seen:
    """One forward pass over one document: states by (location, layer), and logits `[t, v]`."""

    states: dict[tuple[str, int], Array] = field(default_factory=dict)
    logits: Array = field(default_factory=lambda: np.zeros(0))


def run(
    model: Any,
    ids: Sequence[int],
    block_inputs: Callable[[int], Array] | None = None,
    location: str = "post_block",
    maps: dict[int, Map] | None = None,
    overwrite: dict[int, Array] | None = None,
) -> Seen:
    """`model` on one document.

    `block_inputs(layer)` is put in place of what enters each block; `maps` steer `location` in the
    blocks that they name, at every position but the first; `overwrite` replaces block outputs.
    """
    seen = Seen()
    dtype = next(model.parameters()).dtype

    def tensor(array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(dtype)

    def look(name: str, layer: int):
        def hook(module: Any, args: Any, output: Any) -> Any:
            bare = output[0] if isinstance(output, tuple) else output
            value = bare.reshape(len(ids), -1).clone()
            if name == location and maps and layer in maps:
                A, b = (tensor(part) for part in maps[layer])
                value[1:] = value[1:] + value[1:] @ A.T + b
            if name == "post_block" and overwrite:
                value = tensor(overwrite[layer])
            seen.states[name, layer] = to_numpy(value)
            value = value.reshape(bare.shape)
            return (value, *output[1:]) if isinstance(output, tuple) else value

        return hook

    def enter(layer: int):
        def hook(module: Any, args: Any) -> Any:
            if block_inputs is None:
                return None
            return (tensor(block_inputs(layer))[None], *args[1:])

        return hook

    def listen(name: str, layer: int):
        def hook(module: Any, args: Any) -> None:
            seen.states[name, layer] = to_numpy(args[0].reshape(len(ids), -1))

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(blocks_of(model)):
            handles = [block.register_forward_pre_hook(enter(layer))]
            handles += [mlp_input_module(block).register_forward_pre_hook(listen("mlp_in", layer))]
            if type(block).__name__.startswith(WITH_A_TAIL):
                heads = attention_projection(block)
                handles += [heads.register_forward_pre_hook(listen("heads", layer))]
            for name, module in branch_modules(block).items():
                handles.append(module.register_forward_hook(look(name, layer)))
            for handle in handles:
                stack.callback(handle.remove)
        with torch.no_grad():
            seen.logits = to_numpy(model(torch.tensor([list(ids)]), use_cache=False).logits[0])
    return seen


# --- the best linear fit


def fit(X: Array, T: Array, rank: int | str, relative_ridge: float = 1e-4) -> Map:
    """``A x + b`` by least squares with a ridge, then by reduced-rank regression."""
    n, d = X.shape
    if rank == 0:
        return np.zeros((T.shape[1], d)), T.mean(0)
    centred_X, centred_T = X - X.mean(0), T - T.mean(0)
    C_xx = centred_X.T @ centred_X / n
    ridge = relative_ridge * np.trace(C_xx) / d
    rows = np.vstack([centred_X, np.sqrt(n * ridge) * np.eye(d)])
    aims = np.vstack([centred_T, np.zeros((d, T.shape[1]))])
    A = np.linalg.lstsq(rows, aims, rcond=None)[0].T
    if rank != "full":
        root = np.real(scipy.linalg.sqrtm(C_xx + ridge * np.eye(d)))
        U = np.linalg.svd(A @ root)[0][:, :rank]
        A = U @ U.T @ A
    return A, T.mean(0) - A @ X.mean(0)


def explained(model: Map, X: Array, T: Array) -> float:
    A, b = model
    return 1 - np.mean(np.sum((T - X @ A.T - b) ** 2, 1)) / np.mean(np.sum(T**2, 1))


# --- the spectrum


def spectrum(delta: Array, base: Array) -> dict[str, float]:
    """From the singular values of the deltas `[n, d]`."""
    lam = np.linalg.svd(delta, compute_uv=False) ** 2 / len(delta)
    p = lam / lam.sum()
    positive = p[p > 0]
    sums = np.cumsum(lam)
    counts = {
        f"k{percent}": next(k for k in range(1, len(lam) + 1) if sums[k - 1] >= share * sums[-1])
        for percent, share in ((50, 0.5), (90, 0.9), (95, 0.95), (99, 0.99))
    }
    rms = np.sqrt(lam.sum())
    return {
        "n_tokens": len(delta),
        "rms": rms,
        "relative_rms": rms / np.sqrt(np.mean(np.sum(base**2, 1))),
        "mean_share": np.sum(delta.mean(0) ** 2) / np.mean(np.sum(delta**2, 1)),
        "participation_ratio": lam.sum() ** 2 / np.sum(lam**2),
        "entropy_rank": np.exp(-np.sum(positive * np.log(positive))),
        **counts,
    }


# --- the MLP


def normal_cdf(x: Array) -> Array:
    return scipy.special.ndtr(x)


def normal_pdf(x: Array) -> Array:
    return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_tanh_slope(x: Array) -> Array:
    t = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    inner = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * inner


def sigmoid(x: Array) -> Array:
    return scipy.special.expit(x)


ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "silu": (
        lambda x: x * sigmoid(x),
        lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x))),
    ),
    "gelu_tanh": (gelu_tanh, gelu_tanh_slope),
    "gelu": (lambda x: x * normal_cdf(x), lambda x: normal_cdf(x) + x * normal_pdf(x)),
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(float)),
}
ACTIVATION_OF = {"Gemma": "gelu_tanh", "GPT2": "gelu_tanh", "GPTNeoX": "gelu", "OPT": "relu"}


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


def damped(A: Array, v: Array, log10_damping: float) -> Array:
    """``argmin ‖v − AΔ‖² + λ‖Δ‖²``, stable however ill conditioned A is."""
    d = A.shape[1]
    rows = np.vstack([A, np.sqrt(10.0**log10_damping) * np.eye(d)])
    return np.linalg.lstsq(rows, np.concatenate([v, np.zeros(d)]), rcond=None)[0]


def budgeted(A: Array, v: Array, radius: float) -> Array:
    """``argmin ‖v − AΔ‖`` subject to ``‖Δ‖ ≤ radius``: the damping at which the norm is met."""
    free = np.linalg.lstsq(A, v, rcond=1e-13)[0]
    if np.linalg.norm(free) <= radius:
        return free
    excess = lambda damping: np.log(np.linalg.norm(damped(A, v, damping)) / radius)  # noqa: E731
    return damped(A, v, scipy.optimize.brentq(excess, -26, 12, xtol=1e-13))


def min_norm(A: Array, v: Array, share: float = 0.01) -> float:
    """The smallest ‖Δ‖ with ``‖v − AΔ‖ = share·‖v‖``."""

    def excess(damping: float) -> float:
        left = np.linalg.norm(v - A @ damped(A, v, damping))
        return np.log(left / (share * np.linalg.norm(v)))

    if np.linalg.norm(v - A @ np.linalg.lstsq(A, v, rcond=1e-13)[0]) > share * np.linalg.norm(v):
        return np.inf
    return np.linalg.norm(damped(A, v, scipy.optimize.brentq(excess, -26, 12, xtol=1e-13)))


def residual_by_svd(A: Array, v: Array, radius: float) -> float:
    """``min ‖v − AΔ‖ / ‖v‖`` subject to ``‖Δ‖ ≤ radius``, from the singular values of A."""
    U, s, _ = np.linalg.svd(A, full_matrices=False)
    U, s = U[:, s > 1e-13 * s[0]], s[s > 1e-13 * s[0]]
    c = U.T @ v
    outside = np.linalg.norm(v - U @ c)
    if np.linalg.norm(c / s) <= radius:
        return float(outside / np.linalg.norm(v))
    norm = lambda log: np.linalg.norm(s * c / (s**2 + np.exp(log)))  # noqa: E731
    log = scipy.optimize.brentq(lambda log: np.log(norm(log) / radius), -90, 90, xtol=1e-13)
    inside = np.linalg.norm(np.exp(log) * c / (s**2 + np.exp(log)))
    return float(np.hypot(inside, outside) / np.linalg.norm(v))


def reachability(base: Any, tuned: Any, h: Array) -> Iterator[dict[str, Any]]:
    """Rows for one block; `base` and `tuned` are its float64 blocks."""
    B, T = Matrices.of(base), Matrices.of(tuned)
    value, _ = ACTIVATIONS[B.activation]
    for target in ("down", "exact"):
        residuals, nonlinear, norms, ranks = [], [], [], []
        for token in h:
            m = value(B.gate @ token + B.gate_bias)
            if B.up is not None:
                m = m * (B.up @ token + B.up_bias)
            y = mlp_output(base, token[None])[0]
            v = (T.down - B.down) @ m + T.down_bias - B.down_bias
            if target == "exact":
                v = mlp_output(tuned, token[None])[0] - y
            A, size = jacobian(B, token), np.linalg.norm(token)
            steps = [budgeted(A, v, rho * size) for rho in BUDGETS]
            moved = [mlp_output(base, (token + step)[None])[0] - y for step in steps]
            residuals.append([np.linalg.norm(v - A @ s) / np.linalg.norm(v) for s in steps])
            nonlinear.append([np.linalg.norm(x - v) / np.linalg.norm(v) for x in moved])
            norms.append(min_norm(A, v) / size)
            ranks.append(np.linalg.matrix_rank(A, rtol=1e-6))
        for i, budget in enumerate(BUDGETS):
            at = np.array(residuals)[:, i]
            yield {
                "target": target,
                "budget": budget,
                "residual_q25": np.quantile(at, 0.25),
                "residual_median": np.median(at),
                "residual_q75": np.quantile(at, 0.75),
                "nonlinear_residual_median": np.median(np.array(nonlinear)[:, i]),
                "min_norm_median": np.median(norms),
                "rank_median": np.median(ranks),
                "n_tokens": len(h),
            }


# --- through norms and the skip


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


# --- gate and up together


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


# --- the weights


def weight_row(W: Array, dW: Array) -> dict[str, Any]:
    """From full singular value decompositions."""
    U, s, _ = np.linalg.svd(W, full_matrices=False)
    basis = U[:, s > s[0] * max(W.shape) * np.finfo(np.float32).eps]
    sigma = np.linalg.svd(dW, compute_uv=False)
    squares = np.cumsum(sigma**2)
    outside = dW - basis @ (basis.T @ dW)
    return {
        "rows": W.shape[0],
        "columns": W.shape[1],
        "norm_2": sigma[0],
        "norm_fro": np.linalg.norm(dW),
        "relative": np.linalg.norm(dW) / np.linalg.norm(W),
        "rank": np.linalg.matrix_rank(dW),
        "stable_rank": np.sum(sigma**2) / sigma[0] ** 2,
        "k90": int(np.argmax(squares >= 0.9 * squares[-1])) + 1,
        "outside": np.sum(outside**2) / np.sum(dW**2),
    }


def weights(base: Any, tuned: Any) -> Iterator[dict[str, Any]]:
    """Rows for one block: every matrix of a module that is no norm."""
    theirs = dict(tuned.named_parameters())
    for name, parameter in base.named_parameters():
        if parameter.ndim == 2:
            W, T = to_numpy(parameter), to_numpy(theirs[name])
            if type(base).__name__.startswith("GPT2"):
                W, T = W.T, T.T
            yield {"module": name.removesuffix(".weight"), **weight_row(W, T - W)}


# --- divergence


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(tuned_logits: Array, logits: Array) -> Array:
    """``Σ p log(p / q)`` over the last axis."""
    p, q = log_softmax(tuned_logits), log_softmax(logits)
    return np.sum(np.exp(p) * (p - q), -1)


def greedy(
    logits_of: Callable[[list[int]], Array], prompt: Sequence[int], n_new: int, ends: set[int]
) -> tuple[list[int], Array]:
    """Continue `prompt` token by token, rereading everything, to an end or to `n_new` tokens.

    The tokens, and the logits `[n, v]` that chose them.
    """
    ids, chosen_by = list(prompt), []
    while len(chosen_by) < n_new and not (chosen_by and ids[-1] in ends):
        chosen_by.append(logits_of(ids)[-1])
        ids.append(int(np.argmax(chosen_by[-1])))
    return ids[len(prompt) :], np.array(chosen_by)


# --- the whole diagnosis


@dataclass
class Textbook:
    """All tables of one pair of models, from `documents`: (token ids, held out)."""

    base: Any
    tuned: Any
    documents: list[tuple[tuple[int, ...], bool]]

    def __post_init__(self) -> None:
        self.n_layers = len(blocks_of(self.base))
        self.answer = functools.cache(self._answer)
        self.of: dict[str, list[Seen]] = {"base": [], "tuned": [], "forced": []}
        for ids, _ in self.documents:
            tuned = run(self.tuned, ids)
            base = run(self.base, ids)
            first = run_first_input(self.base, ids)
            enters = lambda layer, t=tuned, x=first: (  # noqa: E731
                t.states["post_block", layer - 1] if layer else x
            )
            self.of["base"].append(base)
            self.of["tuned"].append(tuned)
            self.of["forced"].append(run(self.base, ids, block_inputs=enters))

    def states(self, of: str, location: str, layer: int, held_out: bool | None = None) -> Array:
        """All counted tokens: every one but each document's first, `[n, d]`."""
        return self.rows(self.of[of], location, layer, held_out)

    def rows(self, seen: Sequence[Seen], location: str, layer: int, held_out: bool | None) -> Array:
        return np.concatenate(
            [
                s.states[location, layer][1:]
                for s, (_, side) in zip(seen, self.documents, strict=True)
                if held_out is None or side == held_out
            ]
        )

    def source(self, mode: str, location: str, layer: int, held_out: bool | None = None) -> Array:
        return self.states("base" if mode == "free" else "forced", location, layer, held_out)

    def delta(self, mode: str, location: str, layer: int, held_out: bool | None = None) -> Array:
        tuned = self.states("tuned", location, layer, held_out)
        return tuned - self.source(mode, location, layer, held_out)

    def norms(self) -> Iterator[dict[str, Any]]:
        for layer in range(self.n_layers):
            for of in ("base", "tuned", "delta_free", "delta_forced"):
                row: dict[str, Any] = {"layer": layer, "of": of}
                for location in BRANCHES:
                    if of.startswith("delta"):
                        vectors = self.delta(of.removeprefix("delta_"), location, layer)
                    else:
                        vectors = self.states(of, location, layer)
                    row[location] = np.mean([np.linalg.norm(v) for v in vectors])
                row["mlp_share"] = row["post_mlp"] / (row["pre_mlp"] + row["post_mlp"])
                yield row

    def spectrum(self) -> Iterator[dict[str, Any]]:
        for layer in range(self.n_layers):
            for location in BRANCHES:
                for mode in ("free", "forced"):
                    key = {"layer": layer, "location": location, "mode": mode}
                    delta = self.delta(mode, location, layer)
                    yield key | spectrum(delta, self.source(mode, location, layer))

    def linear_fit(self) -> Iterator[dict[str, Any]]:
        for layer in range(self.n_layers):
            for source in BRANCHES:
                for mode, target in (("free", "own"), ("forced", "own"), ("forced", "block")):
                    aim = source if target == "own" else "post_block"
                    sides = [
                        (self.source(mode, source, layer, side), self.delta(mode, aim, layer, side))
                        for side in (False, True)
                    ]
                    d = sides[0][0].shape[1]
                    for rank in [r for r in RANKS if r < d] + ["full"]:
                        model = fit(*sides[0], rank)
                        yield {
                            "layer": layer,
                            "source": source,
                            "target": target,
                            "mode": mode,
                            "rank": rank,
                            "explained_fit": explained(model, *sides[0]),
                            "explained_heldout": explained(model, *sides[1]),
                        }

    def first_order(self) -> Iterator[dict[str, Any]]:
        for layer in range(self.n_layers):
            pair = blocks_of(self.base)[layer], blocks_of(self.tuned)[layer]
            yield {"layer": layer} | first_order(*pair, self.states("base", "mlp_in", layer))

    def reachability(self) -> Iterator[dict[str, Any]]:
        for layer in range(self.n_layers):
            pair = blocks_of(self.base)[layer], blocks_of(self.tuned)[layer]
            h = self.states("base", "mlp_in", layer)
            for row in reachability(*pair, h):
                yield {"layer": layer} | row

    # --- inside the block

    def each_block(self) -> Iterator[tuple[int, Any, Any]]:
        yield from zip(
            range(self.n_layers), blocks_of(self.base), blocks_of(self.tuned), strict=True
        )

    def tokens(self, layer: int) -> Tokens:
        forced = {name: self.states("forced", name, layer) for name in (*BRANCHES, "heads")}
        return Tokens(
            h=self.states("base", "mlp_in", layer),
            x=forced["post_block"] - forced["post_mlp"],
            attended=forced["pre_mlp"],
            heads=forced["heads"],
            forced_delta=self.delta("forced", "post_block", layer),
        )

    def forced_reach(self) -> Iterator[dict[str, Any]]:
        n_heads = self.base.config.num_attention_heads
        for layer, *blocks in self.each_block():
            for row in forced_reach(*blocks, self.tokens(layer), n_heads):
                yield {"layer": layer} | row

    def normalisation(self) -> Iterator[dict[str, Any]]:
        for layer, base, _ in self.each_block():
            yield {"layer": layer} | normalisation(base, self.tokens(layer))

    def inner_pair(self) -> Iterator[dict[str, Any]]:
        for layer, *blocks in self.each_block():
            sides = (self.states("base", "mlp_in", layer, side) for side in (False, True))
            for row in inner_pair(*blocks, *sides):
                yield {"layer": layer} | row

    def first_order_scale(self, scales: Sequence[float]) -> Iterator[dict[str, Any]]:
        for layer, base, tuned in self.each_block():
            h = self.states("base", "mlp_in", layer)
            for scale in scales:
                between = copy.deepcopy(tuned)
                for ours, theirs in zip(base.parameters(), between.parameters(), strict=True):
                    theirs.data = ours + scale * (theirs - ours)
                found = first_order(base, between, h)
                yield {"layer": layer, "scale": scale, "n_tokens": len(h)} | found

    def mlp_fit(self) -> Iterator[dict[str, Any]]:
        """``down`` from the MLP's output at every rank, and that output from its input, centred."""
        for layer, *blocks in self.each_block():
            sides = [self.states("base", "mlp_in", layer, side) for side in (False, True)]
            y = [mlp_output(blocks[0], h) for h in sides]
            down = [mlp_terms(*blocks, h)["down"] for h in sides]
            for rank in [r for r in SHARED_RANKS if r == "full" or r < y[0].shape[1]]:
                model = fit(y[0], down[0], rank)
                labels = {"layer": layer, "source": "mlp_out", "target": "down", "rank": rank}
                shares = [explained(model, *side) for side in zip(y, down, strict=True)]
                yield {**labels, "explained_fit": shares[0], "explained_heldout": shares[1]}
            A, b = fit(sides[0], y[0], "full")
            shares = [
                1 - np.sum((t - h @ A.T - b) ** 2) / np.sum((t - t.mean(0)) ** 2)
                for h, t in zip(sides, y, strict=True)
            ]
            labels = {"layer": layer, "source": "mlp_in", "target": "mlp_out", "rank": "full"}
            yield {**labels, "explained_fit": shares[0], "explained_heldout": shares[1]}

    def weights(self) -> Iterator[dict[str, Any]]:
        for layer, *blocks in self.each_block():
            for row in weights(*blocks):
                yield {"layer": layer} | row

    # --- maps in the oracle's place

    def maps(self, location: str, rank: int | str, how: str) -> dict[int, Map]:
        """A fitted map for every block: `how` is free, forced or sequential."""
        if how == "sequential":
            return self.sequential_maps(location, rank)
        target = location if how == "free" or location == "pre_mlp" else "post_block"
        return {
            layer: fit(
                self.source(how, location, layer, False),
                self.delta(how, target, layer, False),
                rank,
            )
            for layer in range(self.n_layers)
        }

    def sequential_maps(self, location: str, rank: int | str) -> dict[int, Map]:
        """Block by block; the base model steered so far is run again from its first token."""
        target = "pre_mlp" if location == "pre_mlp" else "post_block"
        maps: dict[int, Map] = {}
        for layer in range(self.n_layers):
            steered = [
                run(self.base, ids, location=location, maps=maps) for ids, _ in self.documents
            ]
            X = self.rows(steered, location, layer, False)
            missing = self.states("tuned", target, layer, False)
            missing = missing - self.rows(steered, target, layer, False)
            maps[layer] = fit(X, missing, rank)
        return maps

    def divergences(
        self,
        prompts: Sequence[Sequence[int]],
        n_new: int,
        ends: set[int],
        location: str = "post_block",
        maps: dict[int, Map] | None = None,
        oracle: bool = False,
    ) -> dict[str, list[Array]]:
        """``KL(tuned ‖ steered)`` of every generated token of every prompt, by forcing."""

        def steered(ids: list[int]) -> Array:
            overwrite = None
            if oracle:
                states = run(self.tuned, ids).states
                overwrite = {i: states["post_block", i] for i in range(self.n_layers)}
            return run(self.base, ids, location=location, maps=maps, overwrite=overwrite).logits

        nats: dict[str, list[Array]] = {"tuned": [], "own": []}
        for prompt in prompts:
            ids, logits = self.answer(tuple(prompt), n_new, frozenset(ends))
            read = [*prompt, *ids[:-1]]
            nats["tuned"].append(kl(logits, steered(read)[len(prompt) - 1 :]))
            if not oracle:
                _, own = greedy(steered, prompt, n_new, ends)
                n = min(len(own), len(logits))
                nats["own"].append(kl(logits[:n], own[:n]))
        return nats

    def _answer(
        self, prompt: tuple[int, ...], n_new: int, ends: frozenset[int]
    ) -> tuple[list[int], Array]:
        return greedy(lambda ids: run(self.tuned, ids).logits, prompt, n_new, set(ends))


def run_first_input(model: Any, ids: Sequence[int]) -> Array:
    """What enters block 0, `[t, d]`."""
    seen: list[Array] = []
    hook = lambda module, args: seen.append(to_numpy(args[0][0]))  # noqa: E731
    handle = blocks_of(model)[0].register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            model(torch.tensor([list(ids)]), use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def curve(nats: Sequence[Array]) -> Iterator[dict[str, Any]]:
    """Mean and standard error over the prompts that reach each generated token index."""
    for index in range(max(len(n) for n in nats)):
        at = np.array([n[index] for n in nats if len(n) > index])
        sem = np.std(at, ddof=1) / np.sqrt(len(at)) if len(at) > 1 else np.nan
        yield {"token_index": index, "kl_mean": at.mean(), "kl_sem": sem, "n_prompts": len(at)}


def mean_nats(nats: Sequence[Array]) -> float:
    return float(np.concatenate(list(nats)).mean())


def ratio_sem(numerators: Array, denominators: Array) -> float:
    """Of ``Σ numerators / Σ denominators``: the delta method over independent prompts."""
    n, ratio = len(numerators), numerators.sum() / denominators.sum()
    residual = numerators - ratio * denominators
    return float(np.sqrt(n * np.var(residual, ddof=1)) / denominators.sum())

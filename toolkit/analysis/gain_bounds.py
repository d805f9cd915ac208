"""How much a block can enlarge an error, from the 2-norms of its weights and its norm layers.

A block is ``x = h + Attn(N₁(h))``, ``x + MLP(N₂(x))``, each branch with a norm of its own after it
where the family has one. The bounds are on the 2-norm of the block's Jacobian: the largest
``‖δout‖ / ‖δh‖`` of an error at all tokens of one document, in the Frobenius norm, under

1. first order: the error is small;
2. these tokens: norm layers, activations, and the largest query, key and value are taken where the
   model was on the document; a root-mean-square norm at a state of rms s passes at most max|w| / s;
3. the worst case everywhere: every matrix passes its 2-norm, softmax turns a change of its scores
   of at most c into a change of at most c of its weights (in sum), and attention gathers from all
   n tokens: ``‖P‖₂ ≤ √n``.

Gains of blocks multiply. Measured gains are far below: directions do not line up.
"""

from dataclasses import dataclass
from math import sqrt

from torch import Tensor


@dataclass(frozen=True)
class AttentionSizes:
    """Hold what the bound of one attention branch needs.

    n_tokens: of the document; `groups`: query heads for each key head; `scale`: of the scores.
    query, key, value, out: 2-norms of the projections. query_norm, key_norm: the most that norms
    after the projections pass (1 where there are none). largest_query, largest_key,
    largest_value: the largest norm that one head's vector has.
    """

    n_tokens: int
    groups: int
    scale: float
    query: float
    key: float
    value: float
    out: float
    query_norm: float
    key_norm: float
    largest_query: float
    largest_key: float
    largest_value: float


def norm_gain(weight: Tensor, rms: Tensor) -> float:
    """Return the most that ``x ↦ w ⊙ x / rms(x)`` passes: ``max|w| / rms`` at the smallest state.

    `weight` `[d]`; `rms` of every token's state, `[n]`.
    """
    return float(weight.abs().max() / rms.min())


def attention_gain(sizes: AttentionSizes) -> float:
    """Bound the gain of the branch from its normed input: values passed on, attention turned."""
    spread = sqrt(sizes.n_tokens * sizes.groups)
    moved = spread * sizes.value
    by_query = sizes.largest_key * sizes.query_norm * sizes.query
    by_key = sizes.largest_query * spread * sizes.key_norm * sizes.key
    turned = sizes.scale * sizes.largest_value * (by_query + by_key)
    return sizes.out * (moved + turned)


def mlp_gain(down: float, gate: float, up: float, by_gate: Tensor, by_up: Tensor | None) -> float:
    """``‖W_d‖ (max|σ'(a_g)⊙a_u| ‖W_g‖ + max|σ(a_g)| ‖W_u‖)``, from 2-norms.

    `by_gate`, `by_up` `[n, d_ff]` are the two diagonals of the Jacobian (`by_up` None without a
    gate).
    """
    passed = float(by_gate.abs().max()) * gate
    if by_up is not None:
        passed += float(by_up.abs().max()) * up
    return down * passed


def block_gain(attention: float, mlp: float) -> float:
    """``(1 + attention) (1 + mlp)``: of the block with its two skips, from its branches' gains."""
    return (1 + attention) * (1 + mlp)

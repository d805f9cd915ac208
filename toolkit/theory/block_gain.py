"""The bound on a block's gain, read from a live model: `toolkit.analysis.gain_bounds` in numbers.

For blocks with root-mean-square norms and attention of separate query, key, value and output
projections, with or without norms on queries, keys and branches (Llama, Qwen, Gemma, ...).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.analysis.gain_bounds import (
    AttentionSizes,
    attention_gain,
    block_gain,
    mlp_gain,
    norm_gain,
)
from toolkit.blocks.jacobian import MLPJacobian
from toolkit.blocks.read import affine, mlps, read_sublayers
from toolkit.blocks.sublayer import MLPSublayer
from toolkit.documents.batches import Batch
from toolkit.models.edits import steerable
from toolkit.models.hooks import Site, capture
from toolkit.models.pair import ModelPair
from toolkit.models.runner import BlockRunner

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class WeightBound:
    """The most that one block can enlarge an error, and what its two branches can."""

    attention: float
    mlp: float

    @property
    def block(self) -> float:
        return block_gain(self.attention, self.mlp)


@torch.no_grad()
def weight_bounds(pair: ModelPair, document: Batch) -> list[WeightBound]:
    """Return the bound of every block of the tuned model on `document`, one unpadded row.

    Raises ValueError, with the reason, where a block is not of the form that the bound is for.
    """
    blocks = pair.tuned_runner
    tails = read_sublayers(blocks, [mlp for mlp, _ in mlps(pair.tuned, pair.tuned)], document)
    found, where = [], steerable(document.mask)
    for layer, (hidden, (sublayer, heads)) in enumerate(
        zip(blocks.entering(document), tails, strict=True)
    ):
        states = _Inside(blocks, layer, blocks.call(layer, document, own=True), hidden, where)
        found.append(WeightBound(states.attention(heads.post), states.mlp(sublayer)))
    return found


class _Inside:
    """One block's run on a document: the states that the bound needs."""

    def __init__(
        self, runner: BlockRunner, layer: int, call: Any, hidden: Tensor, where: Tensor
    ) -> None:
        block = runner.sites.blocks[layer]
        self.module = _attention(block)
        children = {f"child {name}": child for name, child in block.named_children()}
        norms = {name: getattr(self.module, name, None) for name in ("q_norm", "k_norm")}
        self.norms = {name: norm for name, norm in norms.items() if norm is not None}
        parts = {name: getattr(self.module, name) for name in PROJECTIONS}
        modules = {**children, **parts, **self.norms}
        places = {name: Site(module, "output") for name, module in modules.items()}
        places["attention input"] = Site(self.module.q_proj, "input")
        places["mid"] = runner.sites.at["resid_mid", layer]
        with capture(places) as states:
            runner.run(layer, call, hidden, ())
        self.states, self.where = states, where
        self.hidden, self.children = hidden, children

    def attention(self, post: nn.Module | None) -> float:
        """Return the attention branch, its norms included."""
        width = self.module.head_dim
        n_query, n_key = (
            affine(getattr(self.module, name))[0].shape[0] // width for name in ("q_proj", "k_proj")
        )
        sizes = AttentionSizes(
            n_tokens=self.hidden.shape[1],
            groups=n_query // n_key,
            scale=self.module.scaling,
            **{n: _norm(getattr(self.module, f"{n[0]}_proj")) for n in ("query", "key", "value")},
            out=_norm(self.module.o_proj),
            query_norm=self._head_norm("q_norm", "q_proj"),
            key_norm=self._head_norm("k_norm", "k_proj"),
            largest_query=self._largest("q_norm", "q_proj", width),
            largest_key=self._largest("k_norm", "k_proj", width),
            largest_value=self._largest("", "v_proj", width),
        )
        before = _rms_gain(self._first_norm(), self.hidden[self.where])
        behind = _rms_gain(post, self.states["o_proj"][self.where])
        return before * attention_gain(sizes) * behind

    def mlp(self, sublayer: MLPSublayer) -> float:
        """Return the MLP branch, its norms included."""
        x = self.states["mid"][self.where].to("cpu", sublayer.mlp.down.dtype)
        h = sublayer.inputs(x)
        jacobian = MLPJacobian.at(sublayer.mlp, h)
        gate, down = _spectral(sublayer.mlp.gate), _spectral(sublayer.mlp.down)
        up = 0.0 if sublayer.mlp.up is None else _spectral(sublayer.mlp.up)
        gain = mlp_gain(down, gate, up, jacobian.by_gate, jacobian.by_up)
        return _rms_gain(sublayer.norm, x) * gain * _rms_gain(sublayer.post, sublayer.mlp(h))

    def _first_norm(self) -> nn.Module | None:
        """The norm before attention: the child that gives what the queries are made from."""
        wanted = self.states["attention input"]
        if torch.equal(wanted, self.hidden):
            return None
        for name, child in self.children.items():
            if name in self.states and torch.equal(self.states[name], wanted):
                return child
        raise ValueError("no norm of the block gives what its attention reads")

    def _heads(self, name: str, width: int) -> Tensor:
        """The vectors of single heads at `name`, `[n, width]`, the first token's among them."""
        return self.states[name].reshape(-1, width)

    def _head_norm(self, name: str, projection: str) -> float:
        if name not in self.norms:
            return 1.0
        norm: Any = self.norms[name]  # of each head, or (OLMo-2) of all heads together
        return _rms_gain(norm, self._heads(projection, norm.weight.numel()))

    def _largest(self, norm: str, projection: str, width: int) -> float:
        name = norm if norm in self.norms else projection
        return float(self._heads(name, width).norm(dim=-1).max())


def _attention(block: nn.Module) -> Any:
    for module in block.modules():
        if all(hasattr(module, name) for name in (*PROJECTIONS, "head_dim", "scaling")):
            return module
    raise ValueError("the bound is written for attention with q_proj, k_proj, v_proj and o_proj")


def _norm(projection: Any) -> float:
    return _spectral(affine(projection)[0])


def _spectral(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.float(), 2))


def _rms_gain(norm: nn.Module | None, states: Tensor) -> float:
    """Return the most that `norm` passes at `states` `[n, d]`; 1 where there is no norm.

    Raises ValueError if it is no root-mean-square norm.
    """
    if norm is None:
        return 1.0
    states = states.float()
    rms = states.square().mean(-1).sqrt()
    weight = norm(torch.ones_like(states[:1])).float()[0]
    expected = weight * states / rms[:, None]
    off = (norm(states).float() - expected).norm() / expected.norm()
    if off > 0.02:
        raise ValueError(f"{type(norm).__name__} is no root-mean-square norm")
    return norm_gain(weight, rms)

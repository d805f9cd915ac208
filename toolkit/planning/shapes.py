"""What a model's cost depends on: its shapes, read from a configuration without any weights.

The model is built on torch's meta device, where a tensor has a shape and no storage; so the shapes
are those of the real modules, of any family, and nothing of a family is written here.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from toolkit.blocks.read import is_transposed
from toolkit.models.loading import auto_class
from toolkit.models.locations import BRANCHES, causal_lm, mlp_projections, of_blocks, resolve


@dataclass(frozen=True)
class BlockShape:
    """One block.

    parameters: all of them. matrices: entries of the matrices that one token is multiplied with
    (of a mixture, those of the experts that it goes to). linear: `(out, in)` of each matrix that
    every token is multiplied with. d_ff: width of the MLP's inner states, and `mlp` the entries of
    its matrices; both 0 where it cannot be read as matrices. gated: whether it has a gate.
    """

    parameters: int
    matrices: int
    linear: tuple[tuple[int, int], ...]
    mlp: int = 0
    d_ff: int = 0
    gated: bool = False


@dataclass(frozen=True)
class ModelShape:
    """One model.

    d: width of the residual stream. parameters: tied ones once. kv_width: numbers that a token's
    keys hold in one block (as many its values). branches: locations where deltas are taken. tail:
    whether the path from the attention branch through the MLP can be read. carried: numbers that
    a token's blocks leave for later ones beside the state.
    """

    blocks: tuple[BlockShape, ...]
    d: int
    n_heads: int
    head_dim: int
    kv_width: int
    vocabulary: int
    parameters: int
    branches: tuple[str, ...] = BRANCHES
    sublayer: bool = True
    carried: int = 0

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def largest_block(self) -> BlockShape:
        return max(self.blocks, key=lambda block: block.parameters)

    @classmethod
    def of_config(cls, config: Any) -> "ModelShape":
        """Return the shape of the causal language model that `config` describes."""
        with init_empty_weights():
            model = auto_class(config).from_config(copy.deepcopy(config))
        model.tie_weights()  # which emptying has undone
        return cls.of(model)

    @classmethod
    def of(cls, model: nn.Module) -> "ModelShape":
        """Return the shape of `model`, which may be on the meta device."""
        sites, live = resolve(model), causal_lm(model)
        config = live.config.get_text_config()
        heads = _most(config, "num_attention_heads") or 1
        head_dim = _most(config, "head_dim") or config.hidden_size // heads
        kv_heads = _most(config, "num_key_value_heads") or heads
        try:
            inner = mlp_projections(model)
        except ValueError:
            inner = [{} for _ in sites.blocks]
        experts = getattr(config, "num_experts_per_tok", None) or 1
        pairs = zip(sites.blocks, inner, strict=True)
        return cls(
            blocks=tuple(_block(block, mlp, experts) for block, mlp in pairs),
            d=config.hidden_size,
            n_heads=heads,
            head_dim=head_dim,
            kv_width=kv_heads * head_dim,
            vocabulary=live.get_output_embeddings().weight.shape[0],
            parameters=sum(p.numel() for p in live.parameters()),
            branches=tuple(name for name in BRANCHES if name not in sites.unavailable),
            sublayer=all(inner) and not {"resid_mid", "heads"} & sites.unavailable.keys(),
            carried=_carried(config),
        )


def _most(config: Any, name: str) -> Any:
    """Return what a configuration says under `name`: the most where its blocks differ."""
    found = of_blocks(config, name)
    return max(found) if isinstance(found, tuple) else found


def _carried(config: Any) -> int:
    """Count the numbers of parallel streams, and of keys and values that later blocks share.

    Shared are those of the last block of each type of attention that has its own.
    """
    beside = ((getattr(config, "altup_num_inputs", None) or 1) - 1) * config.hidden_size
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    if not shared:
        return beside
    heads, widths = (_each(config, name) for name in ("num_key_value_heads", "head_dim"))
    last = {kind: 2 * n * width for kind, n, width in
            list(zip(config.layer_types, heads, widths, strict=True))[:-shared]}  # fmt: skip
    return beside + sum(last.values())


def _each(config: Any, name: str) -> tuple[int, ...]:
    """Return what a configuration says under `name` of every block."""
    found = of_blocks(config, name)
    return found if isinstance(found, tuple) else (found,) * config.num_hidden_layers


def _block(block: nn.Module, mlp: dict[str, nn.Module], experts: int) -> BlockShape:
    """A matrix is a parameter of two dimensions; one of three holds a matrix for each expert."""
    parameters = list(block.parameters())
    linear = tuple((p.shape[0], p.shape[1]) for p in parameters if p.ndim == 2)
    routed = sum(p[0].numel() * min(experts, len(p)) for p in parameters if p.ndim == 3)
    down = mlp.get("down")
    weight: Any = down.weight if down is not None else torch.empty(0, 0)
    return BlockShape(
        parameters=sum(p.numel() for p in parameters),
        matrices=sum(rows * columns for rows, columns in linear) + routed,
        linear=linear,
        mlp=sum(m.weight.numel() for m in set(mlp.values())),  # type: ignore[operator, misc]
        d_ff=weight.shape[0 if down is not None and is_transposed(down) else 1],
        gated="linear" in mlp,
    )

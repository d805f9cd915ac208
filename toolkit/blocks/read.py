"""Read a block's MLP and MLP sublayer out of live modules, and prove that the reading is right."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from toolkit.blocks.mlp import MLP, Activation, Change, MLPChange
from toolkit.blocks.sublayer import HeadOutputs, MLPSublayer
from toolkit.documents.batches import Batch
from toolkit.models.hooks import Site, capture
from toolkit.models.locations import Sites, causal_lm, mlp_projections, of_blocks
from toolkit.models.runner import BlockRunner


def mlps(base: nn.Module, tuned: nn.Module) -> list[tuple[MLP, MLPChange]]:
    """Return the base model's dense MLP in every block, and what fine-tuning changed of it.

    Raises ValueError, with the reason, where a block has no MLP that can be read.
    """
    return list(MLPs(base, tuned))


class MLPs(Sequence[tuple[MLP, MLPChange]]):
    """`mlps`, each read when it is asked for.

    Raises ValueError, with the reason, where a block has no MLP, and later where it cannot be read.
    """

    def __init__(self, base: nn.Module, tuned: nn.Module) -> None:
        self._activation = _activation(causal_lm(base).config)
        self._base, self._tuned = mlp_projections(base), mlp_projections(tuned)

    def __len__(self) -> int:
        return len(self._base)

    def __getitem__(self, layer: Any) -> Any:
        ours, theirs = self._base[layer], self._tuned[layer]
        return _mlp(self._activation, ours), _mlp_change(ours, theirs)

    def of_base(self, layer: int) -> MLP:
        """Read the base model's MLP alone."""
        return _mlp(self._activation, self._base[layer])

    def of_tuned(self, layer: int) -> MLP:
        """Read the fine-tuned model's MLP alone."""
        return _mlp(self._activation, self._tuned[layer])


def _mlp(activation: Activation, projections: dict[str, nn.Module]) -> MLP:
    gate, gate_bias = affine(projections["pre"])
    down, down_bias = affine(projections["down"])
    if "linear" not in projections:
        return MLP(activation, gate, gate_bias, down, down_bias)
    if _is_fused(projections):
        (gate, up), (gate_bias, up_bias) = gate.chunk(2), gate_bias.chunk(2)
    else:
        up, up_bias = affine(projections["linear"])
    return MLP(activation, gate, gate_bias, down, down_bias, up, up_bias)


def _mlp_change(base: dict[str, nn.Module], tuned: dict[str, nn.Module]) -> MLPChange:
    gate, down = (module_change(base[name], tuned[name]) for name in ("pre", "down"))
    if "linear" not in base:
        return MLPChange(gate, down)
    if _is_fused(base):
        gate, up = gate.halves()
        return MLPChange(gate, down, up)
    return MLPChange(gate, down, module_change(base["linear"], tuned["linear"]))


def _is_fused(projections: dict[str, nn.Module]) -> bool:
    """Return whether one projection computes both branches: the gate's rows, then the up's."""
    return projections["linear"] is projections["pre"]


def module_change(base: nn.Module, tuned: nn.Module) -> Change:
    """Return what fine-tuning changed of one linear module; a LoRA's factors stay factors."""
    if factors := _lora_factors(base, tuned):
        return Change(factors, factors[0].new_zeros(len(factors[0])))
    (weight, bias), (tuned_weight, tuned_bias) = affine(base), affine(tuned)
    return Change((tuned_weight - weight,), tuned_bias - bias)


def _lora_factors(base: Any, tuned: Any) -> tuple[Tensor, ...]:
    """B and A of plain LoRAs on base's own weights; nothing where `tuned` is anything else."""
    is_lora: bool = isinstance(tuned, LoraLayer)  # no narrowing: PEFT's types are loose
    if not is_lora or not hasattr(base, "weight"):
        return ()
    names = tuned.active_adapters
    plain = all(_is_plain(tuned, name) for name in names)
    shared = tuned.get_base_layer().weight.data_ptr() == base.weight.data_ptr()
    if not (plain and shared):
        return ()
    ups = [tuned.lora_B[name].weight.detach() * tuned.scaling[name] for name in names]
    downs = [tuned.lora_A[name].weight.detach() for name in names]
    return torch.cat(ups, 1), torch.cat(downs)


def is_linear(module: nn.Module) -> bool:
    """Tell whether `module` is a matrix that can be read: nn.Linear or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Tell whether `module` keeps its matrix as `[in, out]`, as GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D"


def linear_modules(block: nn.Module) -> dict[str, nn.Module]:
    """Return the linear modules of a block by their names in it."""
    return {name: module for name, module in block.named_modules() if is_linear(module)}


def _is_plain(tuned: Any, name: str) -> bool:
    """Return whether PEFT adds B A x for this adapter, and nothing else (DoRA, biases, ...)."""
    if name not in tuned.lora_A or getattr(tuned, "lora_variant", {}).get(name) is not None:
        return False
    factors = tuned.lora_A[name], tuned.lora_B[name]
    return all(type(factor) is nn.Linear and factor.bias is None for factor in factors)


@torch.no_grad()
def affine(module: Any) -> tuple[Tensor, Tensor]:
    """Weight `[out, in]` and bias `[out]` of a linear module, wrapped by PEFT or not."""
    if hasattr(module, "get_base_layer"):  # whatever the adapter does, it does it to the identity
        weight, _ = affine(module.get_base_layer())
        bias = module(weight.new_zeros(1, weight.shape[1]))[0]
        eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return (module(eye) - bias).T, bias
    if not is_linear(module):
        raise ValueError(f"a {type(module).__name__} is not a linear projection that can be read")
    weight = module.weight.T if is_transposed(module) else module.weight
    bias = module.bias if module.bias is not None else weight.new_zeros(len(weight))
    return weight.detach(), bias.detach()


def _activation(config: Any) -> Activation:
    from transformers.activations import ACT2FN

    inner = config.get_text_config()
    for name in ("hidden_act", "hidden_activation", "activation_function", "activation"):
        if getattr(inner, name, None):
            return ACT2FN[getattr(inner, name)]
    raise ValueError(f"{type(config).__name__} does not name its MLP's activation")


def read_sublayers(
    runner: BlockRunner, mlps: Sequence[MLP], batch: Batch
) -> list[tuple[MLPSublayer, HeadOutputs]]:
    """Return every block's tail and head outputs.

    Raises ValueError, with the reason, where a family has none, or where what was read does not
    reproduce the model's own block outputs on `batch`.
    """
    check_sublayers(runner, mlps, batch)
    return [sublayer_at(runner, layer, mlp) for layer, mlp in enumerate(mlps)]


def sublayer_at(runner: BlockRunner, layer: int, mlp: MLP) -> tuple[MLPSublayer, HeadOutputs]:
    """One block's tail and head outputs, where `check_sublayers` has found nothing wrong."""
    return _sublayer(runner.sites, layer, mlp), heads_at(runner, layer)


def check_sublayers(runner: BlockRunner, mlps: Iterable[MLP], batch: Batch) -> None:
    """Raise ValueError, with the reason, where blocks on `batch` are not what tails say.

    Of `mlps` one is in use at a time, with its block.
    """
    for name in ("resid_mid", "heads"):
        if name in runner.sites.unavailable:
            raise ValueError(runner.sites.unavailable[name])
    for layer, (sublayer, left) in enumerate(_mismatches(runner, mlps, batch)):
        if left > 1e-3:
            raise ValueError(
                f"block {layer} is not x + MLP(norm(x)) as read ({type(sublayer.norm).__name__}): "
                f"relative difference {left:.1e}"
            )


@torch.no_grad()
def check_mlps(runner: BlockRunner, mlps: Iterable[MLP], batch: Batch) -> None:
    """Raise ValueError, with the reason, where MLPs on `batch` are not what the modules compute.

    Norms or multipliers inside, learned activations, experts beside: what is read lacks them. Of
    `mlps` one is in use at a time, with its block.
    """
    places, n_layers = {}, runner.sites.n_layers
    for layer in range(n_layers):
        entered = runner.sites.at["mlp_in", layer]
        down = runner.sites.at["mlp_act", layer].module
        whole = down in set(entered.module.modules())
        places[f"in {layer}"] = entered
        places[f"out {layer}"] = Site(entered.module if whole else down, "output")
    with capture(places, batch.of_counted) as states:
        runner.read(batch)
    for layer, mlp in enumerate(mlps):
        x, out = (states[f"{end} {layer}"].to(mlp.down.dtype) for end in ("in", "out"))
        if (left := _relative(mlp.to(x.dtype)(x), out)) > 1e-3:
            kind = type(runner.sites.at["mlp_in", layer].module).__name__
            raise ValueError(
                f"the MLP of block {layer} ({kind}) is not down(act(gate) · up) as read: relative "
                f"difference {left:.1e}"
            )


def _relative(read: Tensor, out: Tensor) -> float:
    """Return the largest relative difference of any token, less what half precision rounds."""
    coarse = 0.0 if out.dtype in (torch.float32, torch.float64) else 0.05
    difference = (read - out).norm(dim=1) / out.norm(dim=1).clamp_min(1e-30)
    return max(float(difference.max()) - coarse, 0.0)


def _sublayer(sites: Sites, layer: int, mlp: MLP) -> MLPSublayer:
    norm, inner = sites.at["resid_mid", layer].module, sites.at["mlp_in", layer].module
    down, outer = sites.at["mlp_act", layer].module, sites.at["post_mlp", layer].module
    return MLPSublayer(
        mlp,
        norm=None if norm is inner else norm,
        post=None if down in set(outer.modules()) else outer,
    )


def heads_at(runner: BlockRunner, layer: int) -> HeadOutputs:
    """Return how the outputs of one block's heads reach the stream."""
    sites = runner.sites
    n_heads = of_blocks(runner.model.config.get_text_config(), "num_attention_heads")
    projection, outer = sites.at["heads", layer].module, sites.at["pre_mlp", layer].module
    post = None if projection in set(outer.modules()) else outer
    n_heads = n_heads[layer] if isinstance(n_heads, tuple) else n_heads
    return HeadOutputs(*affine(projection), n_heads, post)


@torch.no_grad()
def _mismatches(
    runner: BlockRunner, mlps: Iterable[MLP], batch: Batch
) -> Iterator[tuple[MLPSublayer, float]]:
    """Yield each tail with the largest relative difference of its outputs from the model's own."""
    places = {
        f"{name} {layer}": runner.sites.at[name, layer]
        for name in ("resid_mid", "post_block")
        for layer in range(runner.sites.n_layers)
    }
    with capture(places, batch.of_counted) as states:
        runner.read(batch)
    for layer, mlp in enumerate(mlps):
        sublayer = _sublayer(runner.sites, layer, mlp)
        x, out = (
            states[f"{name} {layer}"].to(sublayer.mlp.down.dtype)
            for name in ("resid_mid", "post_block")
        )
        yield sublayer, _relative(sublayer.to(x.dtype)(x), out)

"""Methods of adaptation: what each one trains, put into a base model."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.adapters.kinds import KINDS
from toolkit.analysis.linear_fit import Rank
from toolkit.errors import InputError
from toolkit.fitting.spec import FitSpec
from toolkit.models.locations import Sites, resolve, width_of
from toolkit.training.lora_overlap import Overlap
from toolkit.training.trainer import Trainee

# What PUBLISHED runs swept, everything else held constant.
SFT_RATES = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4)
LORA_RATES = (5e-5, 1e-4, 3e-4, 7e-4, 1.5e-3)
STEERING_RATES = (5e-4, 1e-3, 2e-3, 3e-3, 5e-3)


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    `kind` is an adapter's kind, or ``none`` (the base model), ``tuned`` (the fine-tune that it is
    compared with), ``sft`` (all weights), ``lora`` (rank `rank` on all linear
    modules), ``joint`` (that and a linear adapter of the same rank at `location`, `orthogonal`
    times the overlap of what the two can write added to the loss). `start` says where adapters
    come from: ``identity``, or a fit (forced, sequential, blended); without `trained` they stay as
    they were fitted; `blend` is the fit's. `options` are further arguments of the adapters.
    """

    name: str
    kind: str
    location: str = ""
    rank: Rank | None = None
    positions: str = "all"
    start: str = "identity"
    trained: bool = True
    blend: float = 0.5
    orthogonal: float = 0.0
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, adapters: Adapters) -> "Method":
        """Return the method that goes on training `adapters`."""
        kind, location = adapters.kind, adapters.location
        return cls(f"{location} {kind}", kind, location, adapters.rank, str(adapters.positions))

    @property
    def learns(self) -> bool:
        """Tell whether it is trained at all."""
        return self.trained and self.kind not in ("none", "tuned")

    @property
    def family(self) -> str:
        """Which learning rates suit it: sft, lora or steering."""
        return {"sft": "sft", "lora": "lora", "joint": "lora"}.get(self.kind, "steering")

    @property
    def spec(self) -> FitSpec:
        """How its adapters are fitted, where they do not start as the identity."""
        rank: Any = 0 if self.kind == "vector" else self.rank
        return FitSpec(self.location, self.kind, rank, self.start, self.blend)  # type: ignore[arg-type]

    @property
    def rates(self) -> tuple[float, ...]:
        return {"sft": SFT_RATES, "lora": LORA_RATES, "steering": STEERING_RATES}[self.family]


@dataclass
class Adapted:
    """A model with a method's parameters in place: `model` answers, `trainee` trains.

    `weights_changed`: the model is a copy whose own weights (or LoRA's) are what is trained.
    """

    model: nn.Module
    trainee: Trainee | None
    adapters: Adapters | None
    parameters: int
    weights_changed: bool = False


@contextmanager
def adapted(
    base: nn.Module,
    method: Method,
    sites: Sites | None = None,
    seed: int = 0,
    start: Adapters | None = None,
) -> Iterator[Adapted]:
    """`base` adapted by `method`, from `seed` or from the adapters `start`.

    `base` comes back whole: full fine-tuning and LoRA work on a copy of the model.
    """
    torch.manual_seed(seed)
    if method.kind == "none":
        yield Adapted(base, None, None, 0)
        return
    if method.kind in ("sft", "lora", "joint"):
        model: nn.Module = copy.deepcopy(base)
        if method.kind == "sft":
            model.requires_grad_(True)
        else:
            model = with_lora(model, method.rank)
        trained = [p for p in model.parameters() if p.requires_grad]
        if method.kind != "joint":
            yield Adapted(model, Trainee(model), None, _count(trained), True)
            return
        sites = None  # those of `base` are not the copy's
    else:
        model, trained = base, []
    sites = sites or resolve(model)
    # A start serves several learning rates: what is trained is a copy.
    adapters = copy.deepcopy(start) if start else new_adapters(model, method, sites)
    modules = adapters.modules.to(next(model.parameters()).device)
    trained += list(modules.parameters())
    with ExitStack() as stack:
        if model is base:
            stack.enter_context(frozen(base))
        stack.enter_context(steer(model, adapters, sites))
        trainee = None
        if method.trained:
            modules.requires_grad_(True)
            trainee = Trainee(model, modules, _penalty(model, adapters, method))
        try:
            yield Adapted(model, trainee, adapters, _count(trained), method.kind == "joint")
        finally:
            modules.requires_grad_(False).eval()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of `model` asks for a gradient meanwhile."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def new_adapters(model: Any, method: Method, sites: Sites) -> Adapters:
    """Return the method's adapters in every block of `model`, which change nothing yet."""
    if method.kind not in (*KINDS, "joint"):
        known = ", ".join((*KINDS, "sft", "lora", "joint"))
        raise InputError(f"no method is of kind {method.kind!r}: expected one of {known}")
    config = model.config.get_text_config()
    return Adapters.identity(
        method.kind if method.kind != "joint" else "linear",
        method.location,
        range(sites.n_layers),
        width_of(config, method.location),
        method.positions,
        **options_of(config, method),
    )


def options_of(config: Any, method: Method) -> dict[str, Any]:
    """Return the arguments of the adapters' `identity`, but for their width."""
    options = dict(method.options)
    if method.kind in ("head_vector", "head_affine", "gated_heads"):
        options["n_heads"] = config.num_attention_heads
    elif method.kind != "vector":
        options["rank"] = method.rank
    return options


def with_lora(model: nn.Module, rank: Any) -> nn.Module:
    """LoRA of `rank` on all linear modules but the head, scaled by 2, without dropout."""
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def _penalty(model: nn.Module, adapters: Adapters, method: Method) -> Callable[[], Tensor | float]:
    overlap = Overlap(model, adapters) if method.orthogonal else None

    def penalty() -> Tensor | float:
        own: Tensor | float = sum(a.penalty() for a in adapters.by_layer.values())
        return own + method.orthogonal * overlap() if overlap else own

    return penalty

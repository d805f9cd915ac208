"""A pair: the base model, the tuned model and their tokenizer, proven to be comparable."""

import copy
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolkit.checks import Check
from toolkit.errors import InputError
from toolkit.locations import BRANCHES, causal_lm, resolve
from toolkit.lockstep import Blocks
from toolkit.offload import Offload, beside, offloaded, state_tensors, with_stand_ins
from toolkit.proofs import prove
from toolkit.weights import (
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    model_folder,
    one_line,
    plain_folder,
    quiet_transformers,
)

ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class ModelPair:
    """Two models of one shape with one tokenizer; make one with `load` or `from_models`.

    `missing` says why a location does not apply to this family; `checks` holds what was proved
    when the pair was made.
    """

    base: nn.Module
    tuned: nn.Module
    tokenizer: Any
    base_blocks: Blocks = field(repr=False)
    tuned_blocks: Blocks = field(repr=False)
    base_name: str = "base"
    tuned_name: str = "tuned"
    checks: list[Check] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        base: str | Path,
        tuned: str | Path,
        dtype: torch.dtype | str = torch.float32,
        device: str | torch.device = "cpu",
        offload: bool = False,
    ) -> "ModelPair":
        """Load both halves: a hub id, a folder, a ``.gguf`` file or a packaged model's name.

        `tuned` may be a folder with a PEFT adapter of `base`; the weights are then held once. With
        `offload` a block's weights are read from disk when the block is reached. Raises InputError
        where the two cannot be compared, and says what differs first.
        """
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        with quiet_transformers():
            read = _offloaded if offload else _in_memory
            if _is_adapter(tuned):
                base_model, ours = read(base, dtype, device)
                tuned_model, theirs = _with_adapter(base_model, ours, base, Path(tuned))
            else:
                _compare_configs(load_config(base), load_config(tuned))
                base_model, ours = read(base, dtype, device)
                tuned_model, theirs = read(tuned, dtype, device)
            tokenizer = _shared_tokenizer(base, tuned)
        return cls.from_models(
            base_model, tuned_model, tokenizer, str(base), str(tuned), (ours, theirs)
        )

    @classmethod
    def from_models(
        cls,
        base: nn.Module,
        tuned: nn.Module,
        tokenizer: Any,
        base_name: str = "base",
        tuned_name: str = "tuned",
        offloads: tuple[Offload | None, Offload | None] = (None, None),
    ) -> "ModelPair":
        """A pair of models in memory. Both are put into evaluation mode.

        `offloads` bring the weights of models whose blocks have none.
        """
        _compare_configs(base.config, tuned.config)
        _compare_shapes(base, tuned)
        base_blocks = Blocks(base.eval(), resolve(base), offloads[0])
        tuned_blocks = Blocks(tuned.eval(), resolve(tuned), offloads[1])
        checks, refused = prove(base_blocks, tuned_blocks)
        return cls(
            base,
            tuned,
            tokenizer,
            base_blocks,
            tuned_blocks,
            base_name,
            tuned_name,
            checks,
            base_blocks.sites.missing | refused,
        )

    @property
    def branches(self) -> tuple[str, ...]:
        """The locations where deltas are taken, of `BRANCHES` those that this family has."""
        return tuple(name for name in BRANCHES if name not in self.missing)

    @property
    def n_layers(self) -> int:
        return self.base_blocks.sites.n_layers

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.base.parameters()).dtype

    @cached_property
    def hashes(self) -> tuple[str, str]:
        """The fingerprints of the base and the tuned model, taken once."""
        ours = state_tensors(self.base, self.base_blocks.offload)
        return fingerprint(ours), fingerprint(state_tensors(self.tuned, self.tuned_blocks.offload))

    @contextmanager
    def resident(self, layer: int) -> Iterator[None]:
        """Keep the weights of block `layer` of both models in memory."""
        with self.base_blocks.resident(layer), self.tuned_blocks.resident(layer):
            yield

    @property
    def n_parameters(self) -> int:
        """Of the base model."""
        return sum(parameter.numel() for parameter in self.base.parameters())


def _is_adapter(source: str | Path) -> bool:
    return (Path(source) / ADAPTER_CONFIG).is_file()


def _in_memory(source: str | Path, dtype: Any, device: Any) -> tuple[nn.Module, None]:
    return load_model(source, dtype, device), None


def _offloaded(source: str | Path, dtype: Any, device: Any) -> tuple[nn.Module, Offload]:
    return offloaded(model_folder(source), dtype, device)


def _with_adapter(
    base: nn.Module, offload: Offload | None, base_source: str | Path, folder: Path
) -> tuple[nn.Module, Offload | None]:
    """`base` with the PEFT adapter in `folder`, as a second model that shares base's tensors."""
    from peft import PeftConfig, PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors import safe_open

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise InputError(
            f"{folder} has no adapter_model.safetensors: save the adapter as safetensors "
            "(pickled adapters are not read)"
        )
    _check_adapter_base(json.loads((folder / ADAPTER_CONFIG).read_text()), base_source, folder)
    config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise InputError(f"{folder} is a prompt-learning adapter: it changes no weight of a block")
    with safe_open(weights, "pt") as saved:
        names = set(saved.keys())
    shared: dict[int, Any] = {}
    if offload:
        if not _leaves_base_alone(config, names):
            raise InputError(
                f"{folder} changes weights of its base when it is loaded, which --offload cannot "
                "do: merge it into a model folder"
            )
        with_stand_ins(base)
    if _leaves_base_alone(config, names):
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    try:
        # PEFT looks on the hub for what the adapter calls its base, and warns that it is not there.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = PeftModel.from_pretrained(copy.deepcopy(base, shared), folder)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the adapter {folder} does not fit the base model {base_source}: {one_line(error)}"
        ) from error
    expected = get_peft_model_state_dict(tuned, save_embedding_layers=False).keys()
    # Tensors of the model itself, such as embeddings, may be saved along with an adapter.
    different = sorted((names ^ expected) - (tuned.state_dict().keys() & names))
    if different:
        raise InputError(
            f"the adapter {folder} does not fit the base model {base_source}: "
            f"tensor {different[0]!r} is on one side only"
        )
    tuned = tuned.to(next(base.parameters()).device).eval().requires_grad_(False)
    if not offload:
        return tuned, None
    beside_base = beside(offload, tuned)
    offload.release()
    return tuned, beside_base


def _leaves_base_alone(config: Any, names: set[str]) -> bool:
    """Whether PEFT writes to no tensor of the base model when it loads this adapter.

    It does where biases or whole modules were trained, and where the adapter's start was cut out
    of the weights (PiSSA and its like): the base model's tensors are then not shared.
    """
    starts = (True, False, "gaussian", "orthogonal")
    plain_start = getattr(config, "init_lora_weights", True) in starts
    return plain_start and all("lora_" in name for name in names)


def _check_adapter_base(config: dict, base: str | Path, folder: Path) -> None:
    """By the last part of the names, since folders move."""
    recorded = config.get("base_model_name_or_path")
    if not recorded:
        return
    names = {Path(name).name for name in (str(base), plain_folder(base))}
    if Path(recorded).name not in names:
        raise InputError(
            f"the adapter {folder} is of another base: it names {recorded!r}, the base given is "
            f"{str(base)!r}; if they are the same model, correct base_model_name_or_path in its "
            f"{ADAPTER_CONFIG}"
        )


def _shared_tokenizer(base: str | Path, tuned: str | Path) -> Any:
    """The tuned model's tokenizer, which must agree with base's; base's where it has none."""
    ours = load_tokenizer(base)
    folder = Path(plain_folder(tuned))
    has_own = not folder.is_dir() or any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    )
    if not has_own:
        return ours
    theirs = load_tokenizer(tuned)
    compare_tokenizers(ours, theirs)
    return theirs


def compare_tokenizers(base: Any, tuned: Any) -> None:
    """Raise InputError at the first token that the two vocabularies do not share."""
    ours = {index: token for token, index in base.get_vocab().items()}
    theirs = {index: token for token, index in tuned.get_vocab().items()}
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            raise InputError(
                f"the tokenizers differ at token {index}: base has {ours.get(index)!r}, tuned has "
                f"{theirs.get(index)!r}; deltas need the same tokens on both sides"
            )


def _compare_configs(base: Any, tuned: Any) -> None:
    names = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    for name in (*names, "num_attention_heads", "num_key_value_heads"):
        ours = getattr(base.get_text_config(), name, None)
        theirs = getattr(tuned.get_text_config(), name, None)
        if ours != theirs:
            hint = (
                "; one side's vocabulary was resized: resize the other, or drop the added tokens"
                if name == "vocab_size"
                else "; give two models of one architecture and size"
            )
            raise InputError(f"the models differ in {name}: base {ours}, tuned {theirs}{hint}")


def _compare_shapes(base: nn.Module, tuned: nn.Module) -> None:
    if base is not causal_lm(tuned) and hasattr(tuned, "get_base_model"):
        return  # a PEFT model: built from base
    ours = {name: tuple(p.shape) for name, p in base.state_dict().items()}
    theirs = {name: tuple(p.shape) for name, p in tuned.state_dict().items()}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"the models differ at {name}: base {ours.get(name)}, tuned {theirs.get(name)}"
            )


@dataclass(frozen=True)
class Outline:
    """What is known of a pair without its weights.

    adapter: entries of the factors in a PEFT adapter that shares base's weights; None where the
    tuned half has weights of its own.
    """

    config: Any
    tokenizer: Any
    adapter: int | None


def outline(base: str | Path, tuned: str | Path) -> Outline:
    """Configuration and tokenizer of a pair; of its weights an adapter's shapes at most.

    A ``.gguf`` file is converted first, where it has not been yet.
    """
    adapter, config = None, load_config(base)
    if _is_adapter(tuned):
        adapter = _factor_entries(Path(tuned))
    else:
        _compare_configs(config, load_config(tuned))
    with quiet_transformers():
        return Outline(config, _shared_tokenizer(base, tuned), adapter)


def _factor_entries(folder: Path) -> int | None:
    from peft import PeftConfig
    from safetensors import safe_open

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        return 0  # `ModelPair.load` says what is wrong with it
    with safe_open(weights, "pt") as saved:
        shapes = {name: saved.get_slice(name).get_shape() for name in saved.keys()}  # noqa: SIM118
    if not _leaves_base_alone(PeftConfig.from_pretrained(str(folder)), set(shapes)):
        return None
    return sum(math.prod(shape) for shape in shapes.values())

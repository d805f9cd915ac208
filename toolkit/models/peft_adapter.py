"""A PEFT adapter as the tuned half: it shares the tensors of its base."""

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from toolkit.errors import InputError
from toolkit.models.loading import one_line, plain_folder
from toolkit.models.offload import Offload, beside, with_stand_ins
from toolkit.models.weight_files import WeightFiles

ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(source: str | Path) -> bool:
    return (Path(source) / ADAPTER_CONFIG).is_file()


def with_adapter(
    base: nn.Module, offload: Offload | None, base_source: str | Path, folder: Path
) -> tuple[nn.Module, Offload | None]:
    """`base` with the PEFT adapter in `folder`, as a second model that shares base's tensors."""
    from peft import PeftConfig, PeftModel
    from peft.utils import get_peft_model_state_dict

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
    names = set(WeightFiles(folder).names)
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
    """Return whether PEFT writes to no tensor of the base model when it loads this adapter.

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


def factor_entries(folder: Path) -> int | None:
    from peft import PeftConfig

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        return 0  # `ModelPair.load` says what is wrong with it
    files = WeightFiles(folder)
    shapes = {name: files.shape(name) for name in files.names}
    if not _leaves_base_alone(PeftConfig.from_pretrained(str(folder)), set(shapes)):
        return None
    return sum(math.prod(shape) for shape in shapes.values())

"""A PEFT adapter as the tuned half: it shares the tensors of its base."""

import copy
import json
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import InputError
from toolkit.models.loading import ADAPTER_CONFIG, load_config, plain_folder, require_model
from toolkit.models.locations import causal_lm, n_embeddings
from toolkit.models.offload import Offload, beside, with_stand_ins
from toolkit.models.weight_files import (
    ADAPTER_FILE,
    WeightFiles,
    adapter_path,
    has_weights,
    model_paths,
    require_finite,
)

COMPARED = 8  # tensors of two folders that say whether these are one model


def is_adapter(source: str | Path) -> bool:
    """Tell whether `source` is the folder of a PEFT adapter, and of nothing else."""
    folder = Path(source)
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    if has_weights(folder):
        require_model(folder)  # says that there are two
    return True


class WroteToBaseError(Exception):
    """Loading an adapter changed tensors of its base: it needs a copy of them."""


def with_adapter(
    base: nn.Module,
    offload: Offload | None,
    base_source: str | Path,
    folder: Path,
    share: bool = True,
) -> tuple[nn.Module, Offload | None]:
    """`base` with the PEFT adapter in `folder`, as a second model that shares base's tensors.

    Without `share` it has tensors of its own. Raises `WroteToBaseError` where loading the adapter
    has changed base's tensors all the same (KaSA): base must then be read again.
    """
    from peft.utils import get_peft_model_state_dict

    names = set(WeightFiles([adapter_path(folder)]).names)
    config = _config(folder)
    _check_adapter_base(config.base_model_name_or_path, base_source, folder)
    if config.is_prompt_learning:
        raise InputError(f"{folder} is a prompt-learning adapter: it changes no weight of a block")
    share = share and _leaves_base_alone(config, names)
    if offload:
        if not share:
            raise _not_offloaded(config, folder)
        with_stand_ins(base)
    try:
        tuned = _loaded(base, base_source, folder, share)
    except (WroteToBaseError, InputError) as error:
        from_stand_ins = isinstance(error.__cause__, torch.linalg.LinAlgError)
        if offload and (from_stand_ins or isinstance(error, WroteToBaseError)):
            raise _not_offloaded(config, folder) from error
        raise
    expected = get_peft_model_state_dict(tuned, save_embedding_layers=False).keys()
    # Tensors of the model itself, such as embeddings, may be saved along with an adapter.
    different = sorted((names ^ expected) - (tuned.state_dict().keys() & names))
    if different:
        raise InputError(
            f"the adapter {folder} does not fit the base model {base_source}: "
            f"tensor {different[0]!r} is on one side only"
        )
    tuned = tuned.to(next(base.parameters()).device).eval().requires_grad_(False)
    known = set(map(id, base.parameters())) if offload else set()
    new = [t for t in (*tuned.parameters(), *tuned.buffers()) if id(t) not in known]
    if offload and any(tensor.isnan().any() for tensor in new):  # made of a stand-in
        raise _not_offloaded(config, folder)
    for name, parameter in tuned.named_parameters():
        if id(parameter) not in known:
            require_finite(name, parameter, str(folder))
    beside_base = None
    if offload:
        beside_base = beside(offload, tuned)
        offload.release()
    _require_same_modules(base, tuned, config, folder)
    _prove_inner(tuned, config, folder)
    return tuned, beside_base


def _not_offloaded(config: Any, folder: Path) -> InputError:
    return InputError(
        f"{folder} ({config.peft_type.value}) holds tensors of its base, or reads or changes them "
        "when it is loaded, which --offload cannot do: merge it into a model folder"
    )


def _loaded(base: nn.Module, base_source: str | Path, folder: Path, share: bool) -> nn.Module:
    from peft import PeftModel

    tensors = (*base.parameters(), *base.buffers()) if share else ()
    before = _hashes(tensors)
    try:
        # PEFT looks on the hub for what the adapter calls its base, and warns that it is not there.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copied: Any = copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})
            rows = _embedded(folder, base)
            if rows not in (None, n_embeddings(base)):
                copied.resize_token_embeddings(rows, mean_resizing=False)
            tuned = PeftModel.from_pretrained(copied, folder)
    except Exception as error:  # whatever PEFT finds wrong with the two
        raise InputError(
            f"the adapter {folder} does not fit the base model {base_source}: {_reason(error)}"
        ) from error
    if _hashes(tensors) != before:
        raise WroteToBaseError
    return tuned


def _embedded(folder: Path, base: Any) -> int | None:
    """Count the tokens of the whole embedding that is saved along with an adapter, if there is."""
    files = WeightFiles([adapter_path(folder)])
    both = base.get_input_embeddings(), base.get_output_embeddings()
    leaves = {name.split(".")[-1] for name, module in base.named_modules() if module in both}
    embeds = re.compile(rf"\.({'|'.join(leaves)})(\.base_layer)?\.weight$")
    saved = [name for name in files.names if embeds.search(name)]
    return files.shape(saved[0])[0] if saved else None


def _hashes(tensors: Iterable[Tensor]) -> list[tuple[int, ...]]:
    some = (t for t in tensors if t.is_floating_point() and not t.is_meta)
    return [_hash(tensor) for tensor in some]


def _hash(tensor: Tensor) -> tuple[int, ...]:
    if tensor.numel() > 1 and not any(tensor.stride()):  # a stand-in: all its entries are one
        return tensor.data_ptr(), tensor._version
    return (int(torch.hash_tensor(tensor).view(torch.int64)),)


def _require_same_modules(base: Any, tuned: Any, config: Any, folder: Path) -> None:
    """Raise InputError where the adapter put another module in the place of one of base's."""
    for name, _ in causal_lm(base).named_modules():
        try:
            causal_lm(tuned).get_submodule(name)  # PEFT's wrappers hand on what they wrap
        except AttributeError as error:
            raise InputError(
                f"the adapter {folder} ({config.peft_type.value}) puts other modules in the place "
                f"of {name!r}: the two models cannot be compared module by module"
            ) from error


@torch.no_grad()
def _prove_inner(tuned: Any, config: Any, folder: Path) -> None:
    """Raise InputError unless the model inside answers as the PEFT model around it does.

    Adapters that act in the outer model's own call (activated LoRA, X-LoRA) would be lost in a
    march, which runs the inner model's blocks.
    """
    inner = causal_lm(tuned)
    embedding = inner.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(n_embeddings(inner), (1, 16), generator=generator)
    trigger = getattr(config, "alora_invocation_tokens", None) or ()
    ids[0, 6 : 6 + len(trigger)] = torch.tensor(trigger[:10], dtype=torch.long)
    batch = {"input_ids": ids.to(embedding.weight.device)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    try:
        outer, own = (model(**batch, use_cache=False).logits for model in (tuned, inner))
        same = torch.equal(outer, own)
        reason = "its effect is in the PEFT model's own call, not in the blocks"
    except Exception as error:  # the adapter wants more than tokens
        same, reason = False, _reason(error)
    if not same:
        raise InputError(
            f"the adapter {folder} ({config.peft_type.value}) cannot be followed block by block: "
            f"{reason}; merge it into a model folder, if it can be merged"
        )


def _config(folder: Path) -> Any:
    """Read the adapter's configuration; raises InputError where it is none that PEFT knows."""
    from peft import PeftConfig, PeftType

    try:
        kind = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["peft_type"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{folder / ADAPTER_CONFIG} is no adapter's configuration ({_reason(error)}): expected "
            "what PEFT's save_pretrained writes"
        ) from error
    if kind not in PeftType.__members__:
        raise InputError(f"{folder} is a {kind} adapter, which this version of PEFT does not know")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever PEFT finds wrong with the file
        raise InputError(f"cannot read {folder / ADAPTER_CONFIG}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return an exception's message in one line, the shapes that PEFT lists below it included."""
    if isinstance(error, KeyError):
        return f"{error} is not there"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _leaves_base_alone(config: Any, names: set[str]) -> bool:
    """Return whether PEFT writes to no tensor of the base model when it loads this adapter.

    It does where biases or whole modules were trained, and where the adapter's start was cut out
    of the weights (PiSSA and its like): the base model's tensors are then not shared. Kinds that
    write to them all the same are found by the tensors' hashes.
    """
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    starts = (True, False, "gaussian", "orthogonal")
    plain_start = getattr(config, "init_lora_weights", True) in starts
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "lora_").replace("_lambda_", "_")
    return plain_start and all(prefix in name for name in names)


def _check_adapter_base(recorded: str | None, base: str | Path, folder: Path) -> None:
    """Raise InputError where the adapter names another base than the one that is given.

    Names agree by their last part, since folders move; a hub's snapshot folder has the name of its
    repository. Where both are here, their content decides.
    """
    if not recorded:
        return
    theirs = Path(recorded)
    ours = Path(plain_folder(base))
    if theirs.is_dir() and ours.is_dir():
        if _same_model(theirs, ours):
            return
    elif {_repository(theirs)} & {_repository(Path(str(base))), _repository(ours)}:
        return
    raise InputError(
        f"the adapter {folder} is of another base: it names {recorded!r}, the base given is "
        f"{str(base)!r}; if they are the same model, give it under that name (a link will do)"
    )


def _repository(path: Path) -> str:
    """Return a model's name without its owner: of a hub's snapshot folder, the repository's."""
    cached = [part for part in path.parts if part.startswith("models--")]
    return cached[-1].split("--")[-1] if cached else path.name


def _same_model(a: Path, b: Path) -> bool:
    """Return whether two folders hold one model: configuration, names, and some tensors."""
    if a.resolve() == b.resolve():
        return True
    try:
        if load_config(a).to_diff_dict() != load_config(b).to_diff_dict():
            return False
        ours, theirs = (WeightFiles(model_paths(folder)) for folder in (a, b))
    except InputError:  # no model is there any more
        return _repository(a) == _repository(b)
    names = sorted(ours.names)
    some = {names[i * (len(names) - 1) // COMPARED] for i in range(COMPARED + 1)}
    return names == sorted(theirs.names) and all(
        ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in some
    )


def factor_entries(folder: Path) -> int | None:
    if not (folder / ADAPTER_FILE).is_file():
        return 0  # `ModelPair.load` says what is wrong with it
    files = WeightFiles([adapter_path(folder)])
    shapes = {name: files.shape(name) for name in files.names}
    if not _leaves_base_alone(_config(folder), set(shapes)):
        return None
    return sum(math.prod(shape) for shape in shapes.values())

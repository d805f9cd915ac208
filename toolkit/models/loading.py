"""Loading one model and its tokenizer: hub id, local folder, ``.gguf`` file or packaged model.

What comes back is what the files hold: a tensor that is missing, left over, of another shape or no
number is refused by its name, where transformers would put random numbers in its place.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from toolkit.errors import InputError, one_line, refused
from toolkit.models.packaged import PACKAGED, converted, packaged_folder, sha256_of
from toolkit.models.quantised import forget, plain_weights
from toolkit.models.weight_files import (
    INDEX,
    ONE_FILE,
    has_weights,
    model_paths,
    opened,
    require_finite,
)
from toolkit.runtime.console import quiet_transformers

ADAPTER_CONFIG = "adapter_config.json"
DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")
# How a file's names begin where a wrapper was saved in place of the model, and what to do.
WRAPPERS = {
    "_orig_mod.": "saved from torch.compile: save its `_orig_mod`",
    "module.": "saved from a data-parallel wrapper: save its `module`",
    "base_model.model.": "saved around an adapter: merge it, then save",
    "base_layer.": "saved around an adapter: merge it, then save",
}


def parse_dtype(name: str, option: str = "--dtype") -> torch.dtype | str:
    """Return torch's dtype of that name; ``auto`` stays. Raises InputError for any other word."""
    if name not in DTYPES:
        raise InputError(f"{option} is {name!r}: expected one of {', '.join(DTYPES)}")
    return name if name == "auto" else getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the word for a precision, as `parse_dtype` takes it."""
    return str(dtype).removeprefix("torch.")


def require_device(name: str | torch.device) -> torch.device:
    """Return the device of that name. Raises InputError unless there is one here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device {name} cannot be used here ({one_line(error)}): expected cpu, cuda, "
            "cuda:0, mps, ..."
        ) from error
    return device


def load_model(
    source: str | Path, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu"
) -> Any:
    """Return the causal language model at `source`, in evaluation mode, without gradients.

    `source` is a hub id, a folder, a ``.gguf`` file or a name in `PACKAGED`. Only safetensors and
    GGUF weights are read, and no code from the source is run. Raises InputError unless the files
    hold every tensor of the model, and nothing else.
    """
    require_device(device)
    folder = model_source(source)
    config = load_config(folder)
    auto, plain = auto_class(config, source), plain_weights(config, str(source))
    if Path(folder).is_dir():
        for path in model_paths(Path(folder)):
            opened(path)  # says what is wrong with a file
    with refused(f"cannot load a model from {str(source)!r}"), quiet_transformers():
        model, found = auto.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `require_whole` names them
            **plain,
        )
    require_whole(found, str(source))
    if plain:
        forget(model.to(parse_dtype("float32") if dtype == "auto" else dtype), config)
    for name, parameter in model.named_parameters():
        require_finite(name, parameter, str(source))
    return model.to(device).eval().requires_grad_(False)


def auto_class(config: Any, source: str | Path = "model") -> Any:
    """Return transformers' class that loads the language model of `config`.

    A model of images and text is loaded whole and read through its language model. Raises
    InputError where there is none that continues a text.
    """
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    raise InputError(
        f"{str(source)!r} is a {config.model_type}, which transformers has no model for that "
        "continues a text token by token: give a causal language model"
    )


def require_whole(found: dict[str, Any], source: str) -> None:
    """Raise InputError unless loading left no tensor missing, over, or of another shape.

    `found` is what transformers says of it.
    """
    if different := sorted(found["mismatched_keys"]):
        name, stored, expected = different[0]
        raise InputError(
            f"{source}: {name!r} is {tuple(stored)} in the files, {tuple(expected)} by config.json"
            f"{_more(different)}: the two are not of one model"
        )
    unexpected, missing = sorted(found["unexpected_keys"]), sorted(found["missing_keys"])
    hint = next((h for p, h in WRAPPERS.items() if any(p in name for name in unexpected)), "")
    if missing:
        reason = hint or "transformers would put random numbers in its place"
        raise InputError(f"{source} has no tensor {missing[0]!r}{_more(missing)}: {reason}")
    if unexpected:
        reason = hint or "expected a causal language model's files, as save_pretrained writes them"
        raise InputError(
            f"{source} holds {unexpected[0]!r}{_more(unexpected)}, which its model does not have: "
            f"{reason}"
        )


def _more(names: list[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def model_folder(source: str | Path) -> Path:
    """Return the local folder of a model's safetensors; a hub id is downloaded."""
    folder = Path(model_source(source))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        patterns = ["*.safetensors", "*.json"]
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=patterns))
        except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise InputError(
                f"cannot load a model from {str(source)!r}: {one_line(error)}"
            ) from error
        require_model(folder)
    return folder


def load_tokenizer(source: str | Path) -> Any:
    """Return the tokenizer at `source`; see `load_model` for what a source is."""
    with refused(f"cannot load a tokenizer from {_called(source)}"):
        return AutoTokenizer.from_pretrained(plain_folder(source), trust_remote_code=False)


def load_config(source: str | Path) -> Any:
    """Return the configuration at `source`, without its weights."""
    with refused(f"cannot read a model from {_called(source)}"):
        return AutoConfig.from_pretrained(model_source(source), trust_remote_code=False)


def _called(source: str | Path) -> str:
    """Quote the name of a model, and say whether it is a hub's: a path may be meant."""
    hub = not Path(source).exists() and str(source) not in PACKAGED
    return f"{str(source)!r}{', which is no folder here, so a name on the hub' if hub else ''}"


def plain_folder(source: str | Path) -> str:
    """`source` as what transformers loads safetensors from: a folder, or a hub id left as it is."""
    if str(source) in PACKAGED:
        return str(packaged_folder(str(source)))
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"no such GGUF file: {path}")
        return str(converted(path, sha256_of(path)))
    if not path.exists() and str(source).startswith((".", "/", "~")):
        raise InputError(f"no such model folder: {source}")
    if not path.exists() and "/" not in str(source) and (near := _nearly(str(source))):
        raise InputError(f"there is no model {str(source)!r} here: is {near} meant?")
    if path.exists() and not path.is_dir():
        raise InputError(
            f"{path} is neither a model folder nor a .gguf file: "
            "give a hub id, a folder with config.json, or a .gguf file"
        )
    return str(source)


def _nearly(name: str) -> str | None:
    """Return the packaged model whose name is `name` but for its case or an ending left out.

    The hub would be asked for such a name first, for half a minute where there is no network.
    """
    found = [known for known in PACKAGED if known.lower().startswith(name.lower())]
    return found[0] if len(found) == 1 and len(name) >= len(found[0]) / 2 else None


def model_source(source: str | Path) -> str:
    """`source` as `plain_folder` gives it; raises InputError where a folder holds no one model."""
    found = plain_folder(source)
    if Path(found).is_dir():
        require_model(Path(found))
    return found


def require_model(folder: Path) -> None:
    """Raise InputError unless `folder` holds one model in safetensors, and no adapter beside it."""
    if (folder / ADAPTER_CONFIG).is_file():
        if has_weights(folder):
            raise InputError(
                f"{folder} holds a model's weights and an adapter beside them ({ADAPTER_CONFIG}), "
                "which transformers would apply on top: keep each in a folder of its own"
            )
        raise InputError(f"{folder} is an adapter, not a model: give it as TUNED, its base as BASE")
    if not (folder / "config.json").is_file():
        inner = sorted(
            path.parent
            for name in ("config.json", ADAPTER_CONFIG)
            for path in folder.glob(f"*/{name}")
        )
        hint = f"; {inner[-1]} has one" if inner else ""
        raise InputError(f"{folder} is no model's folder: it has no config.json{hint}")
    if not has_weights(folder):
        patterns = ("*.bin", "*.pt", "*.pth")
        if pickled := [path.name for pattern in patterns for path in folder.glob(pattern)]:
            raise InputError(
                f"{folder} holds pickled weights ({pickled[0]}), which can run code when read: "
                "convert them to safetensors (model.save_pretrained does)"
            )
        raise InputError(f"{folder} has no weights: expected {ONE_FILE} or {INDEX}")


def fingerprint(state: Iterable[tuple[str, Tensor]]) -> str:
    """The sha256 of a model's parameters and buffers: names, dtypes, shapes and bytes, by name.

    `state` gives them in the order of their names.
    """
    digest = hashlib.sha256()
    for name, tensor in state:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()

"""The model card that stands beside adapters on disk and on a hub."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from toolkit.runtime.output import seen_from

CARD = "README.md"
MARK = "<!-- Written by oracle-toolkit. Without this line it is never overwritten. -->"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
ADDED_AT = {
    "heads": "before attention's output projection",
    "pre_mlp": "before the MLP",
    "post_mlp": "after the MLP, before the skip",
    "post_block": "after the block",
}
KEPT = {
    "base": "base",
    "tuned": "fine-tune",
    "task": "task",
    "data": "data",
    "data_sha256": "sha256 of the data",
}
TEXTS = {*KEPT.values(), "versions"}  # of others: written as code
HOW = """\
```python
from toolkit import Adapters, steer
from toolkit.models.loading import load_model, load_tokenizer
model, tokenizer = load_model({base!r}), load_tokenizer({base!r})
with steer(model, Adapters.from_pretrained(".")):  # the folder of this card
    said = model.generate(**tokenizer("What is 2 + 3?", return_tensors="pt"), max_new_tokens=32)
```
"""


def write_card(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the card of the adapters with `config` into `folder`, unless another's is there."""
    path, base = folder / CARD, str(config["info"].get("base", ""))
    if path.exists() and not is_ours(path):
        return
    if base and not Path(base).is_absolute():  # its lines are run in the folder
        base = seen_from(folder, base)
    path.write_text(card(config, base), encoding="utf-8")


def is_ours(path: Path) -> bool:
    """Return whether the card at `path` is one that `write_card` may write again."""
    return MARK in path.read_text(encoding="utf-8", errors="replace").splitlines()


def card(config: Mapping[str, Any], source: str = "") -> str:
    """Return the card, Markdown with the hub's front matter; `config` is ``adapters.json``.

    `source` is what its lines load the base from; by default its name.
    """
    info = config["info"]
    base = str(info.get("base", ""))
    front = ModelCardData(
        base_model=base if _on_hub(base) else None,
        library_name="oracle-toolkit",
        tags=["activation-steering", config["kind"]],
    )
    lines = [
        f"- {name}: {_code(value) if name in TEXTS else value}"
        for name, value in facts(config).items()
    ]
    how = HOW.format(base=source or base or "BASE")
    return (
        f"---\n{front.to_yaml()}\n---\n{MARK}\n\n# Steering adapters{_of(base)}\n\n"
        "They are added to the hidden states of the base model, whose weights stay as they are.\n\n"
        + "\n".join(lines)
        + f"\n\n## How to load them\n\n{how}\nFrom a hub, give `Adapters.from_pretrained` the "
        "folder that `huggingface_hub.snapshot_download` returns.\n"
    )


def facts(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what the card lists, by name; what `info` does not say is left out."""
    info, layers = config["info"], sorted(map(int, config["layers"]))
    whole = layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1
    blocks = f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
    found = {
        "place": f"{config['location']}, {ADDED_AT[config['location']]}",
        "kind": f"{config['kind']}, rank {config['rank']}",
        "positions": config["positions"],
        "blocks": blocks,
        "parameters": f"{config['parameters']:,}",
        "made by": config["fit"],
        "recovered": recovered_words(info.get("recovered")),
    }
    if _has_numbers(answers := info.get("accuracy"), "share", "low", "high"):
        found["accuracy on the task"] = f"{answers['share']:.3f}{_interval(answers)}"
    for name, title in KEPT.items():
        if value := info.get(name):
            found[title] = str(value)
    if isinstance(versions := info.get("versions"), Mapping):
        found["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return {name: value for name, value in found.items() if value}


def recovered_words(share: Any) -> str:
    """Write the share of KL(tuned ‖ base) that is recovered, with what is known of its error."""
    if not _has_numbers(share, "mean"):
        return ""
    error = ""
    if _has_numbers(share, "low", "high"):
        error = _interval(share)
    elif _has_numbers(share, "sem"):
        error = f" ± {share['sem']:.3f} (one standard error)"
    return f"{share['mean']:.3f}{error} of KL(tuned ‖ base), on held-out prompts"


def _has_numbers(found: Any, *names: str) -> bool:
    """Tell whether `found` has finite numbers of these names: `info` may hold anything."""
    values = [found.get(name) for name in names] if isinstance(found, Mapping) else [None]
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def _interval(found: Mapping[str, float]) -> str:
    return f" (95 % interval {found['low']:.3f} to {found['high']:.3f})"


def _of(base: str) -> str:
    return f" of {_code(base)}" if base else ""


def _code(value: Any) -> str:
    """Write `value` as code on one line, so that it is never markup."""
    return "`" + " ".join(str(value).replace("`", "'").split()) + "`"


def _on_hub(name: str) -> bool:
    """Return whether `name` is a hub's, and no folder here: the hub refuses cards with others."""
    return bool(HUB_NAME.fullmatch(name)) and not Path(name).exists()

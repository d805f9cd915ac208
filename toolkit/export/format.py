"""Define an export format, and how faithfully it holds given adapters."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from toolkit.adapters.collection import Adapters
from toolkit.adapters.positions import Positions
from toolkit.models.loading import load_model, load_tokenizer, parse_dtype
from toolkit.runtime.console import quiet_transformers

Level = Literal["exact", "approximate", "refused"]


@dataclass(frozen=True)
class Base:
    """Hold the model that adapters steer, its tokenizer, and the name by which it was loaded."""

    model: Any
    tokenizer: Any
    name: str = ""

    @classmethod
    def load(cls, name: str, dtype: str = "float32", device: str | torch.device = "cpu") -> "Base":
        """Load a hub id, a folder, a ``.gguf`` file or a packaged model."""
        with quiet_transformers():
            return cls(load_model(name, parse_dtype(dtype), device), load_tokenizer(name), name)


@dataclass(frozen=True)
class Fidelity:
    """Say which adapters a format holds in place of given ones, and in one sentence why.

    `held` are the given adapters (exact), others that are the format's nearest (approximate), or
    None (refused); `reason` is empty where they are exact.
    """

    held: Adapters | None
    reason: str = ""

    @property
    def level(self) -> Level:
        """Return ``exact``, ``approximate`` or ``refused``."""
        if self.held is None:
            return "refused"
        return "approximate" if self.reason else "exact"


class Format(ABC):
    """One format of files, named by its `name`; `needs_base` says whether it reads the model."""

    name: ClassVar[str]
    needs_base: ClassVar[bool]

    @abstractmethod
    def fidelity(self, adapters: Adapters, base: Base | None) -> Fidelity:
        """Tell which adapters the format holds in place of `adapters`; change nothing.

        `base` is not None where `needs_base`.
        """

    @abstractmethod
    def write(self, adapters: Adapters, base: Base | None, out: Path) -> None:
        """Write `adapters`, which are `held` by some `fidelity`, into the folder `out`.

        `out` is there and empty. A reader of the format then does what `steer` does with them.
        """


def refused(reason: str) -> Fidelity:
    """Return that no adapters are held, and why."""
    return Fidelity(None, reason)


def steering_only(positions: str, adapters: Adapters) -> Fidelity:
    """Return what a format holds of `adapters` that steers ``all`` tokens, or ``every``, alone.

    ``all`` is approximated by ``every`` and the reverse: they differ in a sequence's first token.
    """
    ours, theirs = adapters.positions, Positions.parse(positions)
    if ours == theirs:
        return Fidelity(adapters)
    if ours.first is not None:
        return refused(f"it cannot steer at positions {ours}: it steers every token of a text")
    what = (
        "it also steers each sequence's first token, which the adapters leave alone"
        if theirs.sink
        else "it leaves each sequence's first token alone, which the adapters steer"
    )
    return Fidelity(replace(adapters, positions=theirs), what)

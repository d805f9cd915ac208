"""Define an export format, and how faithfully it holds given adapters."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.adapters.positions import Positions
from toolkit.models.loading import load_model, load_tokenizer, parse_dtype
from toolkit.runtime.console import quiet_transformers

Level = Literal["exact", "approximate", "refused"]
Write = Callable[[Path], None]


def _nothing(out: Path) -> None:
    """Write nothing into the folder: what is refused."""


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
    """Say which adapters a format holds in place of given ones, and why; and write them.

    `held` are the given adapters (exact), others that are the format's nearest (approximate), or
    None (refused); `reason` is a sentence, empty where they are exact. `write` writes them into a
    folder that is there and empty: a reader of the format then does what `steer` does with them,
    or, where precision stands between, what the context `attached` makes of the base model.
    """

    held: Adapters | None
    reason: str = ""
    write: Write = _nothing
    attached: Callable[[], AbstractContextManager[None]] | None = None

    @property
    def level(self) -> Level:
        """Return ``exact``, ``approximate`` or ``refused``."""
        if self.held is None:
            return "refused"
        return "approximate" if self.reason else "exact"

    def put_into(self, model: Any) -> AbstractContextManager[None]:
        """Let `model`, the base, be what a reader of the format makes of it."""
        assert self.held is not None
        return self.attached() if self.attached else steer(model, self.held)


class Format(ABC):
    """One format of files, named by its `name`; `needs_base` says whether it reads the model."""

    name: ClassVar[str]
    needs_base: ClassVar[bool]

    @abstractmethod
    def fidelity(self, adapters: Adapters, base: Base | None) -> Fidelity:
        """Tell which adapters the format holds in place of `adapters`; change nothing.

        `base` is not None where `needs_base`.
        """


def refused(reason: str) -> Fidelity:
    """Return that no adapters are held, and why."""
    return Fidelity(None, reason)


def on_every_token(adapters: Adapters, write: Write) -> Fidelity:
    """Return what a format holds of `adapters` that steers every token of a text.

    The positions ``all`` are approximated: they leave a sequence's first token alone.
    """
    ours = adapters.positions
    if str(ours) == "every":
        return Fidelity(adapters, write=write)
    if ours.first is not None:
        return refused(f"it cannot steer at positions {ours}: it steers every token of a text")
    return Fidelity(
        replace(adapters, positions=Positions.parse("every")),
        "it also steers each sequence's first token, which the adapters leave alone",
        write,
    )

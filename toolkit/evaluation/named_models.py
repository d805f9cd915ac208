"""The few models that a report speaks of, by name; each is put in place to be looked at."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar

from torch import nn

from toolkit.runtime.processes import Processes

T = TypeVar("T")

BASE, TUNED, RECOMMENDED, RUNNER_UP = "base", "tuned", "recommended", "runner-up"

# The model is what its name says while its context lasts: steered models are the base with hooks.
NamedModels = Mapping[str, Callable[[], AbstractContextManager[nn.Module]]]


def each_model(
    models: NamedModels, look: Callable[[str, nn.Module], T], processes: Processes
) -> dict[str, T]:
    """Return what `look` gives of each model, by name; all `processes` share the models."""

    def looked(name: str) -> T:
        with models[name]() as model:
            return look(name, model)

    found = processes.spread([partial(looked, name) for name in models])
    return dict(zip(models, found, strict=True))


def n_own(models: NamedModels, processes: Processes) -> int:
    """Count the models that `each_model` looks at in this process."""
    return processes.owners([1.0] * len(models)).count(processes.rank)

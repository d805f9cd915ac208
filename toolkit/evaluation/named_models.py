"""The few models that a report speaks of, by name; each is put in place to be looked at."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from torch import nn

BASE, TUNED, RECOMMENDED, RUNNER_UP = "base", "tuned", "recommended", "runner-up"

# The model is what its name says while its context lasts: steered models are the base with hooks.
NamedModels = Mapping[str, Callable[[], AbstractContextManager[nn.Module]]]

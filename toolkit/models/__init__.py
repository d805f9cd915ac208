"""Live models: hooks, locations, one block at a time, a pair of models proven to be comparable.

The one implementation of hooks is here, and the one definition of the delta. Nothing is written
about any model family: blocks are run by replaying the calls that the model itself makes. Loading
reads safetensors and GGUF alone, and a pair proves what the march relies on when it is made.
"""

from toolkit.models.deltas import delta, wide
from toolkit.models.generation import Generated, Prompts
from toolkit.models.loading import load_config, load_model, load_tokenizer
from toolkit.models.locations import BRANCHES, POINTS, Sites, resolve
from toolkit.models.pair import ModelPair
from toolkit.models.runner import BlockRunner

__all__ = [
    "BRANCHES",
    "POINTS",
    "BlockRunner",
    "Generated",
    "ModelPair",
    "Prompts",
    "Sites",
    "delta",
    "load_config",
    "load_model",
    "load_tokenizer",
    "resolve",
    "wide",
]

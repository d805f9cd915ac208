"""What is known of a pair without its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.models.loading import load_config
from toolkit.models.pair import compare_configs, shared_tokenizer
from toolkit.models.peft_adapter import factor_entries, is_adapter
from toolkit.runtime.console import quiet_transformers


@dataclass(frozen=True)
class Outline:
    """Hold what is known of a pair without its weights.

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
    if is_adapter(tuned):
        adapter = factor_entries(Path(tuned))
    else:
        compare_configs(config, load_config(tuned), own_vocabularies=True)
    with quiet_transformers():
        return Outline(config, shared_tokenizer(base, tuned), adapter)

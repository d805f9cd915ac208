"""What is known of a pair without its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.models.loading import load_config, quiet_transformers
from toolkit.models.pair import _compare_configs, _shared_tokenizer
from toolkit.models.peft_adapter import _factor_entries, _is_adapter


@dataclass(frozen=True)
class Outline:
    """What is known of a pair without its weights.

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
    if _is_adapter(tuned):
        adapter = _factor_entries(Path(tuned))
    else:
        _compare_configs(config, load_config(tuned))
    with quiet_transformers():
        return Outline(config, _shared_tokenizer(base, tuned), adapter)

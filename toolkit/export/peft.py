"""The format ``peft``: a LoRA's folder, with biases where adapters have constants."""

from pathlib import Path
from typing import ClassVar, final

from toolkit.adapters.collection import Adapters
from toolkit.adapters.merge import weight_change_of
from toolkit.adapters.weight_change import WeightChange
from toolkit.errors import InputError
from toolkit.export.format import Base, Fidelity, Format, refused, steering_only


@final
class Peft(Format):
    """Write what ``PeftModel.from_pretrained`` loads; constants are ``lora_bias``."""

    name: ClassVar[str] = "peft"
    needs_base: ClassVar[bool] = True

    def fidelity(self, adapters: Adapters, base: Base | None) -> Fidelity:
        """Hold affine adapters before and after matrices, at every token."""
        change = in_weights(adapters, base)
        return change if isinstance(change, Fidelity) else steering_only("every", adapters)

    def write(self, adapters: Adapters, base: Base | None, out: Path) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``."""
        assert base is not None
        weight_change_of(base.model, adapters).save_pretrained(out)


def in_weights(adapters: Adapters, base: Base | None) -> WeightChange | Fidelity:
    """Return the change of weights that `adapters` are, or that they are refused, and why."""
    assert base is not None
    try:
        return weight_change_of(base.model, adapters)
    except InputError as error:
        return refused(str(error))

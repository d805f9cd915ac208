"""The format ``peft``: a LoRA's folder, with biases where adapters have constants."""

from typing import ClassVar, final

from toolkit.adapters.collection import Adapters
from toolkit.adapters.merge import weight_change_of
from toolkit.adapters.weight_change import WeightChange
from toolkit.errors import InputError
from toolkit.export.format import Base, Fidelity, Format, on_every_token, refused


@final
class Peft(Format):
    """Write what ``PeftModel.from_pretrained`` loads; constants are ``lora_bias``."""

    name: ClassVar[str] = "peft"
    needs_base: ClassVar[bool] = True

    def fidelity(self, adapters: Adapters, base: Base | None) -> Fidelity:
        """Hold affine adapters before and after matrices, at every token."""
        change = in_weights(adapters, base)
        if isinstance(change, Fidelity):
            return change
        return on_every_token(adapters, change.save_pretrained)


def in_weights(adapters: Adapters, base: Base | None) -> WeightChange | Fidelity:
    """Return the change of weights that `adapters` are, or that they are refused, and why."""
    assert base is not None
    try:
        return weight_change_of(base.model, adapters)
    except InputError as error:
        return refused(str(error))

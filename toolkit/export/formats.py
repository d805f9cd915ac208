"""The formats of export by name."""

from toolkit.export.folder import Folder
from toolkit.export.format import Format
from toolkit.export.peft import Peft
from toolkit.export.weights import Weights

FORMATS: dict[str, Format] = {
    made.name: made
    for made in (
        Peft(),
        Weights(),
        Folder(),
    )
}

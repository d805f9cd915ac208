"""The formats of export by name."""

from toolkit.export.easysteer import EasySteer
from toolkit.export.folder import Folder
from toolkit.export.format import Format
from toolkit.export.gguf import Gguf
from toolkit.export.peft import Peft
from toolkit.export.reft import Reft
from toolkit.export.weights import Weights

FORMATS: dict[str, Format] = {
    made.name: made
    for made in (
        Peft(),
        Weights(),
        Folder(),
        Gguf(),
        Reft(),
        EasySteer(),
    )
}

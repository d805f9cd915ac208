"""The formats of export by name."""

from toolkit.export.format import Format

FORMATS: dict[str, Format] = {f.name: f for f in ()}

"""Files of weights as transformers reads them: tensors renamed, and experts merged into one.

Older files hold a mixture's experts one by one, where the model has one tensor for all of them.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from toolkit.errors import InputError, one_line
from toolkit.models.weight_files import WeightFiles


@dataclass(frozen=True)
class _Merge:
    """Hold the stored tensors, each with its pattern, of which those of a model are made."""

    target: str
    converter: WeightConverter
    parts: tuple[tuple[str, str], ...]

    def of(self, model: Any, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        """Merge `tensors`, the parts in their order; by the model's names."""
        converter = copy.deepcopy(self.converter)
        for (stored, pattern), tensor in zip(self.parts, tensors, strict=True):
            converter.add_tensor(self.target, stored, pattern, tensor)  # type: ignore[arg-type]
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


class MergedFiles:
    """Read or merge tensors, by a model's own names, when they are asked for.

    `names` are the model's names that the files give, and the others that stand in the files.
    Raises InputError where tensors cannot be merged.
    """

    def __init__(self, model: Any, files: WeightFiles) -> None:
        self._model, self._files = model, files
        self._stored: dict[str, str] = {}
        self._merges: dict[str, _Merge] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        parts: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for stored, name, pattern in renamed(model, files.names):
            if pattern is None:
                self._stored[name] = stored
            else:
                parts[name].append((stored, pattern))
        converters = {
            pattern: transform
            for transform in get_model_conversion_mapping(model)
            if isinstance(transform, WeightConverter)
            for pattern in transform.source_patterns
        }
        for name, found in parts.items():
            found.sort(key=lambda part: dot_natural_key(part[0]))
            self._add(_Merge(name, converters[found[0][1]], tuple(found)))

    @property
    def names(self) -> set[str]:
        return {*self._stored, *self._merges}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._stored:
            return self._files[self._stored[name]]
        merge = self._merges[name]
        made = merge.of(self._model, (self._files[stored] for stored, _ in merge.parts))
        return made[name].contiguous()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        if name in self._shapes:
            return self._shapes[name]
        return self._files.shape(self._stored[name])

    def _add(self, merge: _Merge) -> None:
        empty = (torch.empty(self._files.shape(s), device="meta") for s, _ in merge.parts)
        try:
            made = merge.of(self._model, empty)
        except Exception as error:  # transformers' operations raise what their tensors do
            raise InputError(
                f"transformers merges {merge.parts[0][0]!r} with others on loading, which cannot "
                f"be done with these files ({one_line(error)}): load this model without --offload"
            ) from error
        for name, tensor in made.items():
            self._merges[name], self._shapes[name] = merge, tuple(tensor.shape)


def renamed(model: Any, names: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
    """Yield the stored names, each with the model's own, and the pattern by which it is merged."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    for stored in names:
        name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
        yield stored, name, pattern

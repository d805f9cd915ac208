"""The tensors of a folder of safetensors files, each read when it is asked for."""

from pathlib import Path
from weakref import WeakValueDictionary

import torch
from safetensors import safe_open
from torch import Tensor

from toolkit.errors import InputError


class WeightFiles:
    """The tensors of a folder by name, in `dtype` (None: as they are stored) on `device`.

    A tensor that is still in use somewhere is not read again: two models that share a file share
    it. On a CPU files are mapped into memory: a tensor in the stored precision is not copied.
    Raises InputError where the folder holds no safetensors.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise InputError(f"{folder} holds no safetensors: weights in other files are not read")
        files = [safe_open(path, "pt") for path in paths]
        self._file = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        self._live: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    @property
    def names(self) -> list[str]:
        """The names of the stored tensors."""
        return list(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._live.get(name)
        if tensor is None:
            tensor = self._file[name].get_tensor(name)
            dtype = self.dtype if self.dtype and tensor.is_floating_point() else tensor.dtype
            tensor = self._live[name] = tensor.to(self.device, dtype)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._file[name].get_slice(name).get_shape())

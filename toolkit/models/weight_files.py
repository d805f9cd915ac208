"""The tensors that transformers (or PEFT) reads of a folder, each read when it is asked for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from toolkit.errors import InputError

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
_LFS = b"version https://git-lfs"


class WeightFiles:
    """The tensors of safetensors files by name, in `dtype` (None: as stored) on `device`.

    A tensor that is still in use somewhere is not read again: two models that share a file share
    it. On a CPU files are mapped into memory: a tensor in the stored precision is not copied.
    Raises InputError where a file is not there or cut off, and where a tensor holds NaN.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.dtype, self.device = dtype, device
        self._file = {path: opened(path) for path in paths}
        self._path = {name: path for path, file in self._file.items() for name in file.keys()}  # noqa: SIM118
        self._live: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        self._finite: set[str] = set()

    @property
    def names(self) -> list[str]:
        """The names of the stored tensors."""
        return list(self._path)

    def __contains__(self, name: str) -> bool:
        return name in self._path

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._live.get(name)
        if tensor is None:
            path = self._path[name]
            tensor = self._file[path].get_tensor(name)
            if name not in self._finite:
                require_finite(name, tensor, str(path))
                self._finite.add(name)
            dtype = self.dtype if self.dtype and tensor.is_floating_point() else tensor.dtype
            tensor = self._live[name] = tensor.to(self.device, dtype)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._file[self._path[name]].get_slice(name).get_shape())


def model_paths(folder: Path) -> list[Path]:
    """List the files of weights that transformers reads in a model's folder.

    The one file, or else those that the index names: never every file that lies there. Raises
    InputError where there are none.
    """
    one, index = folder / ONE_FILE, folder / INDEX
    if one.is_file():
        return [one]
    if not index.is_file():
        raise InputError(
            f"{folder} holds neither {ONE_FILE} nor {INDEX}: weights in other files are not read"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{index} is no index of weights: download it again") from error
    return [folder / name for name in names]


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds a model's weights, as transformers names them."""
    return any((folder / name).is_file() for name in (ONE_FILE, INDEX))


def adapter_path(folder: Path) -> Path:
    """Return the file of weights that PEFT reads in an adapter's folder."""
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise InputError(
            f"{folder} has no {ADAPTER_FILE}: save the adapter as safetensors "
            "(pickled adapters are not read)"
        )
    return path


def opened(path: Path) -> Any:
    """Open one safetensors file. Raises InputError, with what to do, where it is none."""
    if not path.is_file():
        raise InputError(f"{path} is not there: the download is not complete, get it again")
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise InputError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is cut off or damaged ({error}): get it again") from error


def require_finite(name: str, tensor: Tensor, where: str) -> None:
    """Raise InputError where a tensor of weights holds NaN or infinity."""
    if tensor.is_floating_point() and not tensor.is_meta and not _all_finite(tensor):
        raise InputError(
            f"{where} has NaN or infinity in {name!r}: such a model answers nothing (training "
            "diverged, or the file is damaged)"
        )


def _all_finite(tensor: Tensor) -> bool:
    # The sum of finite numbers may overflow in half precision; the extremes do not.
    if tensor.dtype.itemsize == 1:  # float8 has no minimum of its own
        tensor = tensor.float()
    low, high = tensor.aminmax() if tensor.numel() else (tensor.sum(), tensor.sum())
    return bool(torch.isfinite(low) & torch.isfinite(high))

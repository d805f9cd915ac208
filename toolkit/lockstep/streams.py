"""Streams: the residual states of all tokens, as they travel from block to block."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from toolkit.documents.batches import Batch

_PAGE = 4096  # bytes: processes that share a file never write to the same page


@dataclass(frozen=True)
class Shape:
    """How a stream's states look: `width` numbers of `dtype` a token, used on `device`."""

    width: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, states: Tensor) -> "Shape":
        return cls(states.shape[-1], states.dtype, states.device)


class Stream:
    """States `[batch, length, width]` by batch: in memory, or in files that are mapped into it.

    While a block is passed, `stream[i]` is what enters it and ``stream.put(i, states)`` says what
    leaves it; `turn` makes what left the next block's input. In memory one array holds both. On
    disk two files take turns, so that what the last finished block left outlives a killed process.
    """

    def __init__(self, batches: Mapping[int, Batch], shape: Shape) -> None:
        self._enters = {
            index: torch.empty(
                *batch.ids.shape, shape.width, dtype=shape.dtype, device=shape.device
            )
            for index, batch in batches.items()
        }
        self._leaves = self._enters
        self._device = shape.device

    @classmethod
    def mapped(
        cls, batches: Mapping[int, Batch], shape: Shape, path: Path, turns: int = 0
    ) -> "Stream":
        """On disk, in two files named after `path`; after `turns` blocks that were passed already.

        Every process of a run maps the same files, with all `batches`, and uses its own.
        """
        stream = cls({}, shape)
        files = [_map(batches, shape, path.with_name(f"{path.name}.{side}")) for side in (0, 1)]
        stream._enters, stream._leaves = files[turns % 2], files[1 - turns % 2]
        return stream

    def __getitem__(self, index: int) -> Tensor:
        return self._enters[index].to(self._device)

    def begin(self, index: int, states: Tensor) -> None:
        """Set the states that enter the first block."""
        self._enters[index].copy_(states)

    def put(self, index: int, states: Tensor) -> None:
        self._leaves[index].copy_(states)

    def left(self, index: int) -> Tensor:
        """Return the states that leave the block that is being passed."""
        return self._leaves[index].to(self._device)

    def turn(self) -> None:
        """Make what left the block the next block's input."""
        self._enters, self._leaves = self._leaves, self._enters

    @property
    def nbytes(self) -> int:
        """The bytes of one file, or of the array in memory."""
        return sum(states.nbytes for states in self._enters.values())


def reserve(path: Path, n_bytes: int) -> None:
    """Take the room that a mapped file needs on the disk.

    Where there is none this raises OSError; a write to a file without room ends the process.
    """
    with path.open("ab") as file:
        if n_bytes and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, n_bytes)


def _map(batches: Mapping[int, Batch], shape: Shape, path: Path) -> dict[int, Tensor]:
    page = _PAGE // shape.dtype.itemsize
    sizes = [batch.ids.numel() * shape.width for batch in batches.values()]
    rooms = [-(-size // page) * page for size in sizes]
    reserve(path, sum(rooms) * shape.dtype.itemsize)
    flat = torch.from_file(str(path), shared=True, size=sum(rooms), dtype=shape.dtype)
    return {
        index: part[:size].view(*batch.ids.shape, shape.width)
        for (index, batch), size, part in zip(
            batches.items(), sizes, flat.split(rooms), strict=True
        )
    }

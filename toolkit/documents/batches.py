"""Batches: padded documents that pass through the models together."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from toolkit.documents.tokens import Encoded, Positions


@dataclass(frozen=True)
class Batch:
    """Right-padded documents that pass through the models together.

    `ids` int64 `[batch, length]`; `mask` bool `[batch, length]`, true for tokens; `counted` bool
    `[batch, length]`, true for tokens that enter statistics; `keys` float64 `[n_counted]`, uniform
    random numbers by which a `Reservoir` samples tokens. All are fit or all are held out. `lots`
    deal the documents into folds, one number each.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    counted: torch.Tensor
    keys: torch.Tensor
    held_out: bool
    lots: tuple[int, ...] = ()

    @property
    def n_tokens(self) -> int:
        return int(self.mask.sum())

    @cached_property
    def places(self) -> torch.Tensor:
        """Tell where the counted tokens are among all, int64 `[n_counted]`."""
        return self.counted.flatten().nonzero()[:, 0]

    def folds(self, n: int) -> torch.Tensor:
        """Tell which of `n` folds each counted token's document is in, int64 `[n_counted]`."""
        of_documents = torch.tensor([lot % n for lot in self.lots], device=self.ids.device)
        return of_documents.repeat_interleave(self.counted.sum(1))

    def of_counted(self, states: torch.Tensor) -> torch.Tensor:
        """A copy of the counted tokens' `states` (of all tokens, any shape), `[n_counted, d]`."""
        # Not by the mask: that searches it anew every time, and waits for a GPU to have done so.
        return states.reshape(self.ids.numel(), -1).index_select(0, self.places)


def make_batches(
    documents: Sequence[Encoded],
    positions: Positions = "all",
    batch_tokens: int = 2048,
    pad_id: int = 0,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> list[Batch]:
    """Documents of one side and like length together, at most `batch_tokens` tokens in a batch."""
    keyed = [(index, document) for index, document in enumerate(documents) if len(document.ids) > 1]
    keyed.sort(key=lambda pair: (pair[1].held_out, len(pair[1].ids)))
    groups: list[list[tuple[int, Encoded]]] = []
    for index, document in keyed:
        group = groups[-1] if groups else []
        fits = len(document.ids) * (len(group) + 1) <= batch_tokens
        if group and fits and group[0][1].held_out == document.held_out:
            group.append((index, document))
        else:
            groups.append([(index, document)])
    return [_collate(group, positions, pad_id, device, seed) for group in groups]


def _collate(
    group: Sequence[tuple[int, Encoded]],
    positions: Positions,
    pad_id: int,
    device: str | torch.device,
    seed: int,
) -> Batch:
    length = max(len(document.ids) for _, document in group)
    ids = torch.full((len(group), length), pad_id, dtype=torch.long)
    mask = torch.zeros(len(group), length, dtype=torch.bool)
    counted = torch.zeros(len(group), length, dtype=torch.bool)
    keys = torch.zeros(len(group), length, dtype=torch.float64)
    for row, (index, document) in enumerate(group):
        n = len(document.ids)
        ids[row, :n] = torch.tensor(document.ids)
        mask[row, :n] = True
        counted[row, :n] = torch.tensor(document.counted(positions))
        keys[row, :n] = torch.from_numpy(np.random.default_rng([seed, index]).random(n))
    return Batch(
        ids.to(device),
        mask.to(device),
        counted.to(device),
        keys[counted].to(device),
        group[0][1].held_out,
        tuple(document.lot for _, document in group),
    )

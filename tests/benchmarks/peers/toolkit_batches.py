"""Batches of token ids as the toolkit reads them; every token but each document's first counts."""

import torch

from toolkit.documents.batches import Batch


def batch(ids):
    """Return ids `[n, length]`, without padding, as a batch of fit documents."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    counted = mask.clone()
    counted[:, 0] = False
    return Batch(ids, mask, counted, torch.zeros(int(counted.sum())).double(), held_out=False)

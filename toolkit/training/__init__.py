"""Training adapters, LoRA or all weights, with transformers' Trainer or by reward.

`methods` says what each method trains, `trainer` trains it, `comparison` puts methods beside each
other at their best learning rates, over seeds.
"""

from toolkit.training.examples import collate, supervised
from toolkit.training.methods import Method, adapted
from toolkit.training.trainer import TrainingOptions, response_loss, train

__all__ = [
    "Method",
    "TrainingOptions",
    "adapted",
    "collate",
    "response_loss",
    "supervised",
    "train",
]

"""Training what asks for gradients, with transformers' Trainer."""

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from toolkit.errors import InputError
from toolkit.training.examples import NOT_SUPERVISED, collate

LOOKS = 10  # at validation rows, in a whole training
_PRIME = 1_000_003  # keeps epochs of one seed apart from those of the next


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    `batch_size` examples a step, `micro_batch` of them at a time; the learning rate rises over
    `warmup` of all steps and falls by a cosine. `seed` orders the examples. `max_steps` ends
    training before `epochs` do. `save_steps` says how often a resumable run writes a checkpoint.
    With validation rows, so many looks at them without a gain (`patience`) end training.
    """

    learning_rate: float
    epochs: float = 1.0
    batch_size: int = 16
    micro_batch: int | None = None
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_steps: int = -1
    save_steps: int = 100
    seed: int = 0
    patience: int = 3

    def __post_init__(self) -> None:
        micro = self.micro_batch or self.batch_size
        if self.learning_rate <= 0 or self.epochs <= 0 or self.batch_size % micro:
            raise InputError(
                "learning_rate and epochs must be above 0, batch_size a multiple of micro_batch"
            )


@dataclass(frozen=True)
class Training:
    """What a training took: optimiser `steps`, `tokens` read, `seconds`, and the loss by step.

    `validation` is the loss on rows that were not trained on, by step, where there are any.
    """

    steps: int
    tokens: int
    seconds: float
    losses: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...] = ()


class Trainee(nn.Module):
    """A model, and the adapters beside it, of which some parameters ask for gradients.

    Its state is what is trained and nothing else, so that a checkpoint is as small as that.
    `penalty` gives what is added to the loss.
    """

    accepts_loss_kwargs = True

    def __init__(
        self,
        model: nn.Module,
        adapters: nn.Module | None = None,
        penalty: Callable[[], Tensor | float] = lambda: 0.0,
    ) -> None:
        super().__init__()
        self.model, self.adapters, self.extra_loss = model, adapters, penalty
        if not any(p.requires_grad for p in self.parameters()):
            raise ValueError("no parameter asks for a gradient: there is nothing to train")

    def forward(self, **batch: Any) -> Any:
        output = self.model(**batch, use_cache=False)
        # Losses of a step's micro batches are summed: each brings its share of the penalty.
        whole = batch.get("num_items_in_batch")
        share = 1.0 if whole is None else supervised_tokens(batch["labels"]) / whole
        output.loss = output.loss + share * self.extra_loss()
        return output

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        kept = {name for name, p in self.named_parameters() if p.requires_grad}
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k in kept}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        ours, theirs = (
            {k: v.shape for k, v in some.items()} for some in (self.state_dict(), state)
        )
        different = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if different:
            raise InputError(f"a checkpoint of other parameters: {different[0]!r} differs")
        found = super().load_state_dict(state, strict=False, assign=assign)
        found.missing_keys.clear()  # what is not trained is nothing to warn of
        return found


@torch.enable_grad()  # a diagnosis, which takes none elsewhere, trains too
def train(
    trainee: Trainee,
    rows: Sequence[dict[str, list[int]]],
    options: TrainingOptions,
    pad_id: int = 0,
    folder: Path | None = None,
    show_progress: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    validation: Sequence[dict[str, list[int]]] = (),
) -> Training:
    """Train `trainee` on `rows`, supervised examples.

    With a `folder`, checkpoints go there and an interrupted training goes on from the last one.
    With `validation` rows, training ends where they no longer gain, and `trainee` is left as it was
    at its best on them: as it came, if nothing was gained.
    """
    micro = options.micro_batch or options.batch_size
    device = next(trainee.parameters()).device
    start = copy.deepcopy(trainee.state_dict()) if validation else {}
    judged = _judging(rows, options) if validation else {}
    with TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=str(folder or scratch),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=options.batch_size // micro,
            num_train_epochs=options.epochs,
            max_steps=options.max_steps,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=options.warmup,
            weight_decay=options.weight_decay,
            logging_steps=10,
            logging_nan_inf_filter=False,
            **{
                "save_strategy": "steps" if folder else "no",
                "save_steps": options.save_steps,
                "save_total_limit": 1,
                **judged,
            },
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=not show_progress,
            use_cpu=device.type == "cpu",
            seed=options.seed,
        )
        set_seed(options.seed)
        trainer = _trainer(
            model=trainee,
            train_dataset=list(rows),
            data_collator=lambda batch: collate(batch, pad_id),
            eval_dataset=list(validation) or None,
            args=arguments,
            callbacks=[
                _StopAtNoNumber(),
                *([EarlyStoppingCallback(options.patience)] if validation else ()),
                *callbacks,
            ],
        )
        if not show_progress:
            trainer.remove_callback(printer())
        found = last_checkpoint(folder)
        started = time.perf_counter()
        trainee.train()
        trainer.train(resume_from_checkpoint=found)
        trainee.eval()
    epochs = trainer.state.epoch or 0.0
    tokens = round(epochs * sum(len(row["input_ids"]) for row in rows))
    seconds = time.perf_counter() - started
    looks = tuple(
        (int(row["step"]), row["eval_loss"])
        for row in trainer.state.log_history
        if "eval_loss" in row
    )
    if looks and not min(loss for _, loss in looks) < looks[0][1]:
        trainee.load_state_dict(start)
    # The trainer's own history is in its checkpoints: nothing is lost where a run is resumed.
    losses = tuple((int(r["step"]), r["loss"]) for r in trainer.state.log_history if "loss" in r)
    return Training(trainer.state.global_step, tokens, seconds, losses, looks)


def _judging(rows: Sequence[Any], options: TrainingOptions) -> dict[str, Any]:
    """Return the arguments with which validation rows are looked at, ten times in a training."""
    epoch = math.ceil(len(rows) / options.batch_size)
    steps = options.max_steps if options.max_steps > 0 else math.ceil(epoch * options.epochs)
    every = max(1, steps // LOOKS)
    return {
        "eval_strategy": "steps",
        "eval_steps": every,
        "eval_on_start": True,
        "per_device_eval_batch_size": options.micro_batch or options.batch_size,
        "prediction_loss_only": True,
        "label_names": ["labels"],
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }


def _trainer(**arguments: Any) -> Trainer:
    with warnings.catch_warnings():
        # transformers' own use of a name that it will rename
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return _Trainer(**arguments)


class _Trainer(Trainer):
    """transformers' Trainer with an order of examples that seed and epoch alone decide.

    Its own is drawn from the state of the global generator, which a resumed run does not have.
    """

    def _get_train_sampler(self, *_: Any) -> Any:
        return _Order(self)


class _Order(Sampler[int]):
    """Every example once, those of like length together, the order anew in each epoch."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.lengths = [len(row["input_ids"]) for row in trainer.train_dataset]  # type: ignore

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        arguments = self.trainer.args
        epoch = int(self.trainer.state.epoch or 0)
        generator = torch.Generator().manual_seed(arguments.seed + _PRIME * epoch)
        size = arguments.train_batch_size * arguments.gradient_accumulation_steps
        return iter(get_length_grouped_indices(self.lengths, size, generator=generator))


class _StopAtNoNumber(TrainerCallback):
    """Ends a training whose loss is no number: it would stay so."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            control.should_training_stop = True


def supervised_tokens(labels: Tensor) -> Tensor:
    """Count how many tokens of a batch are learned from, as the trainer counts them."""
    return (labels[:, 1:] != NOT_SUPERVISED).sum()


def printer() -> type:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def last_checkpoint(folder: Path | None) -> str | None:
    found = sorted((folder or Path("/nonexistent")).glob("checkpoint-*"), key=_step)
    return str(found[-1]) if found else None


def _step(path: Path) -> int:
    return int(path.name.split("-")[-1])


@torch.no_grad()
def response_loss(
    model: nn.Module, rows: Sequence[dict[str, list[int]]], pad_id: int, batch_size: int = 16
) -> float:
    """Return the mean negative log-likelihood of supervised tokens, in nats."""
    total, n = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], pad_id)
        batch = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
        counted = int(supervised_tokens(batch["labels"]))
        total += float(model(**batch, use_cache=False).loss) * counted
        n += counted
    return total / n

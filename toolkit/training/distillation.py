"""Distillation: adapters trained through the whole network on ``KL(tuned ‖ steered)``.

Closed form gives what a place can do at least; this gives more, with a gradient. The loss is taken
at the tokens of documents (the response's, where there is one) and at those of continuations that
the tuned model samples once. The tuned model's predictions are computed again for each batch, at
the positions that count alone, so that memory is bounded by a batch.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed
from transformers.modeling_outputs import CausalLMOutput

from toolkit.adapters.collection import Adapters
from toolkit.documents.corpus import Corpus
from toolkit.documents.tokens import Encoded
from toolkit.errors import InputError
from toolkit.models.generation import end_tokens, make_prompts
from toolkit.models.locations import causal_lm
from toolkit.models.pair import ModelPair
from toolkit.runtime.progress import progress
from toolkit.training.examples import NOT_SUPERVISED
from toolkit.training.methods import Method, adapted
from toolkit.training.trainer import Trainee, Training, TrainingOptions, supervised_tokens, train

RATE = 1.6  # over the model's width: .01 at 160, .0028 at 576, .0004 at 4,096
FROM_A_FIT = 1 / 3  # of that rate, where adapters go on from a fit
VALIDATED = 8  # one fit document in so many is not trained on, and says when to stop
LEAST_VALIDATED = 4
AT_ONCE = 16  # prompts that are continued together
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Distilled:
    """What distillation gave: adapters, and how training went."""

    adapters: Adapters
    training: Training
    learning_rate: float


class Student(Trainee):
    """A steered model that learns the tuned model's predictions at the tokens that count.

    The loss is ``KL(tuned ‖ steered)`` in nats, a mean over those tokens.
    """

    def __init__(self, trainee: Trainee, tuned: nn.Module, steers_prompts: bool = False) -> None:
        super().__init__(trainee.model, trainee.adapters, trainee.extra_loss)
        self._tuned = (tuned,)  # in a tuple: no part of what is trained, saved or moved
        self._steers_prompts = steers_prompts

    def train(self, mode: bool = True) -> "Student":
        """Train the adapters; the model itself drops nothing out, as the tuned one does not."""
        super().train(mode)
        self.model.eval()
        if self.adapters is not None:
            self.adapters.train(mode)
        return self

    def forward(self, num_items_in_batch: Any = None, **batch: Tensor) -> Any:
        # Adapters that steer prompts alone know the prompt by the labels.
        labels = batch["labels"] if self._steers_prompts else None
        nats = divergences(self._tuned[0], self.model, batch, labels)[0].sum()
        n = supervised_tokens(batch["labels"])
        whole = n if num_items_in_batch is None else num_items_in_batch
        loss = nats / whole + n / whole * self.extra_loss()
        return CausalLMOutput(loss=loss)


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Return ``KL(softmax(target) ‖ softmax(logits))`` in nats, `[n]` of logits `[n, v]`."""
    target, logits = target.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (target.exp() * (target - logits)).sum(-1)


def divergences(
    tuned: Any, model: Any, batch: dict[str, Tensor], labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``KL(tuned ‖ model)`` of each token that counts `[n]`, and model's logits `[n, v]`.

    No gradient goes into `tuned`.
    """
    counted = batch["labels"][:, 1:] != NOT_SUPERVISED
    kept = counted.any(0).nonzero()[:, 0]  # positions whose prediction counts in some row
    counted = counted[:, kept]
    with torch.no_grad():
        target = predictions(tuned, batch, kept)[counted]
    logits = predictions(model, batch, kept, labels)[counted].float()
    return divergence(target, logits), logits


def predictions(
    model: Any, batch: dict[str, Tensor], kept: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Return the model's logits at the positions `kept`, `[rows, kept, v]`.

    With `labels` the model is given them too; the loss that it returns then is not used.
    """
    inputs: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "use_cache": False,
    }
    if labels is not None:
        return model(**inputs, labels=labels).logits[:, kept]
    if "logits_to_keep" in inspect.signature(causal_lm(model).forward).parameters:
        return model(**inputs, logits_to_keep=kept).logits
    return model(**inputs).logits[:, kept]


def rows_of(documents: Sequence[Encoded]) -> list[Row]:
    """Return documents as rows for training: all tokens, and which of them are predicted."""
    rows = []
    for document in documents:
        start = max(1, document.response_start or 1)
        if len(document.ids) > start:
            ids = list(document.ids)
            rows.append({"input_ids": ids, "labels": [NOT_SUPERVISED] * start + ids[start:]})
    return rows


@torch.no_grad()
def continuations(
    pair: ModelPair,
    documents: Sequence[Encoded],
    n_new: int,
    seed: int = 0,
    show_progress: bool = False,
) -> list[Row]:
    """Let the tuned model continue each document's prompt by `n_new` tokens, drawn at random.

    From its own distribution, whole, at temperature 1.
    """
    tuned, tokenizer, pad_id = pair.tuned, pair.tokenizer, pair.pad_id
    ends = set(end_tokens(causal_lm(tuned), tokenizer))
    rows: list[Row] = []
    set_seed(seed)
    steps = range(0, len(documents), AT_ONCE)
    with progress("sampling from the tuned model", len(steps), show_progress) as advance:
        for first in steps:
            asked = [document.prompt_ids for document in documents[first : first + AT_ONCE]]
            prompts = make_prompts(asked, pad_id, pair.device)
            found = tuned.generate(  # type: ignore[operator]
                input_ids=prompts.ids,
                attention_mask=prompts.mask.long(),
                max_new_tokens=n_new,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=pad_id,
            )
            for prompt, new in zip(asked, found[:, prompts.ids.shape[1] :].tolist(), strict=True):
                stop = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
                ids = [*prompt, *new[:stop]]
                labels = [NOT_SUPERVISED] * len(prompt) + new[:stop]
                rows.append({"input_ids": ids, "labels": labels})
            advance()
    return rows


def set_apart(documents: Sequence[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
    """Split fit documents into those that are trained on and those that say when to stop."""
    n = max(LEAST_VALIDATED, len(documents) // VALIDATED)
    if len(documents) < 2 * LEAST_VALIDATED:
        n = max(1, len(documents) // 4)
    if len(documents) < 2:
        raise InputError("distillation needs two fit documents or more: one says when to stop")
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0))
    chosen = set(order[:n].tolist())
    sides: tuple[list[Encoded], list[Encoded]] = ([], [])
    for index, document in enumerate(documents):
        sides[index in chosen].append(document)
    return sides


def default_options(
    pair: ModelPair, from_a_fit: bool = False, steps: int = 300, batch_size: int = 8, seed: int = 0
) -> TrainingOptions:
    """Return how adapters of `pair` are distilled, at a learning rate that suits its width.

    Adam moves every entry by about the rate, so what d entries of a down-projection move together
    grows with d. Adapters that go on from a fit (`from_a_fit`) take smaller steps.
    """
    rate = RATE / pair.d_model * (FROM_A_FIT if from_a_fit else 1.0)
    return TrainingOptions(rate, batch_size=batch_size, max_steps=steps, seed=seed)


# many parameters: all but three say how, and have defaults
def distil(
    pair: ModelPair,
    corpus: Corpus,
    method: Method,
    options: TrainingOptions | None = None,
    *,
    start: Adapters | None = None,
    sampled: Sequence[Row] | None = None,
    new_tokens: int = 64,
    folder: Path | None = None,
    show_progress: bool = False,
) -> Distilled:
    """Train adapters of every block until the base model, steered, predicts what `pair.tuned` does.

    `start` are adapters to go on from; `method` says what is trained otherwise. Half of what is
    trained on are continuations, `sampled` or drawn here. One fit document in eight is set apart;
    training ends where those no longer gain, and the best adapters on them, the start among them,
    are returned. With a `folder`, an interrupted training goes on from its last checkpoint.
    """
    fit, judges = set_apart(corpus.fit)
    options = options or default_options(pair, start is not None)
    rows = rows_of(fit)
    if sampled is None:
        sampled = continuations(pair, fit, new_tokens, options.seed, show_progress)
    validation = rows_of(judges)
    with adapted(pair.base, method, pair.base_runner.sites, options.seed, start) as found:
        assert found.trainee is not None
        assert found.adapters is not None
        prompted = found.adapters.positions.first is not None
        student = Student(found.trainee, pair.tuned, prompted)
        training = train(
            student,
            [*rows, *sampled],
            options,
            corpus.pad_id,
            folder,
            show_progress,
            validation=validation,
        )
        kept = Adapters(
            found.adapters.location,
            found.adapters.by_layer,
            "distilled",
            {"steps": training.steps, "learning_rate": options.learning_rate},
            found.adapters.positions,
        )
    return Distilled(kept, training, options.learning_rate)

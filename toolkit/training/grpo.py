"""Training adapters by reward alone: TRL's GRPO, where a right answer is worth 1."""

import copy
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from toolkit.adapters.collection import Adapters
from toolkit.documents.tasks.task import Example, Task
from toolkit.errors import InputError
from toolkit.models.generation import positions_of
from toolkit.training.methods import Method, adapted
from toolkit.training.trainer import last_checkpoint, printer

Reward = Callable[..., list[float]]


@dataclass(frozen=True)
class RewardOptions:
    """How to train by reward.

    A step asks `prompts` prompts, `generations` times each at `temperature`, and rewards each
    answer by how much better it is than the others to its prompt; `micro_batch` answers are
    learned from at a time. The learning rate rises over `warmup` of all steps and falls by a
    cosine. `save_steps` says how often a resumable run writes a checkpoint.
    """

    learning_rate: float
    max_steps: int
    prompts: int = 8
    generations: int = 8
    temperature: float = 1.0
    micro_batch: int | None = None
    warmup: float = 0.1
    save_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.learning_rate, self.max_steps, self.prompts, self.temperature) <= 0:
            raise InputError("learning_rate, max_steps, prompts and temperature must be above 0")
        if self.generations < 2:
            raise InputError("generations must be 2 or more: answers are compared with each other")
        if self.answers % (self.micro_batch or self.answers):
            raise InputError("prompts times generations must be a multiple of micro_batch")

    @property
    def answers(self) -> int:
        """How many answers a step learns from."""
        return self.prompts * self.generations


@dataclass(frozen=True)
class Rewarded:
    """What training by reward gave: the adapters, and the mean reward of each step's answers."""

    adapters: Adapters
    steps: int
    seconds: float
    rewards: tuple[tuple[int, float], ...]


def grpo(
    model: nn.Module,
    tokenizer: Any,
    adapters: Adapters,
    task: Task,
    examples: Sequence[Example],
    options: RewardOptions,
    folder: Path | None = None,
    show_progress: bool = False,
) -> Rewarded:
    """Train a copy of `adapters` on `model` by the correctness of its answers to `examples`.

    The policy is the steered model as it answers, without dropout or noisy gates; there is no
    reference model, and an adapter's own penalty takes no part. With a `folder`, checkpoints go
    there and an interrupted training goes on from the last one. InputError where trl is missing,
    or examples are fewer than a step's prompts.
    """
    make_trainer, make_arguments = _from_trl()
    if len(examples) < options.prompts:
        raise InputError(f"{len(examples)} examples are fewer than a step's {options.prompts}")
    with (
        adapted(model, method_of(adapters), seed=options.seed, start=adapters) as found,
        TemporaryDirectory() as scratch,
        _quiet_trl(),
    ):
        trained: Any = found.adapters
        trainer = make_trainer(
            trained,
            model=policy_of(model, trained.modules),
            processing_class=copy.copy(tokenizer),  # TRL may give it a padding token
            reward_funcs=reward_of(task, examples, tokenizer),
            args=make_arguments(
                output_dir=str(folder or scratch),
                save_strategy="steps" if folder else "no",
                disable_tqdm=not show_progress,
                use_cpu=next(model.parameters()).device.type == "cpu",
                max_completion_length=task.new_tokens,
                **arguments_of(options),
            ),
            train_dataset=rows_of(examples, tokenizer),
        )
        if not show_progress:
            trainer.remove_callback(printer())
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        seconds = time.perf_counter() - started
    history = trainer.state.log_history
    rewards = tuple((int(r["step"]), float(r["reward"])) for r in history if "reward" in r)
    result = replace(trained, fit="trained", info={**trained.info, "grpo": asdict(options)})
    return Rewarded(result, trainer.state.global_step, seconds, rewards)


def method_of(adapters: Adapters) -> Method:
    """Return the method that has such adapters."""
    return Method("grpo", adapters.kind, adapters.location, adapters.rank, str(adapters.positions))


def reward_of(task: Task, examples: Sequence[Example], tokenizer: Any) -> Reward:
    """The reward function that TRL calls: 1 for each answer that `task` takes for right, else 0."""

    def correctness(completion_ids: list[list[int]], example: list[int], **_: Any) -> list[float]:
        # Not TRL's own texts: they may have been parsed for tools.
        said = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return [float(task.correct(t, examples[i])) for t, i in zip(said, example, strict=True)]

    return correctness


def rows_of(examples: Sequence[Example], tokenizer: Any) -> Any:
    """The examples as TRL reads them: prompts that are tokenised as `documents.encode` does."""
    from datasets import Dataset

    def prompt(example: Example) -> Any:
        if tokenizer.chat_template:
            return [{"role": "user", "content": example.prompt}]
        return f"{example.prompt}\n"

    return Dataset.from_list([{"prompt": prompt(e), "example": i} for i, e in enumerate(examples)])


def policy_of(model: Any, adapters: nn.Module) -> Any:
    """`model` as TRL may have it: the same modules and hooks, and `adapters` among its own.

    TRL replaces the forward, writes into the configurations, tags the model and puts it into
    training mode: all of that happens to this second object, and `model` stays as it is.
    """
    policy = copy.copy(model)
    policy._modules = {**model._modules, "steering": adapters}
    policy.config = copy.deepcopy(model.config)
    policy.generation_config = copy.deepcopy(model.generation_config)

    def train(mode: bool = True) -> Any:
        # TRL asks the policy alone. Dropout would score another policy than the one that answered.
        policy.training = mode
        return policy

    policy.train = train
    return policy


def arguments_of(options: RewardOptions) -> dict[str, Any]:
    """TRL's names for `options`, and what holds for all of them."""
    micro = options.micro_batch or options.answers
    return {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": options.answers // micro,
        "num_generations": options.generations,
        "temperature": options.temperature,
        "max_steps": options.max_steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": options.warmup,
        "save_steps": options.save_steps,
        "seed": options.seed,
        "beta": 0.0,  # no reference model
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_total_limit": 1,
        "report_to": "none",
        "gradient_checkpointing": False,
        "bf16": False,  # the model's own precision
    }


def at_own_positions(forward: Callable[..., Any]) -> Callable[..., Any]:
    """TRL's `forward`, scoring tokens at the positions at which they were generated.

    TRL counts the padding on the left, which learned absolute positions notice.
    """

    @functools.wraps(forward)
    def placed(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fused_lm_head"):
            kwargs["position_ids"] = positions_of(kwargs["attention_mask"])
        return forward(*args, **kwargs)

    return placed


@contextmanager
def _quiet_trl() -> Iterator[None]:
    """No word of the names, such as gradient_checkpointing, that transformers will change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        yield


def _from_trl() -> tuple[Any, Any]:
    """TRL's trainer, with checkpoints that hold the adapters alone, and its arguments' class."""
    try:
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise InputError(
            "training by reward needs the package trl: pip install 'oracle-toolkit[rl]'"
        ) from error

    class AdapterTrainer(GRPOTrainer):
        def __init__(self, adapters: Adapters, **arguments: Any) -> None:
            self.adapters = adapters
            super().__init__(**arguments)
            policy: Any = self.model
            policy.forward = at_own_positions(policy.forward)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            self.adapters.save_pretrained(str(output_dir or self.args.output_dir))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            saved = Adapters.from_pretrained(resume_from_checkpoint)
            self.adapters.modules.load_state_dict(saved.modules.state_dict())

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """None: nothing is published."""

    return AdapterTrainer, GRPOConfig

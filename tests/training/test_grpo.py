"""Training by reward: TRL learns from the steered model, its answers and the task's word."""

import sys

import numpy as np
import pytest
import torch

from tests.support import tiny
from tests.support.properties import restores
from toolkit import InputError
from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.documents.tasks.task import Example, Task
from toolkit.evaluation.accuracy import prompts_of
from toolkit.training import grpo as rl
from toolkit.training.grpo import RewardOptions, grpo, reward_of

OPTIONS = RewardOptions(1e-2, max_steps=4, prompts=2, generations=4, warmup=0.0)


class Even(Task):
    """Say an even word first: a random model is right about half of the time."""

    name = "even"
    new_tokens = 3

    def examples(self, split, n=None, seed=0):
        rng = np.random.default_rng(seed)
        texts = [tiny.random_text(rng, length) for length in rng.integers(1, 7, n or 12)]
        return [Example(text, "w6", "even") for text in texts]

    def extract(self, text):
        word = text.split(" ")[0].removeprefix("w")
        return "even" if word.isdigit() and int(word) % 2 == 0 else "odd"


TASK = Even()


@pytest.fixture
def trl():
    return pytest.importorskip("trl", reason="pip install 'oracle-toolkit[rl]'")


def make_model():
    return tiny.make_model("llama", torch.float64)


def make_adapters(positions="all"):
    """Adapters that change the model a little, in float64."""
    torch.manual_seed(1)
    adapters = Adapters.identity(
        "linear", "post_block", range(tiny.N_LAYERS), tiny.D_MODEL, positions, rank=2
    )
    for parameter in adapters.modules.double().parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return adapters


def numbers_of(adapters):
    return torch.cat([p.detach().flatten() for p in adapters.modules.parameters()])


def run(model=None, adapters=None, options=OPTIONS, tokenizer=None, **more):
    return grpo(
        model or make_model(),
        tokenizer or tiny.make_tokenizer(),
        adapters or make_adapters(),
        TASK,
        TASK.examples("train"),
        options,
        **more,
    )


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(InputError, match=r"pip install 'oracle-toolkit\[rl\]'"):
        run()


@pytest.mark.parametrize(
    "wrong", [{"learning_rate": 0.0}, {"generations": 1}, {"micro_batch": 3}, {"temperature": 0}]
)
def test_options_that_cannot_be(wrong):
    with pytest.raises(InputError):
        RewardOptions(**{**vars(OPTIONS), **wrong})


def test_the_reward_is_the_tasks():
    """By the example that each answer belongs to, not by its place in the batch."""

    class Equal(Even):
        def correct(self, text, example):
            return text == example.answer

    examples = [Example("a", "", "w5"), Example("b", "", "w6 w7")]
    reward = reward_of(Equal(), examples, tiny.make_tokenizer())
    said = [[6, 7, tiny.EOS], [6, 7], [5, tiny.EOS], [6, 7, tiny.EOS]]
    rewards = reward(completion_ids=said, example=[1, 0, 0, 1], prompts=[], trainer_state=None)
    assert rewards == [1.0, 0.0, 1.0, 1.0]


def test_the_adapters_learn_and_the_model_stays(trl):
    model, adapters, tokenizer = make_model(), make_adapters(), tiny.make_tokenizer()
    start, config = numbers_of(adapters), model.config.to_dict()
    generation = model.generation_config.to_dict()
    attributes = set(vars(model))
    with restores(model):
        found = run(model, adapters, tokenizer=tokenizer)
    assert found.steps == 4
    assert [step for step, _ in found.rewards] == [1, 2, 3, 4]
    assert all(0 <= reward <= 1 for _, reward in found.rewards)
    assert torch.equal(numbers_of(adapters), start)
    learned = found.adapters.modules
    assert all(not p.equal(q) for p, q in zip(learned.parameters(), adapters.modules.parameters(),
                                              strict=True))  # fmt: skip
    assert not any(p.requires_grad for p in learned.parameters())
    assert found.adapters.fit == "trained"
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation
    assert set(vars(model)) == attributes


def test_seeds_reproduce_and_differ(trl):
    one, again, other = (run(options=RewardOptions(**{**vars(OPTIONS), "seed": s}))
                         for s in (0, 0, 1))  # fmt: skip
    assert torch.equal(numbers_of(one.adapters), numbers_of(again.adapters))
    assert one.rewards == again.rewards
    assert not torch.equal(numbers_of(one.adapters), numbers_of(other.adapters))


def test_right_answers_become_likelier(trl):
    """The exact probability of an even first word, on average over prompts."""
    model, adapters = make_model(), make_adapters()
    found = run(model, adapters, RewardOptions(5e-2, max_steps=40, prompts=4, generations=8))
    assert chance_of_even(model, found.adapters) > chance_of_even(model, adapters) + 0.05


@torch.no_grad()
def chance_of_even(model, adapters):
    tokenizer = tiny.make_tokenizer()
    words = tokenizer.batch_decode([[i] for i in range(tiny.N_VOCABULARY)])
    even = torch.tensor([TASK.extract(word) == "even" for word in words])
    prompts = prompts_of(tokenizer, TASK.examples("train"))
    with steer(model, adapters):
        logits = [model(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    return float(torch.stack(logits).softmax(-1)[:, even].sum(-1).mean())


@pytest.mark.parametrize(
    ("family", "positions"),
    [("llama", "all"), ("llama", "every"), ("llama", "last_prompt"), ("gemma3", "all"),
     ("gpt2", "all"), ("opt", "all")],
)  # fmt: skip
def test_the_first_step_follows_the_textbooks_gradient(trl, monkeypatch, family, positions):
    """Adam's first step is the gradient's sign. Here it comes from one answer at a time, unpadded.

    Advantages are rewards less their prompt's mean, over its standard deviation; every token of
    every answer weighs the same.
    """
    told = []

    def recording(task, examples, tokenizer):
        reward = reward_of(task, examples, tokenizer)

        def record(completion_ids, example, **more):
            rewards = reward(completion_ids=completion_ids, example=example, **more)
            told.extend(zip(completion_ids, example, rewards, strict=True))
            return rewards

        record.__name__ = "correctness"
        return record

    monkeypatch.setattr(rl, "reward_of", recording)
    model, tokenizer = tiny.make_model(family, torch.float64), tiny.make_tokenizer()
    adapters = make_adapters(positions)
    options = RewardOptions(1e-3, max_steps=1, prompts=4, generations=6, warmup=0.0)
    found = run(model, adapters, options)
    step = numbers_of(found.adapters) - numbers_of(adapters)
    assert 0 < sum(reward for *_, reward in told) < len(told)

    prompts = prompts_of(tokenizer, TASK.examples("train"))
    modules = adapters.modules.requires_grad_(True)
    with steer(model, adapters):
        loss = sum(
            -advantage(told, index, reward) * log_likelihood(model, prompts[index], answer)
            for answer, index, reward in told
        )
        loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in modules.parameters()])
    assert len({len(prompts[index]) for _, index, _ in told}) > 1
    clear = gradient.abs() > 1e-3 * gradient.abs().max()
    assert clear.double().mean() > 0.8
    torch.testing.assert_close(step[clear], -1e-3 * gradient[clear].sign(), rtol=1e-3, atol=0)


def advantage(told, index, reward):
    group = np.array([r for _, i, r in told if i == index])
    return float((reward - group.mean()) / (group.std(ddof=1) + 1e-4))


def log_likelihood(model, prompt, answer):
    """Of `answer` behind `prompt`, in nats."""
    ids = torch.tensor([[*prompt, *answer]])
    labels = torch.tensor([[-100] * len(prompt) + list(answer)])
    logits = model(input_ids=ids, labels=labels).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(answer)), list(answer)].sum()


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_are_those_of_the_toolkit(trl, monkeypatch, chat):
    """What the model generates from, padding left out, is what it is judged on elsewhere."""
    model, tokenizer = make_model(), tiny.make_tokenizer(chat)
    read, generate = set(), type(model).generate

    def recording(self, input_ids, attention_mask, **more):
        rows = zip(input_ids, attention_mask, strict=True)
        read.update(tuple(ids[mask.bool()].tolist()) for ids, mask in rows)
        return generate(self, input_ids=input_ids, attention_mask=attention_mask, **more)

    monkeypatch.setattr(type(model), "generate", recording)
    run(model, tokenizer=tokenizer, options=RewardOptions(1e-2, 3, prompts=12, generations=2))
    assert read == set(prompts_of(tokenizer, TASK.examples("train")))


def test_micro_batches_are_one_batch(trl):
    """Of a step's answers as many at a time as fit: up to rounding, nothing else changes."""
    whole, parts = (run(options=RewardOptions(**{**vars(OPTIONS), "micro_batch": m}))
                    for m in (None, 4))  # fmt: skip
    assert whole.rewards == parts.rewards
    torch.testing.assert_close(numbers_of(whole.adapters), numbers_of(parts.adapters),
                               rtol=0, atol=1e-6)  # fmt: skip


def test_an_interrupted_training_goes_on(trl, tmp_path, monkeypatch):
    """The third step fails; what follows is as if it had not. Checkpoints hold adapters alone."""
    options = RewardOptions(**{**vars(OPTIONS), "save_steps": 1})
    whole = run(options=options)
    asked = []

    class Failing(Even):
        def correct(self, text, example):
            asked.append(text)
            if len(asked) > 2 * options.answers:
                raise KeyboardInterrupt
            return super().correct(text, example)

    arguments = make_model(), tiny.make_tokenizer(), make_adapters()
    with pytest.raises(KeyboardInterrupt):
        grpo(*arguments, Failing(), TASK.examples("train"), options, tmp_path)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert Adapters.from_pretrained(checkpoint).rank == 2
    assert not (checkpoint / "model.safetensors").exists()
    resumed = run(options=options, folder=tmp_path)
    assert torch.equal(numbers_of(resumed.adapters), numbers_of(whole.adapters))
    assert resumed.rewards == whole.rewards


def test_examples_too_few_for_a_step(trl):
    with pytest.raises(InputError, match="12 examples are fewer than a step's 13"):
        run(options=RewardOptions(1e-2, 1, prompts=13))

"""Training: what is learned from, that it repeats, and that an interruption costs nothing."""

import copy
import functools

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from tests.support import textbook, tiny
from tests.support.properties import restores
from tests.support.rows import make_rows
from toolkit import InputError
from toolkit.documents.tasks.task import Example
from toolkit.models.locations import resolve
from toolkit.training.examples import NOT_SUPERVISED, collate, supervised
from toolkit.training.methods import Method, adapted, new_adapters
from toolkit.training.trainer import Trainee, TrainingOptions, response_loss, train

LINEAR = Method("linear", "linear", "post_block", 2)
GATED = Method("gated", "gated_heads", "heads", options={"l0": 0.01})


def nats(model, row):
    """Of each supervised token, from the textbook's forward pass."""
    logits = textbook.run(model, row["input_ids"]).logits
    log_p = textbook.log_softmax(logits)
    return [
        -log_p[at - 1, label]
        for at, label in enumerate(row["labels"])
        if at and label != NOT_SUPERVISED
    ]


def state_of(found):
    return {name: tensor.clone() for name, tensor in found.trainee.state_dict().items()}


def trained(rows, method=LINEAR, base=None, **options):
    """The state of the method's parameters behind a training."""
    options = TrainingOptions(**{"learning_rate": 1e-2, "batch_size": 4, "max_steps": 5, **options})
    with adapted(base or tiny.make_model("llama"), method, seed=3) as found:
        done = train(found.trainee, rows, options)
        return state_of(found), done


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def close(ours, theirs, atol):
    assert ours.keys() == theirs.keys()
    return all(torch.allclose(ours[k], theirs[k], rtol=0, atol=atol) for k in ours)


# --- examples


def test_the_response_and_one_end_are_supervised(tokenizer):
    row = supervised(Example("w5 w6", "w7 w8", "?"), tokenizer, 5)
    assert row["input_ids"] == [5, 6, 7, 8, tiny.EOS]
    assert row["labels"] == [NOT_SUPERVISED] * 2 + [7, 8, tiny.EOS]
    with pytest.raises(InputError, match="longer than 4 tokens"):
        supervised(Example("w5 w6", "w7 w8", "?"), tokenizer, 4)


def test_a_template_that_never_ends_a_turn_is_refused(chat_tokenizer):
    with pytest.raises(InputError, match="no end of sequence"):
        supervised(Example("w5", "w6", "?"), chat_tokenizer, 64)
    chat_tokenizer = copy.deepcopy(chat_tokenizer)
    chat_tokenizer.chat_template += "{% if not add_generation_prompt %}<eos>{% endif %}"
    row = supervised(Example("w5", "w6", "?"), chat_tokenizer, 64)
    assert row["labels"][-2:] == [6, tiny.EOS]
    assert row["input_ids"].count(tiny.EOS) == 1


def test_padding_is_known_by_its_place():
    """The pad token may be a word of the text: it is masked in neither."""
    batch = collate([{"input_ids": [5, 0, 6], "labels": [-100, 0, 6]},
                     {"input_ids": [7], "labels": [7]}], pad_id=0)  # fmt: skip
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 0, 6], [7, -100, -100]]
    assert batch["input_ids"].tolist() == [[5, 0, 6], [7, 0, 0]]


# --- the loss


def test_the_loss_is_of_responses_alone():
    """Cross entropy by hand, token by token; another word to predict in the prompt changes none."""
    model, rows = tiny.make_model("llama"), make_rows(7)
    expected = np.mean([x for row in rows for x in nats(model, row)])
    trainee = Trainee(model.requires_grad_(True))
    assert float(trainee(**collate(rows, 0)).loss.detach()) == pytest.approx(expected, rel=1e-6)
    for size in (1, 3, 16):
        assert response_loss(model, rows, 0, size) == pytest.approx(expected, rel=1e-6)
    start = rows[0]["labels"].index(next(x for x in rows[0]["labels"] if x != NOT_SUPERVISED))
    assert start > 0
    whole = {**rows[0], "labels": rows[0]["input_ids"]}
    assert response_loss(model, [whole], 0) != pytest.approx(response_loss(model, rows[:1], 0))
    prompt_gradient = prompt_logit_gradient(model, rows[0])
    assert not prompt_gradient[: start - 1].any()
    assert prompt_gradient[start - 1 : -1].any(-1).all()


def prompt_logit_gradient(model, row):
    """What the loss's gradient is at every token's logits, `[t, v]`."""
    kept = []

    def keep(_module, _args, output):
        output.retain_grad()
        kept.append(output)

    handle = model.lm_head.register_forward_hook(keep)
    Trainee(model)(**collate([row], 0)).loss.backward()
    handle.remove()
    return kept[0].grad[0]


def adam_step(found, rows, rate, extra=lambda: 0.0):
    """One step of Adam from nothing, by hand: gradients of the mean over all supervised tokens."""
    parameters = [p for p in found.trainee.parameters() if p.requires_grad]
    total, n = 0.0, 0
    for row in rows:
        labels = torch.tensor(row["labels"])
        logits = found.model(torch.tensor([row["input_ids"]]), labels=labels[None]).logits[0]
        at = torch.arange(1, len(labels))[labels[1:] != NOT_SUPERVISED]
        total = total - logits.log_softmax(-1)[at - 1, labels[at]].sum()
        n += len(at)
    gradients = torch.autograd.grad(total / n + extra(), parameters)
    norm = torch.sqrt(sum(g.square().sum() for g in gradients))
    gradients = [g * min(1.0, float(1 / (norm + 1e-6))) for g in gradients]
    with torch.no_grad():
        for parameter, g in zip(parameters, gradients, strict=True):
            parameter -= rate * g / (g.abs() + 1e-8)
    return state_of(found)


@pytest.mark.parametrize("micro", [None, 1, 2, 3])
@pytest.mark.parametrize(
    "method", [LINEAR, Method("heads", "head_affine", "heads", options={"l1": 0.02})]
)
def test_a_step_is_adams_on_the_mean_over_tokens_however_it_is_split(micro, method):
    """Micro batches of unlike lengths add up to the gradient of the whole, the penalty once."""
    base, rows = tiny.make_model("llama"), make_rows(6)
    start = stirred(base, method)
    options = {"batch_size": 6, "max_steps": 1, "warmup": 0.0, "learning_rate": 1e-2}
    with adapted(base, method, start=start) as found:
        first = state_of(found)
        penalty = lambda: sum(a.penalty() for a in found.adapters.by_layer.values())  # noqa: E731
        expected = adam_step(found, rows, 1e-2, penalty)
    with adapted(base, method, start=start) as found:
        assert same(state_of(found), first)  # a start is never trained itself
        train(found.trainee, rows, TrainingOptions(**options, micro_batch=micro))
        ours = state_of(found)
    assert not close(ours, first, 9e-3)
    # Adam's first step goes by the gradient's sign: rounding tells where it is nearly nothing.
    assert close(ours, expected, 1e-5)


@torch.no_grad()
def stirred(base, method):
    """The method's adapters away from zero, in float64."""
    generator = torch.Generator().manual_seed(4)
    adapters = new_adapters(base, method, resolve(base))
    for parameter in adapters.modules.double().parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return adapters


def test_options_that_cannot_be_are_refused():
    for wrong in ({"learning_rate": 0.0}, {"epochs": 0.0}, {"micro_batch": 5}):
        with pytest.raises(InputError, match="multiple of micro_batch"):
            TrainingOptions(**{"learning_rate": 1e-3, **wrong})


# --- the run


@pytest.mark.parametrize("method", [LINEAR, GATED])
def test_seeds_repeat_bit_for_bit(method):
    """Also where training itself draws random numbers (gates)."""
    rows = make_rows()
    ours, done = trained(rows, method, seed=1)
    torch.manual_seed(99)
    assert same(trained(rows, method, seed=1)[0], ours)
    assert not same(trained(rows, method, seed=2)[0], ours)
    assert done.steps == 5


def test_training_lowers_the_loss_it_reports():
    rows, base = make_rows(8), tiny.make_model("llama").float()
    with adapted(base, LINEAR) as found:
        before = response_loss(found.model, rows, 0)
        options = TrainingOptions(2e-2, epochs=30, batch_size=8, warmup=0.0)
        done = train(found.trainee, rows, options)
        after = response_loss(found.model, rows, 0)
    assert after < before - 0.3
    assert [step for step, _ in done.losses] == [10, 20, 30]
    losses = [loss for _, loss in done.losses]
    assert before > losses[0] > losses[-1] > after - 0.05
    assert done.steps == 30
    assert done.tokens == 30 * sum(len(row["input_ids"]) for row in rows)


def test_a_run_ends_where_the_loss_is_no_number():
    """At the next time that it is looked at, not after all steps."""
    rows, base = make_rows(8), tiny.make_model("llama").float()
    with adapted(base, LINEAR) as found:
        for adapter in found.adapters.by_layer.values():
            adapter.up.data[:] = float("nan")
        done = train(found.trainee, rows, TrainingOptions(1e-3, batch_size=8, max_steps=40))
    assert done.steps == 10
    assert np.isnan(done.losses[-1][1])


class Interrupted(Exception):  # noqa: N818
    """What a test raises in a training."""


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Interrupted


IN_EPOCHS = TrainingOptions(1e-2, epochs=3, batch_size=4, micro_batch=2, save_steps=2, seed=1)


@functools.cache
def undisturbed(method):
    """A training from start to end, and the state that it ends in."""
    rows, base = make_rows(24), tiny.make_model("llama").float()
    with adapted(base, method, seed=3) as found:
        done = train(found.trainee, rows, IN_EPOCHS)
        return done, state_of(found)


@pytest.mark.parametrize("method", [LINEAR, GATED, Method("lora", "lora", rank=2)])
@pytest.mark.parametrize("step", [5, 8, 13])
def test_an_interrupted_training_ends_as_if_it_had_not_been(tmp_path, method, step):
    """In the first epoch, in the second and in the third: bit for bit."""
    rows, base = make_rows(24), tiny.make_model("llama").float()
    done, expected = undisturbed(method)
    with adapted(base, method, seed=3) as found, pytest.raises(Interrupted):
        train(found.trainee, rows, IN_EPOCHS, 0, tmp_path, callbacks=[Interrupt(step)])
    assert list(tmp_path.glob("checkpoint-*"))
    with adapted(base, method, seed=5) as found:  # what it starts from is in the checkpoint
        again = train(found.trainee, rows, IN_EPOCHS, 0, tmp_path)
        assert same(state_of(found), expected)
    assert (again.steps, again.tokens) == (done.steps, done.tokens)
    # The mean over the ten steps that were cut into is of fewer of them.
    assert [at for at, _ in again.losses] == [at for at, _ in done.losses] == [10]
    assert (again.losses == done.losses) == (step > 10)


def test_a_finished_training_is_not_run_again(tmp_path):
    rows, base = make_rows(8), tiny.make_model("llama")
    options = TrainingOptions(1e-2, batch_size=4, max_steps=4, save_steps=2)
    with adapted(base, LINEAR) as found:
        train(found.trainee, rows, options, 0, tmp_path)
        expected = state_of(found)
    with adapted(base, LINEAR, seed=8) as found:
        done = train(found.trainee, rows, options, 0, tmp_path, callbacks=[Interrupt(3)])
        assert same(state_of(found), expected)
    assert done.steps == 4


@pytest.mark.parametrize("method", [LINEAR, Method("lora", "lora", rank=2)])
def test_a_state_is_what_is_trained_and_a_checkpoint_is_as_small(tmp_path, method):
    from safetensors.torch import load_file

    base = tiny.make_model("llama").float()
    with adapted(base, method) as found:
        state = found.trainee.state_dict()
        assert sum(t.numel() for t in state.values()) == found.parameters
        options = TrainingOptions(1e-2, batch_size=4, max_steps=2, save_steps=2)
        train(found.trainee, make_rows(8), options, 0, tmp_path)
        assert same(load_file(tmp_path / "checkpoint-2" / "model.safetensors"), state_of(found))


@pytest.mark.parametrize(
    "other", [Method("vector", "vector", "post_block"), Method("rank", "linear", "post_block", 3)]
)
def test_a_checkpoint_of_other_parameters_is_refused(tmp_path, other):
    base, rows = tiny.make_model("llama"), make_rows(8)
    options = TrainingOptions(1e-2, batch_size=4, max_steps=2, save_steps=2)
    with adapted(base, LINEAR) as found:
        train(found.trainee, rows, options, 0, tmp_path)
    with adapted(base, other) as found, pytest.raises(ValueError, match="checkpoint"):
        train(found.trainee, rows, options, 0, tmp_path)


def test_weights_stay_where_adapters_alone_are_trained():
    """Bitwise; also of a base whose own weights ask for gradients."""
    base, rows = tiny.make_model("llama").requires_grad_(True), make_rows()
    for method in (LINEAR, GATED, Method("lora", "lora", rank=2)):
        with restores(base), adapted(base, method) as found:
            before = state_of(found)
            assert sum(t.numel() for t in before.values()) == found.parameters
            train(found.trainee, rows, TrainingOptions(1e-2, batch_size=4, max_steps=3))
            assert not same(state_of(found), before)
        assert all(p.grad is None for p in base.parameters())


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        Trainee(tiny.make_model("llama"))

"""Which tokens are steered: a definition written token by token, and live models."""

from contextlib import contextmanager

import pytest
import torch

from tests.support import tiny
from toolkit import InputError
from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.adapters.positions import Positions
from toolkit.adapters.vector import FixedVector
from toolkit.models.generation import make_prompts
from toolkit.models.locations import resolve

NAMES = ("all", "every", "last_prompt", "first_last(1)", "first_last(2)", "first_last(7)")
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20], [30, 31, 32, 33], [7, 7, 40], [8, 9]]


def by_definition(name, prompt, rest):
    """The steered ones among a sequence's tokens, by index; `rest` tokens follow the prompt."""
    everything = range(prompt + rest)
    if name == "every":
        return set(everything)
    if name == "all":
        return set(everything) - {0}
    if name == "last_prompt":
        return {prompt - 1} - {0, -1}
    k = int(name[len("first_last(") : -1])
    first = range(1, min(k + 1, prompt))  # the first token is nobody's
    last = range(max(prompt - k, 1), prompt)
    return set(first) | set(last)


@contextmanager
def watched(model, positions):
    """Steer block 0 by a vector; yields a list of which tokens it changed, one entry a pass."""
    vector = FixedVector(torch.full((tiny.D_MODEL,), 0.5, dtype=torch.float64))
    adapters = Adapters("post_block", {0: vector}, "free", positions=Positions.parse(positions))
    block = resolve(model).at["post_block", 0].module
    first = lambda output: output[0] if isinstance(output, tuple) else output  # noqa: E731
    bare, changed = [], []
    handles = [block.register_forward_hook(lambda *a: bare.append(first(a[2]).clone()))]
    try:
        with steer(model, adapters):
            handles.append(
                block.register_forward_hook(
                    lambda *a: changed.append((first(a[2]) != bare[-1]).any(-1))
                )
            )
            yield changed
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_in_training_the_prompt_is_what_stands_before_the_labels(name, family):
    """Right-padded sequences; a prompt may be a single token, and there may be none."""
    model = tiny.make_model(family)
    lengths = [(6, 3), (1, 4), (2, 2), (9, 1), (0, 5), (4, 0)]
    longest = max(sum(pair) for pair in lengths)
    ids = torch.full((len(lengths), longest), tiny.PAD)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(lengths):
        ids[row, : prompt + response] = torch.arange(5, 5 + prompt + response)
        labels[row, prompt : prompt + response] = ids[row, prompt : prompt + response]
        mask[row, : prompt + response] = 1
    with watched(model, name) as changed:
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    for row, (prompt, response) in enumerate(lengths):
        found = set(changed[0][row].nonzero()[:, 0].tolist())
        assert found == by_definition(name, prompt, response), (name, prompt, response)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_in_generation_the_prompt_is_what_is_read_before_the_cache(name, family):
    """Left-padded; what is generated is steered under all and every alone."""
    model, n_new = tiny.make_model(family), 5
    model.generation_config.eos_token_id = None
    prompts = make_prompts(PROMPTS, tiny.PAD)
    with watched(model, name) as changed:
        model.generate(
            input_ids=prompts.ids,
            attention_mask=prompts.mask.long(),
            max_new_tokens=n_new,
            do_sample=False,
        )
    assert len(changed) == n_new
    width = prompts.ids.shape[1]
    for row, prompt in enumerate(PROMPTS):
        found = set((changed[0][row].nonzero()[:, 0] - (width - len(prompt))).tolist())
        assert found == by_definition(name, len(prompt), 0)
        for step in changed[1:]:
            assert step.shape[1] == 1
            assert bool(step[row, 0]) == (name in ("all", "every"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("gemma3", "sdpa"), ("gemma3", "eager")],
)
def test_a_static_cache_changes_nothing(name, family, attention):
    """The model is then called with masks of who attends to whom, not of which are tokens."""
    model = tiny.make_model(family, torch.float32)  # eager float64 overflows at its least number
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    prompts = make_prompts(PROMPTS, tiny.PAD)
    found = []
    for cache in (None, "static"):
        with watched(model, name) as changed:
            model.generate(
                input_ids=prompts.ids,
                attention_mask=prompts.mask.long(),
                max_new_tokens=6,
                do_sample=False,
                cache_implementation=cache,
            )
        found.append(torch.cat(changed, 1))
    assert torch.equal(*found)


def test_labels_of_one_pass_are_forgotten_by_the_next():
    """Also where the pass between them broke off."""
    model = tiny.make_model("llama")
    ids = torch.tensor([PROMPTS[0]])
    labels = ids.clone()
    labels[:, :4] = -100
    with watched(model, "last_prompt") as changed:
        model(input_ids=ids, labels=labels)
        model(input_ids=ids)
        with pytest.raises(IndexError):
            model(input_ids=ids + 10**6, labels=labels)
        model(input_ids=ids)
    assert [step[0].nonzero().flatten().tolist() for step in changed] == [[3], [9], [9]]


def test_training_and_generation_steer_the_same_prompt_tokens():
    """A response that is trained on and one that is generated stand behind one steered prompt."""
    model = tiny.make_model("llama")
    ids = torch.tensor([PROMPTS[0]])
    labels = ids.clone()
    labels[:, :6] = -100
    for name in NAMES[2:]:
        with watched(model, name) as changed:
            model(input_ids=ids, labels=labels)
            cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
            model(input_ids=ids[:, 6:], past_key_values=cache, use_cache=True)
        trained, read, said = changed
        assert torch.equal(trained, torch.cat([read, said], 1))


@pytest.mark.parametrize("name", NAMES)
def test_names_come_back(name):
    positions = Positions.parse(name)
    assert str(positions) == name
    assert Positions.parse(str(positions)) == positions
    assert Positions.parse(positions) is positions


def test_spaces_do_not_matter():
    assert Positions.parse("first_last( 3 )") == Positions.parse("first_last(3)")


@pytest.mark.parametrize(
    "text",
    ["", "All", "last", "first_last", "first_last()", "first_last(-1)", "first_last(1.5)",
     "first_last(0)", "first_last(2,3)", "last_prompt(1)", "all "],
)  # fmt: skip
def test_other_names_are_refused(text):
    with pytest.raises(InputError, match="expected all, every, last_prompt or first_last"):
        Positions.parse(text)

"""Examples as training sees them: whole, ended, with one beginning."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from tests.support import tiny
from toolkit import InputError
from toolkit.documents.tasks.task import Example
from toolkit.training.examples import NOT_SUPERVISED, collate, supervise_all, supervised

EXAMPLE = Example("w5 w6 w7", "w8 w9", "w9")
TURNS = (
    "{% for message in messages %}"
    "{{ '<user> ' if message.role == 'user' else '<assistant> ' }}{{ message.content }} <eos> "
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
BOS = 2  # the tiny tokenizer's <unk> stands in for a beginning of sequence


def tokenizer(begin=False, end=False, template=None):
    """One that adds a beginning or an end by itself, if asked."""
    made = tiny.make_tokenizer()
    made.chat_template = template
    single = f"{'<unk> ' if begin else ''}$A{' <eos>' if end else ''}"
    if begin or end:
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=single, special_tokens=[("<unk>", BOS), ("<eos>", tiny.EOS)]
        )
    return made


def split(row):
    """The prompt's tokens and the supervised ones."""
    ids, labels = row["input_ids"], row["labels"]
    start = next(i for i, label in enumerate(labels) if label != NOT_SUPERVISED)
    assert labels[start:] == ids[start:]
    return ids[:start], ids[start:]


def test_the_response_and_one_end_are_supervised():
    assert split(supervised(EXAMPLE, tokenizer(), 50)) == ([5, 6, 7], [8, 9, tiny.EOS])


def test_a_chat_template_writes_its_own_end():
    prompt, response = split(supervised(EXAMPLE, tokenizer(template=TURNS), 50))
    assert prompt == [3, 5, 6, 7, tiny.EOS, 4]
    assert response == [8, 9, tiny.EOS]


def test_a_chat_template_without_an_end_is_refused():
    with pytest.raises(InputError, match="would never stop"):
        supervised(EXAMPLE, tokenizer(template=tiny.CHAT_TEMPLATE), 50)


@pytest.mark.parametrize("template", [None, TURNS])
def test_nothing_is_cut_off(template):
    """Trap: prompts truncated so that the supervised answer was cut off.

    At exactly the length an example has it is whole; one token less is refused, not shortened.
    """
    tools = tokenizer(template=template)
    whole = supervised(EXAMPLE, tools, 50)
    n = len(whole["input_ids"])
    assert supervised(EXAMPLE, tools, n) == whole
    for shorter in (n - 1, n - 2, 2, 1):
        with pytest.raises(InputError, match=f"longer than {shorter} tokens"):
            supervised(EXAMPLE, tools, shorter)


@pytest.mark.parametrize("template", [None, TURNS])
def test_the_end_is_supervised_where_padding_is_the_same_token(template):
    """Trap: pad equals end of sequence, labels are masked by token, and no end is ever learnt."""
    tools = tokenizer(template=template)
    tools.pad_token = tools.eos_token
    assert tools.pad_token_id == tiny.EOS
    short = supervised(EXAMPLE, tools, 50)
    long = supervised(Example("w5", "w8 w9 w10 w11 w12 w13", "w13"), tools, 50)
    batch = collate([short, long], tools.pad_token_id)
    for row, labels, mask, source in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], (short, long), strict=True
    ):
        n = len(source["input_ids"])
        assert row[:n].tolist() == source["input_ids"]
        assert labels[:n].tolist() == source["labels"]
        assert labels[n - 1] == tiny.EOS
        assert mask[:n].all()
        # What follows is padding: the same token, neither read nor supervised.
        assert (row[n:] == tiny.EOS).all()
        assert (labels[n:] == NOT_SUPERVISED).all()
        assert not mask[n:].any()


def test_a_beginning_stands_once():
    """Trap: a doubled beginning of sequence, the template's and the tokenizer's own."""
    plain = supervised(EXAMPLE, tokenizer(begin=True), 50)
    assert split(plain) == ([BOS, 5, 6, 7], [8, 9, tiny.EOS])
    chat = supervised(EXAMPLE, tokenizer(begin=True, template="<unk> " + TURNS), 50)
    assert chat["input_ids"].count(BOS) == 1
    assert split(chat) == ([BOS, 3, 5, 6, 7, tiny.EOS, 4], [8, 9, tiny.EOS])


def test_an_end_stands_once_where_the_tokenizer_adds_its_own():
    """And none stands between prompt and response."""
    row = supervised(EXAMPLE, tokenizer(begin=True, end=True), 50)
    assert split(row) == ([BOS, 5, 6, 7], [8, 9, tiny.EOS])


def test_padding_changes_no_loss():
    """A batch's loss is the mean over the supervised tokens of its rows, each alone."""
    model, tools = tiny.make_model("llama"), tokenizer()
    examples = [EXAMPLE, Example("w5", "w8 w9 w10 w11", "w11"), Example("w7 w8", "w20", "w20")]
    rows = [supervised(example, tools, 50) for example in examples]
    batch = collate(rows, tiny.PAD)
    together = model(**batch).loss
    counts = [len(split(row)[1]) for row in rows]
    alone = [model(**collate([row], tiny.PAD)).loss for row in rows]
    expected = sum(n * loss for n, loss in zip(counts, alone, strict=True)) / sum(counts)
    assert torch.allclose(together, expected, rtol=1e-6)


def test_a_set_with_longer_examples_is_refused_with_their_number_or_they_are_skipped():
    tools = tokenizer(template=TURNS)
    short, long = EXAMPLE, Example("w5", " ".join(["w9"] * 30), "w9")
    with pytest.raises(InputError, match=r"2 of 3 examples are longer than 20 tokens, .*--longer"):
        supervise_all([long, short, long], tools, 20)
    rows, n_longer = supervise_all([long, short, long], tools, 20, skip_longer=True)
    assert rows == [supervised(short, tools, 20)]
    assert n_longer == 2
    with pytest.raises(InputError, match="1 of 1 examples"):
        supervise_all([long], tools, 20, skip_longer=True)  # nothing would be left

"""Tasks from files and hub rows: where examples go, and how answers are read."""

import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from toolkit import InputError
from toolkit.documents.tasks import make_task
from toolkit.documents.tasks.choice import ARC, BoolQ, Winogrande
from toolkit.documents.tasks.gsm8k import GSM8K
from toolkit.documents.tasks.jsonl import JSONLines
from toolkit.documents.tasks.task import Example, chance

SPLITS = ("train", "validation", "test")


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows(start, stop):
    return [{"prompt": f"question {i}", "response": f"It is {i}."} for i in range(start, stop)]


def prompts(task, split):
    return [example.prompt for example in task.examples(split)]


# --- reading answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Natalia sold 48/2 = 24 clips in May.\nShe sold 48+24 = 72 clips.\n#### 72", "72"),
        ("So the house is worth $1,234,500.", "1234500"),
        ("She makes $18 every day.", "18"),
        ("That is 3.50 dollars.", "3.50"),
        ("The temperature fell to -4.", "-4"),
        ("12 apples, 7 pears, and so 19, in all", "19"),
        ("between 5-10", "10"),  # a dash between numbers is no sign
        ("7-3=4", "4"),
        ("the numbers 1,2,3", "3"),  # no thousands
        ("x = 10,000", "10000"),
        ("no idea", None),
        ("", None),
    ],
)
def test_gsm8k_takes_the_last_number(text, answer):
    assert GSM8K().extract(text) == answer


@pytest.mark.parametrize("said", ["18", "18.0", "$18.00.", "he has 18,"])
@pytest.mark.parametrize("answer", ["18", "18.0"])
def test_gsm8k_compares_numbers_and_not_their_spelling(said, answer):
    task, example = GSM8K(), Example("q", "r", answer)
    assert task.correct(said, example)
    assert not task.correct(said.replace("18", "81"), example)
    assert not task.correct("eighteen", example)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the correct answer is answer2", "answer2"),
        ("The correct answer is Answer2.", "answer2"),
        ("answer1 is wrong, so answer3", "answer3"),
        ("answer10", None),
        ("answer 2", None),
        ("myanswer2", None),
        ("ANSWER5!", "answer5"),
        ("answer6", None),
    ],
)
def test_a_choice_is_a_whole_word_in_any_case(text, answer):
    assert ARC().extract(text) == answer


def test_choices_of_each_task():
    assert BoolQ().extract("True or false? It is TRUE") == "true"
    assert BoolQ().extract("untrue") is None
    assert Winogrande().extract("option1 and Option2") == "option2"
    assert Winogrande().extract("option3") is None


def test_answers_in_a_file_are_read_as_responses_are(tmp_path):
    """``True`` or ``$1,800``: else no response could be right."""
    lines = [{"prompt": "q", "response": "the correct answer is True", "answer": "True"}]
    (example,) = BoolQ(None, write(tmp_path / "choice", lines)).examples("test")
    lines = [{"prompt": "q", "response": "He earns $1,800 .", "answer": "$1,800"}]
    (number,) = GSM8K(None, write(tmp_path / "number", lines)).examples("test")
    assert GSM8K().correct("1800.0", number)
    assert BoolQ().correct("the correct answer is true", example)
    assert not BoolQ().correct("the correct answer is false", example)
    assert not BoolQ().correct("well", example)


def test_jsonl_compares_whole_responses():
    task, example = JSONLines(), Example("q", "a b ", "a b ")
    assert task.correct("  a b\n", example)
    assert not task.correct("a b.", example)
    assert task.extract(" \n") is None
    assert not task.correct(" ", example)


# --- rows as the hub has them


def test_gsm8k_rows():
    row = {
        "question": "Natalia sold clips to 48 of her friends. How many?",
        "answer": "She earned <<1000*2=2000>>2,000 dollars.\n#### 2,000",
    }
    example = GSM8K().from_hub(row)
    assert (example.prompt, example.response) == (row["question"], row["answer"])
    assert example.answer == "2000"
    assert GSM8K().correct(example.response, example)


def test_boolq_rows():
    row = {"question": "do iran and afghanistan speak the same language", "answer": True,
           "passage": "Persian, also known by its endonym Farsi, ..."}  # fmt: skip
    for answer, word in ((True, "true"), (False, "false")):
        example = BoolQ().from_hub({**row, "answer": answer})
        assert example.answer == word
        assert example.response == f"the correct answer is {word}"
        assert "same language?\n\nAnswer format: true/false" in example.prompt


@pytest.mark.parametrize("labels", [["A", "B", "C"], ["1", "2", "3"]])
def test_arc_rows(labels):
    """Answers are numbered whatever the labels; three to five of them."""
    row = {
        "id": "Mercury_SC_415702",
        "question": "Which skin surface produces the most heat?",
        "choices": {"text": ["dry palms", "wet palms", "palms with oil"], "label": labels},
        "answerKey": labels[2],
    }
    example = ARC("Challenge").from_hub(row)
    assert example.answer == "answer3"
    assert "Answer1: dry palms Answer2: wet palms Answer3: palms with oil" in example.prompt
    assert example.prompt.endswith("Answer format: answer1/answer2/answer3")
    assert ARC().correct(example.response, example)
    assert (ARC().name, ARC("Challenge").hub[1]) == ("arc-easy", "ARC-Challenge")


def test_winogrande_rows():
    row = {
        "sentence": "The trophy doesn't fit into the suitcase because the _ is too large.",
        "option1": "trophy",
        "option2": "suitcase",
        "answer": "1",
    }
    example = Winogrande().from_hub(row)
    assert example.answer == "option1"
    assert "Option1: trophy Option2: suitcase" in example.prompt
    assert row["sentence"] in example.prompt
    assert Winogrande().correct(example.response, example)


def test_the_hub_is_asked_for_the_splits_by_name(monkeypatch):
    asked = []

    def load_dataset(path, configuration, split):
        asked.append((path, configuration, split))
        numbers = range(100) if split == "train" else range(90, 120)
        return [{"question": f"{i}?", "answer": f"It is {i}.\n#### {i}"} for i in numbers]

    hub = ModuleType("datasets")
    hub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", hub)
    task = GSM8K()
    found = [prompts(task, split) for split in SPLITS]
    assert set(asked) == {("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")}
    assert found[2] == [f"{i}?" for i in range(90, 120)]
    assert sorted(found[0] + found[1]) == sorted(f"{i}?" for i in range(90))


def test_without_datasets_it_is_said_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import then fails
    with pytest.raises(InputError, match=r"--train FILE .*pip install") as refused:
        GSM8K().examples("train")
    (extra,) = re.findall(r"oracle-toolkit\[(\w+)\]", str(refused.value))
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert any(name.startswith("datasets") for name in project["optional-dependencies"][extra])


def test_a_hub_that_cannot_be_reached_is_bad_input(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    hub = ModuleType("datasets")
    hub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(InputError, match=r"openai/gsm8k cannot be had .*reach.*--train FILE"):
        GSM8K().examples("train")


# --- files


def test_splits_of_files_do_not_overlap(tmp_path):
    """Every training prompt is in one of train and validation, but those of the test file."""
    task = GSM8K(write(tmp_path / "a", rows(0, 200)), write(tmp_path / "b", rows(190, 260)))
    train, validation, test = (prompts(task, split) for split in SPLITS)
    assert test == [f"question {i}" for i in range(190, 260)]
    assert sorted(train + validation) == sorted(f"question {i}" for i in range(190))
    assert 5 < len(validation) < 60  # about one in eight
    assert task.examples("train", 7) == task.examples("train")[:7]


def test_validation_stays_when_examples_are_added(tmp_path):
    test = write(tmp_path / "test", rows(900, 901))
    small = GSM8K(write(tmp_path / "small", rows(50, 100)), test)
    large = GSM8K(write(tmp_path / "large", rows(0, 200)), test)
    for split in ("train", "validation"):
        assert set(prompts(small, split)) < set(prompts(large, split))


def test_answers_are_given_or_read(tmp_path):
    lines = [
        {"prompt": "a", "response": "It is 1,200."},
        "",
        {"prompt": "b", "response": "It is 3.", "answer": "4"},
    ]
    (a, b) = GSM8K(None, write(tmp_path / "test", lines)).examples("test")
    assert (a.answer, b.answer) == ("1200", "4")


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '["a", "b"]',
        '"text"',
        "3",
        '{"prompt": "a"}',
        '{"response": "a"}',
        '{"prompt": 3, "response": "4"}',
        '{"prompt": "a", "response": ""}',
        '{"prompt": "a", "response": 5}',
        '{"prompt": "a", "response": "no number"}',
        '{"prompt": "a", "response": "4", "answer": 4}',
        '{"prompt": "a", "response": "4", "answer": "four"}',
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = write(tmp_path / "test.jsonl", [rows(0, 1)[0], "", line])
    with pytest.raises(InputError, match=r"test\.jsonl:3: "):
        GSM8K(None, path).examples("test")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no such data file: .*nothing\.jsonl"):
        GSM8K(tmp_path / "nothing.jsonl").examples("train")
    one = write(tmp_path / "one", rows(0, 1))
    with pytest.raises(InputError, match=r"gsm8k has no (train|validation) examples"):
        [GSM8K(one).examples(split) for split in ("train", "validation")]
    with pytest.raises(InputError, match="gsm8k has no test examples"):
        GSM8K(one, write(tmp_path / "none", [""])).examples("test")
    with pytest.raises(InputError, match="needs --test FILE"):
        make_task("jsonl", one).examples("test")
    latin = tmp_path / "latin"
    latin.write_bytes('{"prompt": "é", "response": "1"}'.encode("latin-1"))
    with pytest.raises(InputError, match="latin is not UTF-8"):
        GSM8K(latin).examples("train")


def test_chance_is_the_most_frequent_training_answer():
    train = [Example("", "", answer) for answer in "aabbbc"]
    test = [Example("", "", answer) for answer in "abba"]
    assert chance(train, test) == 0.5
    assert chance(train[:3], test[:1]) == 1.0
    assert chance(train[-1:], test) == 0.0

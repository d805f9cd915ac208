"""Answers of a file: which texts are right, and which lines are refused."""

import json

import pytest

from toolkit import InputError
from toolkit.documents.tasks import make_task
from toolkit.documents.tasks.answers import Answers
from toolkit.documents.tasks.task import Example


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("3 and 4, so\n#### 7", "7", True),
        ("#### 3\nno: the answer is 7.", "7", True),
        ("The answer is 3\nnot 7", "7", False),  # it is the line after the marker that counts
        ("#### 17", "7", False),
        ("It is Paris, of course.", "paris", True),
        ("It is New York.", "new york", True),
        ("York is new", "new york", False),
        ("1,234 eggs", "1234", True),
        ("-4", "4", False),
        ("", "4", False),
        ("####", "4", False),
    ],
)
def test_the_answers_words_stand_whole_in_what_is_stated(text, answer, right):
    assert Answers().correct(text, Example("q", "", answer)) == right


def test_a_file_needs_no_responses(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": "a", "answer": "6 x\n#### 1,000"}, {"prompt": "b", "answer": "B."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [e.answer for e in Answers(test=path).examples("test")] == ["1000", "b"]


def test_answers_are_a_task_to_judge_on_and_to_learn_where_there_are_responses(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n')
    assert [e.answer for e in make_task("answers", test=path).examples("test")] == ["1"]
    with pytest.raises(InputError, match="no response to learn from"):
        make_task("answers", train=path).examples("train")
    with pytest.raises(InputError, match="needs --test FILE"):
        make_task("answers", train=path).examples("test")


@pytest.mark.parametrize("line", ['{"prompt": "a"}', '{"prompt": "a", "answer": 3}', "[]", "{"])
def test_a_line_without_an_answer_is_refused_with_its_place(line, tmp_path):
    (tmp_path / "answers.jsonl").write_text(line)
    with pytest.raises(InputError, match=r"answers\.jsonl:1"):
        Answers(test=tmp_path / "answers.jsonl").examples("test")

"""Data files as people have them, each with the documents that it holds."""

import json

import pytest

from toolkit import Document, InputError, read_documents
from toolkit.documents import formats
from toolkit.documents.documents import as_document

PAIR = {"prompt": "how?", "response": "so"}
DOCUMENT = Document(prompt="how?", response="so")
ROWS = json.dumps([PAIR, PAIR])


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


FILES = {
    "lines.jsonl": f"{json.dumps(PAIR)}\n{json.dumps(PAIR)}\n",
    "mark.jsonl": f"\ufeff{json.dumps(PAIR)}\n{json.dumps(PAIR)}\n",
    "lines.txt": f"{json.dumps(PAIR)}\n{json.dumps(PAIR)}\n",
    "array.json": json.dumps([PAIR, PAIR], indent=1),
    "array.txt": ROWS,
    "table.csv": "prompt,response\nhow?,so\nhow?,so\n",
    "table.tsv": "prompt\tresponse\nhow?\tso\nhow?\tso\n",
}


@pytest.mark.parametrize("name", FILES)
def test_rows_are_documents(tmp_path, name):
    assert read_documents(written(tmp_path, name, FILES[name])) == [DOCUMENT] * 2


def test_parquet(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame([PAIR, PAIR]).to_parquet(tmp_path / "rows.parquet")
    assert read_documents(tmp_path / "rows.parquet") == [DOCUMENT] * 2
    turns = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so"}]
    pandas.DataFrame([{"messages": turns}]).to_parquet(tmp_path / "chats.parquet")
    assert read_documents(tmp_path / "chats.parquet") == [DOCUMENT]
    with pytest.raises(InputError, match="no Parquet file"):
        read_documents(written(tmp_path, "cut.parquet", b"PAR1" + b"0" * 20))


def test_plain_text_has_no_mark_and_may_begin_with_a_bracket(tmp_path):
    text = written(tmp_path, "a.txt", "\ufeff[Scene] hello\nthere\n")
    assert [d.text for d in read_documents(text)] == ["[Scene] hello", "there"]


def test_a_format_that_is_not_read_is_refused(tmp_path):
    with pytest.raises(InputError, match="first line is '- prompt: hi'"):
        read_documents(written(tmp_path, "a.yaml", "- prompt: hi\n  response: yo\n"))


TURNS = [("system", "be brief"), ("user", "hi"), ("assistant", "yes?"), ("user", "how?")]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": r, "content": c} for r, c in [*TURNS, ("assistant", "so")]]},
        {
            "messages": [
                {"role": r, "content": [{"type": "text", "text": c}]}
                for r, c in [*TURNS, ("assistant", "so")]
            ]
        },
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}.get(r, r), "value": c}
                for r, c in [*TURNS, ("assistant", "so")]
            ]
        },
    ],
    ids=["messages", "parts", "sharegpt"],
)
def test_chats_keep_their_earlier_turns(fields):
    found = as_document(fields)
    assert (found.prompt, found.response, found.turns) == ("how?", "so", tuple(TURNS[:3]))
    assert found.content == "be brief\nhi\nyes?\nhow?\nso"


def test_a_chat_of_one_turn_is_a_prompt_and_a_response():
    """The same document, and the same side of the split."""
    turns = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so"}]
    assert as_document({"messages": turns}) == DOCUMENT


def test_alpacas_input_belongs_to_the_instruction():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert as_document(row) == Document(prompt="Add.\n\n1 2", response="3")
    assert as_document(row | {"input": ""}) == Document(prompt="Add.", response="3")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "a", "messages": []}, "read in several ways"),
        ({"question": "a", "answer": "b", "instruction": "c", "output": "d"}, "several ways"),
        ({"messages": [{"role": "user", "content": "a"}]}, "by user: the last two must be"),
        ({"messages": [{"who": "user"}]}, 'expected turns with "role"'),
        ({"messages": []}, "by nobody"),
        ({"prompt": "a"}, r"has \['prompt'\]: expected"),
    ],
)
def test_what_is_ambiguous_is_refused_with_its_fields(fields, message):
    with pytest.raises(InputError, match=message):
        as_document(fields)


def test_a_task_row_is_its_prompt_and_response():
    """The toolkit's own names come first; an answer beside them is the task's."""
    assert as_document(PAIR | {"answer": "so", "question": "how?"}) == DOCUMENT


def test_a_hubs_data_set_is_read_by_its_name(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return [PAIR]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name in ("hub:a/b", "hub:a/b:test", "hub:a/b:test:main"):
        assert read_documents(name) == [DOCUMENT]
    assert [(a, o["split"]) for a, o in asked] == [
        (("a/b", None), "train"),
        (("a/b", None), "test"),
        (("a/b", "main"), "test"),
    ]
    assert formats.HUB == "hub:"

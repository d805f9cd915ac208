"""Documents: the split by content, positions, prompts, batches, and refusals that help."""

import hashlib
import json

import pytest
import torch

from tests.support import tiny
from toolkit import Document, InputError, read_documents
from toolkit.documents.batches import make_batches
from toolkit.documents.documents import as_document, split_documents
from toolkit.documents.tokens import encode, encode_all


def by_hand(content):
    return int(hashlib.sha256(content.encode("utf-8")).hexdigest()[:8], 16) % 5 == 0


def test_held_out_is_decided_by_the_contents_hash():
    """One in five, by content alone: order and company do not matter."""
    documents = tiny.make_documents(200)
    split = {d.content: held_out for d, held_out in split_documents(documents)}
    for fields in documents:
        content = fields.get("text", f"{fields.get('prompt')}\n{fields.get('response')}")
        assert split[content] == by_hand(content)
    assert split == {d.content: h for d, h in split_documents(documents[::-1])}
    assert 20 < sum(split.values()) < 60


def test_content_is_utf_8():
    assert Document(text="naïve 猫").held_out == by_hand("naïve 猫")


def test_duplicates_count_once():
    """By content: a text equal to prompt, newline, response is the same document."""
    documents = [
        {"text": "a\nb"},
        {"prompt": "a", "response": "b"},
        {"text": "a\nb"},
        {"text": "c"},
    ]
    assert [d.content for d, _ in split_documents(documents)] == ["a\nb", "c"]


@pytest.mark.parametrize("side", [True, False])
def test_an_empty_side_gets_the_last_document(side):
    texts = [f"text {i}" for i in range(40)]
    same = [t for t in texts if by_hand(t) == side][:4]
    assert [h for _, h in split_documents(same)] == [side, side, side, not side]


def test_one_document_is_too_few():
    for documents in ([], ["a"], ["a", "a"]):
        with pytest.raises(InputError, match="at least 2"):
            split_documents(documents)


def test_positions(tokenizer):
    """all: every token but the first; response: from its first token on; last: one token."""
    document = encode(Document(prompt="w5 w6", response="w7 w8 w9"), tokenizer)
    assert document.ids == (5, 6, 7, 8, 9)
    assert document.counted("all") == [False, True, True, True, True]
    assert document.counted("response") == [False, False, True, True, True]
    assert document.counted("last") == [False, False, False, False, True]
    text = encode(Document(text="w5 w6 w7"), tokenizer)
    assert text.counted("all") == text.counted("response") == [False, True, True]
    assert text.counted("last") == [False, False, True]


def test_without_a_chat_template_prompt_and_response_are_joined(tokenizer):
    document = encode(Document(prompt="w5 w6", response="w7"), tokenizer)
    assert document.ids == tuple(tokenizer("w5 w6\nw7")["input_ids"])
    assert document.prompt_ids == tuple(tokenizer("w5 w6\n")["input_ids"])


def test_a_chat_template_writes_the_turns(chat_tokenizer):
    """<user> 3, <assistant> 4; the prompt to generate from ends where the answer begins."""
    document = encode(Document(prompt="w5 w6", response="w7 w8"), chat_tokenizer)
    assert document.ids == (3, 5, 6, 4, 7, 8)
    assert document.prompt_ids == (3, 5, 6, 4)
    assert document.response_start == 4
    assert encode(Document(text="w5 w6"), chat_tokenizer).ids == (5, 6)


@pytest.mark.parametrize(("n_tokens", "n_prompt"), [(100, 32), (64, 32), (63, 31), (10, 5), (2, 1)])
def test_the_prompt_of_a_text(tokenizer, n_tokens, n_prompt):
    """Its first 32 tokens, or half of it where it is shorter than 64."""
    document = encode(Document(text=" ".join(["w7"] * n_tokens)), tokenizer)
    assert len(document.prompt_ids) == n_prompt


def test_documents_are_cut(tokenizer):
    document = encode(Document(text=" ".join(["w7"] * 50)), tokenizer, max_length=20)
    assert len(document.ids) == 20


def test_batches_hold_every_token_once(tokenizer):
    """Right padding, sides apart, at most so many tokens a batch, and one key a counted token."""
    encoded = encode_all(tiny.make_documents(40), tokenizer)
    batches = make_batches(encoded, batch_tokens=64)
    rows = [
        (tuple(ids[mask].tolist()), batch.held_out)
        for batch in batches
        for ids, mask in zip(batch.ids, batch.mask, strict=True)
    ]
    assert sorted(rows) == sorted((e.ids, e.held_out) for e in encoded)
    for batch in batches:
        assert batch.ids.numel() <= 64
        assert (batch.mask.int().diff(dim=1) <= 0).all()
        assert len(batch.keys) == batch.counted.sum() == batch.n_tokens - len(batch.ids)
        assert not batch.counted[:, 0].any()
        assert not (batch.counted & ~batch.mask).any()


def test_keys_belong_to_tokens_not_to_batches(tokenizer):
    """However documents are batched, each token draws the same key; another seed, another."""
    encoded = encode_all(tiny.make_documents(20), tokenizer)
    sets = [
        sorted(torch.cat([b.keys for b in make_batches(encoded, batch_tokens=n, seed=s)]).tolist())
        for n, s in ((30, 0), (1000, 0), (1000, 1))
    ]
    assert sets[0] == sets[1] != sets[2]
    assert 0 <= min(sets[0]) < max(sets[0]) < 1
    assert len(set(sets[0])) == len(sets[0])


def written(folder, text, name="data.jsonl"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_json_lines_and_plain_text_are_read(tmp_path):
    lines = [json.dumps({"text": "a"}), "", json.dumps({"prompt": "b", "response": "c", "id": 3})]
    expected = [Document(text="a"), Document(prompt="b", response="c")]
    assert read_documents(written(tmp_path, "\n".join(lines))) == expected
    assert read_documents(written(tmp_path, "\n".join(lines), "data.txt")) == expected
    assert read_documents(written(tmp_path, "one\n\ntwo\n", "b.txt")) == [
        Document(text="one"),
        Document(text="two"),
    ]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e"])
def test_unusual_line_separators_in_strings_do_not_cut_a_line(tmp_path, separator):
    text = f"one{separator}two"
    line = json.dumps({"text": text}, ensure_ascii=ord(separator) < 32)
    assert read_documents(written(tmp_path, f"{line}\n{line}")) == [Document(text=text)] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty: expected JSON lines or"),
        ("\n  \n", "is empty"),
        ('{"text": "a"}\n{"text": ', r"data.jsonl:2 is not JSON .*: expected one object a line"),
        (
            '{"txt": "a"}',
            r"data.jsonl:1 has \['txt'\]: expected an object with the string \"text\"",
        ),
        ('{"prompt": "a"}', 'or the strings "prompt" and "response"'),
        ('{"text": 3}', 'expected an object with the string "text"'),
        ("[1]", r"data.jsonl\[0\] has int: expected an object"),
    ],
)
def test_bad_files_are_refused_with_what_to_do(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read_documents(written(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_bytes_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no such data file: .*nowhere"):
        read_documents(tmp_path / "nowhere.jsonl")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_documents(tmp_path / "b.txt")


def test_text_that_utf_8_cannot_hold_is_refused(tmp_path):
    """JSON can spell half a surrogate pair, of which no hash can be taken."""
    path = written(tmp_path, '{"text": "\\ud800"}\n{"text": "b"}')
    with pytest.raises(InputError):
        split_documents(read_documents(path))


def test_a_document_without_a_token_is_no_prompt(llama_pair):
    """Nothing can be generated from nothing: an empty held-out text is not compared."""
    assert by_hand("")
    encoded = encode_all([*tiny.make_documents(20), {"text": ""}], llama_pair.tokenizer)
    assert all(e.prompt_ids for e in encoded if e.held_out)


def test_mappings_strings_and_documents_are_documents():
    assert as_document("a") == as_document({"text": "a"}) == as_document(Document(text="a"))
    with pytest.raises(InputError, match="document has int"):
        as_document(3)


def test_documents_of_one_token_leave_nothing_to_fit(tokenizer):
    with pytest.raises(InputError, match="two tokens or more"):
        encode_all(["w5", "w6", "w7", "w8"], tokenizer)

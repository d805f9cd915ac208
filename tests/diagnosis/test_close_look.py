"""A whole diagnosis with answers and prompts from elsewhere: tables, words, and bad files."""

import json
from contextlib import nullcontext

import pandas as pd
import pytest
import torch

from tests.support import tiny
from tests.support.commands import oracle
from toolkit.diagnosis.certificates import certificates, check_first_tokens
from toolkit.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.save_request(tmp_path_factory.mktemp("models"), n_documents=40)
    documents = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    known = next(d["prompt"] for d in documents if "prompt" in d)
    questions = [known, "w7 w8 w9", "w20 w21", "w5 w30 w12 w9"]
    rows = [json.dumps({"prompt": q, "answer": "w7"}) for q in questions]
    (folder / "answers.jsonl").write_text("\n".join(rows))
    (folder / "away.jsonl").write_text('{"prompt": "w9 w8"}\n{"prompt": "w31 w5 w6"}\n')
    (folder / "texts.txt").write_text("w5 w6 w7 w8\nw9 w10\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "own prompts").write_text("w5 w6 w7\n")
    (folder / "numbers.jsonl").write_text('{"prompt": 3}\n')
    return folder


def diagnose(folder, out, *more):
    data = ("--data", folder / "data.jsonl", "--out", out)
    small = ("--new-tokens", 3, "--sample", 0, "--shared-sample", 0, "--quiet")
    return oracle("diagnose", folder / "base", folder / "tuned", *data, *small, *more)


def test_all_that_is_asked_for_is_in_tables_and_words(folder, tmp_path):
    out = tmp_path / "run"
    away = ("--elsewhere", folder / "away.jsonl", "--elsewhere", folder / "texts.txt")
    result = diagnose(folder, out, "--answers", folder / "answers.jsonl", *away)
    assert result.exit_code == 0, result.output
    frames = {n: pd.read_csv(out / "tables" / f"{n}.csv") for n in ("task", "response_loss")}
    assert set(frames["task"].left_out) == {1}
    assert set(frames["task"].n_questions) == {3}
    assert list(frames["response_loss"].model[:2]) == ["base", "tuned"]
    elsewhere = pd.read_csv(out / "tables" / "elsewhere.csv")
    assert list(elsewhere.file.unique()) == ["own prompts", "away.jsonl", "texts.txt"]
    steered = pd.read_csv(out / "tables" / "steerability.csv")
    base = elsewhere.query("file == 'own prompts' and model == 'base'").iloc[0]
    assert base.recovered == 0
    assert len(steered) > 2
    html = (out / "report.html").read_text()
    for words in (
        "Of 3 questions (1 that are",
        "On the responses of",
        "On 2 prompts of away.jsonl",
    ):
        assert words in html
    report = json.loads((out / "report.json").read_text())
    # `oracle steer eval` would ask the question that the run left out as well.
    assert "judge" not in report["commands"]
    said = report["run"]["checks"]
    names = {check["name"]: check["status"] for check in said}
    for who in ("base", "tuned", "recommended"):
        assert names[f"prompts alone, padded and cached ({who})"] == "passed"
    assert names["first tokens"] == "not applicable"
    other = json.loads((out / "run.json").read_text())["other_data"]
    assert other["task"]["left_out"] == 1
    assert set(other["elsewhere"]) == {"away.jsonl", "texts.txt"}


BAD = {
    "two kinds of questions": (["--answers", "answers.jsonl", "--task", "listops"], "give one"),
    "a test without a task": (["--test", "answers.jsonl"], "give --task"),
    "a file that is not read": (
        ["--task", "listops", "--test", "answers.jsonl"],
        "draws its own examples",
    ),
    "no such task": (["--task", "chess"], "no task is called"),
    "no questions": (["--task", "listops", "--questions", "0"], "expected 1 or more"),
    "questions of no task": (["--questions", "9"], "give --task or --answers"),
    "no file of answers": (["--answers", "none.jsonl"], "no such data file"),
    "no answers": (["--answers", "away.jsonl"], '"prompt" and "answer"'),
    "no file of prompts": (["--elsewhere", "none.jsonl"], "no such data file"),
    "no prompts": (["--elsewhere", "empty.jsonl"], "is empty"),
    "prompts that are no texts": (["--elsewhere", "numbers.jsonl"], "expected an object"),
    "the data's own name": (["--elsewhere", "own prompts"], "tables call the data's prompts so"),
    "one name twice": (["--elsewhere", "away.jsonl", "--elsewhere", "away.jsonl"], "rename one"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line_and_leave_nothing(name, folder, tmp_path, monkeypatch):
    arguments, expected = BAD[name]
    monkeypatch.chdir(folder)
    result = diagnose(folder, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert expected in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_plan_reads_the_same_files(folder):
    arguments = ("--data", folder / "data.jsonl", "--dry-run", "--elsewhere", folder / "none.jsonl")
    result = oracle("diagnose", folder / "base", folder / "tuned", *arguments)
    assert result.exit_code == 2
    assert "no such data file" in result.stderr


def test_prompts_that_leave_no_room_for_new_tokens_are_refused_by_their_file(tokenizer):
    """GPT-2 has 64 positions here: 60 tokens and 8 new ones do not fit, 56 do."""
    pair = tiny.make_pair("gpt2", torch.float32, tokenizer)
    positions = pair.base.config.max_position_embeddings
    pair.require_prompts([[5] * (positions - 8)], 8)
    with pytest.raises(InputError, match=r"prompt of away.jsonl has .* 8 new ones .* leave out"):
        pair.require_prompts([[5] * (positions - 7)], 8, "away.jsonl")
    with pytest.raises(InputError, match=r"prompts of away.jsonl hold token 9999"):
        pair.require_prompts([[5, 9999]], 8, "away.jsonl")


@pytest.mark.parametrize("prompts", [[(5, 6, 7, 8)], [(5, 6, 7, 8), (5, 9, 9, 6)]])
def test_certificates_pad_prompts_of_one_length_too(llama_pair, prompts, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "toolkit.diagnosis.certificates.certify",
        lambda name, model, two, pad: seen.append(sorted(map(len, two))),
    )
    corpus = llama_pair.corpus([{"text": f"w5 w{i} w9"} for i in range(6, 16)])
    certificates({"base": lambda: nullcontext(llama_pair.base)}, corpus, prompts)
    assert seen == [[2, 4]]


def test_first_tokens_that_differ_are_counted(llama_pair):
    documents = [{"text": f"w5 w{i} w9"} for i in range(6, 16)]
    corpus = llama_pair.corpus([*documents, {"text": "w30 w6 w9"}])
    found = check_first_tokens(corpus, [(5, 6), (30, 6), (31, 6)])
    assert found.status == "not applicable"
    assert "1 of 11 documents and 2 of the 3 prompts" in found.detail
    assert check_first_tokens(llama_pair.corpus(documents), [(5, 6)]).status == "passed"

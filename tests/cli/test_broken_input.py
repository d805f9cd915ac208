"""Two hundred broken inputs: each is one line or a run, never a traceback, and leaves nothing."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.support import tiny
from toolkit import InputError
from toolkit.cli.main import app

REACHED = "every input was read"
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**6), st.floats(), st.text(max_size=8),
    st.lists(st.integers(0, 9), max_size=3), st.dictionaries(st.text(max_size=4), st.none()),
)  # fmt: skip
SIDES = st.sampled_from(["base", "tuned"])
FIELDS = st.sampled_from(
    ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
     "num_key_value_heads", "intermediate_size", "architectures", "hidden_act", "rope_parameters",
     "tie_word_embeddings", "dtype", "quantization_config", "auto_map", "eos_token_id"]
)  # fmt: skip
FILES = st.sampled_from(
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
     "generation_config.json", "adapter_config.json", "model.safetensors.index.json"]
)  # fmt: skip
TEMPLATES = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["{{ messages[0].content }}", "{% for m in messages %}", "{{ raise_exception('no') }}",
         "{{ messages[0].content.strip(3) }}", "{{ 1 / 0 }}", "<user>", "{{ strftime_now('%Y') }}"]
    ),
)  # fmt: skip
LINES = st.one_of(
    st.text(max_size=20),
    VALUES.map(json.dumps),
    st.dictionaries(st.sampled_from(["text", "prompt", "response", "messages"]), VALUES).map(
        json.dumps
    ),
)
OPTIONS = st.sampled_from(
    ["--positions", "--max-length", "--new-tokens", "--max-prompts", "--sample", "--dtype",
     "--device", "--recover", "--batch-tokens", "--sketch", "--max-kl", "--cross-fit", "--seed"]
)  # fmt: skip
WORDS = st.one_of(st.integers(-5, 9).map(str), st.floats().map(str), st.text("abc-", max_size=5))
CHANGES = st.one_of(
    st.tuples(st.just("field"), SIDES, FIELDS, VALUES),
    st.tuples(st.just("bytes"), SIDES, FILES, st.binary(max_size=40)),
    st.tuples(st.just("cut"), SIDES, FILES, st.integers(0, 2000)),
    st.tuples(st.just("remove"), SIDES, FILES, st.none()),
    st.tuples(st.just("template"), SIDES, st.none(), TEMPLATES),
    st.tuples(st.just("lines"), st.none(), st.none(), st.lists(LINES, max_size=4)),
    st.tuples(st.just("option"), st.none(), OPTIONS, WORDS),
)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return tiny.save_request(tmp_path_factory.mktemp("valid"))


def broken(folder, change):
    """Break one thing in `folder`; the options that a command is given."""
    kind, side, name, value = change
    if kind == "option":
        return [name, value]
    if kind == "lines":
        text = "\n".join(value).encode("utf-8", "replace").decode()
        (folder / "data.jsonl").write_text(text, encoding="utf-8")
        return []
    path = folder / side / (name if kind in ("bytes", "cut", "remove") else "config.json")
    if kind == "field":
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {name: value}))
    elif kind == "template":
        path = folder / side / "tokenizer_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"chat_template": value}))
    elif kind == "bytes":
        path.write_bytes(value)
    elif kind == "cut" and path.exists():
        path.write_bytes(path.read_bytes()[:value])
    elif kind == "remove":
        path.unlink(missing_ok=True)
    return []


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(change=CHANGES)
def test_no_broken_input_ends_in_a_traceback_or_leaves_files(valid, tmp_path_factory, change):
    """The diagnosis itself is left out: what comes before it is what meets the input."""
    folder = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toolkit.jobs.diagnose.diagnose", reached)
        shutil.copytree(valid, folder, dirs_exist_ok=True)
        options = broken(folder, change)
        out = folder / "out"
        command = ["diagnose", folder / "base", folder / "tuned", "--data", folder / "data.jsonl"]
        known = sorted(path.name for path in folder.iterdir())
        result = CliRunner().invoke(app, [*map(str, [*command, "--out", out]), *options])
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("the memory that")]
    if "Usage:" not in result.stderr:  # typer's own refusals of options are a box
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("oracle: ")
    assert sorted(path.name for path in folder.iterdir()) == known
    shutil.rmtree(folder)


def reached(pair, documents, options, **_):
    """Read what a diagnosis reads first, and end."""
    pair.corpus(documents, **options.reading).require_counted()
    raise InputError(REACHED)


def test_a_valid_input_reaches_the_diagnosis(valid, tmp_path, monkeypatch):
    monkeypatch.setattr("toolkit.jobs.diagnose.diagnose", reached)
    command = ["diagnose", valid / "base", valid / "tuned", "--data", valid / "data.jsonl"]
    result = CliRunner().invoke(app, [*map(str, command), "--out", str(tmp_path / "out")])
    assert REACHED in result.stderr


def test_an_interrupt_says_how_to_go_on(valid, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("toolkit.jobs.diagnose.diagnose", interrupted)
    command = ["diagnose", valid / "base", valid / "tuned", "--data", valid / "data.jsonl"]
    result = CliRunner().invoke(app, [*map(str, command), "--out", str(tmp_path / "out")])
    assert result.exit_code == 130, result.output
    assert "interrupted; the same command goes on from" in result.stderr.splitlines()[-1]


def test_an_error_that_nobody_expected_is_one_line_with_a_log(valid, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ZeroDivisionError("of ours")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("toolkit.jobs.diagnose.diagnose", fails)
    command = ["diagnose", valid / "base", valid / "tuned", "--data", valid / "data.jsonl"]
    result = CliRunner().invoke(app, [*map(str, command), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    (log,) = tmp_path.glob("oracle-error-*.log")
    assert len(result.stderr.strip().splitlines()) == 1
    assert "ZeroDivisionError" in result.stderr
    assert log.name in result.stderr
    assert "Traceback" in log.read_text()

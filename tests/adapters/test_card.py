"""The card beside adapters says what they are, and loads them; it overwrites nobody's."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard

from tests.support import tiny
from tests.support.steering import random_adapters
from toolkit import Adapters, InputError
from toolkit.adapters import hub
from toolkit.adapters.card import MARK, card

INFO = {
    "base": "someone/base",
    "tuned": "`<script>`\n# tuned",
    "recovered": {"mean": 0.9512, "sem": 0.01, "low": 0.93, "high": 0.97},
    "accuracy": {"share": 0.5, "low": 0.4, "high": 0.6},
    "data_sha256": "383a",
    "versions": {"torch": "2.13.0"},
}


def written(folder, info, kind="linear"):
    adapters = random_adapters("post_mlp", kind)
    adapters.info.update(info)
    adapters.save_pretrained(folder)
    return adapters, (folder / "README.md").read_text()


def test_a_card_says_what_the_adapters_are(tmp_path):
    adapters, text = written(tmp_path, INFO)
    data = ModelCard(text).data
    assert (data.base_model, data.library_name) == ("someone/base", "oracle-toolkit")
    assert "- place: post_mlp, after the MLP, before the skip\n- kind: linear, rank 3" in text
    assert f"- blocks: 0 to {tiny.N_LAYERS - 1}\n- parameters: {adapters.parameters:,}" in text
    assert "- recovered: 0.951 (95 % interval 0.930 to 0.970) of KL(tuned" in text
    assert "- accuracy on the task: 0.500 (95 % interval 0.400 to 0.600)" in text
    assert "- fine-tune: `'<script>' # tuned`\n" in text
    assert "- sha256 of the data: `383a`" in text
    assert "- versions: `torch 2.13.0`" in text


def test_what_is_not_known_is_left_out(tmp_path):
    _, text = written(tmp_path, {"base": str(tmp_path), "recovered": {"mean": 0.5, "sem": None}})
    assert ModelCard(text).data.base_model is None  # the hub refuses paths
    assert "- recovered: 0.500 of KL(tuned" in text
    config = json.loads((tmp_path / "adapters.json").read_text())
    assert "recovered" not in card({**config, "info": {}})


@pytest.mark.parametrize(
    "info",
    [
        {"accuracy": {"gsm8k": 0.5}},
        {"accuracy": {"share": 0.5, "low": None, "high": None}},
        {"recovered": {"share": 0.9}},
        {"recovered": {"mean": "much"}},
        {"versions": "1.0"},
    ],
)
def test_what_others_keep_under_the_same_names_is_left_out(tmp_path, info):
    """`info` is anything worth keeping: it comes back, and the card is silent about it."""
    adapters, text = written(tmp_path, info)
    assert Adapters.from_pretrained(tmp_path).info == info
    for word in ("accuracy", "recovered", "versions"):
        assert word not in text
    assert "post_mlp" in adapters._repr_html_()


@pytest.mark.parametrize("absolute", [True, False])
def test_the_lines_of_the_card_load_the_adapters(tmp_path, monkeypatch, absolute):
    tiny.save_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    base = str(tmp_path / "base") if absolute else "base"
    adapters, text = written(tmp_path / "adapters", {"base": base})
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path / "adapters")
    ran = {}
    exec(lines, ran)
    assert ran["said"].shape[1] > 1
    states = torch.randn(3, tiny.D_MODEL, dtype=torch.float64)
    loaded = Adapters.from_pretrained(".").by_layer[0]
    assert torch.equal(loaded(states), adapters.by_layer[0](states))


def test_a_card_of_others_stays(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    assert written(tmp_path, INFO)[1] == "# Mine\n"
    (tmp_path / "README.md").write_text(f"{MARK}\n")
    assert "# Steering adapters" in written(tmp_path, INFO)[1]


class Hub:
    """A hub that keeps what it is sent; its methods have the parameters that HfApi's have."""

    def __init__(self, readme=None):
        self.readme, self.made, self.sent, self.said = readme, {}, set(), ""

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        if "/" not in repo_id:
            raise ValueError("no such name")
        self.made[repo_id] = private
        return f"https://hub/{repo_id}"

    def file_exists(self, repo_id, filename):
        return self.readme is not None

    def hf_hub_download(self, repo_id, filename):
        return str(self.readme)

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
        names = {path.name for path in Path(folder_path).iterdir()}
        self.sent, self.said = names - set(ignore_patterns or ()), commit_message


@pytest.mark.parametrize("readme", [None, f"{MARK}\n", "# Mine\n"])
def test_adapters_are_pushed(tmp_path, monkeypatch, readme):
    if readme:
        (tmp_path / "README.md").write_text(readme)
    api = Hub(tmp_path / "README.md" if readme else None)
    asked = SimpleNamespace(token=None)
    monkeypatch.setattr(hub, "HfApi", lambda token: setattr(asked, "token", token) or api)
    adapters = random_adapters("post_block")
    url = adapters.push_to_hub("me/steer", private=True, token="t", commit_message="New")
    assert (url, asked.token) == ("https://hub/me/steer", "t")
    assert api.made == {"me/steer": True}
    assert api.said == "New"
    card_sent = {"README.md"} if readme != "# Mine\n" else set()
    assert api.sent == {"adapters.json", "adapters.safetensors"} | card_sent
    with pytest.raises(InputError, match="cannot push to 'steer': no such name"):
        adapters.push_to_hub("steer")

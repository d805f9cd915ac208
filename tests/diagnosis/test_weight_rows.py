"""Every module's change, of models in memory and streamed from their files: the same rows."""

import json
import warnings

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from tests.support import tiny
from tests.support.commands import oracle
from toolkit import InputError
from toolkit.diagnosis.weight_rows import StreamedWeights, weight_rows
from toolkit.models.locations import resolve
from toolkit.models.runner import BlockRunner

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}


def in_memory(base, tuned):
    return pd.DataFrame(
        weight_rows(*(BlockRunner(model, resolve(model)) for model in (base, tuned)))
    )


def assert_same_rows(ours, theirs, rtol=1e-5):
    keys = ["layer", "module"]
    ours, theirs = (frame.sort_values(keys).reset_index(drop=True) for frame in (ours, theirs))
    pd.testing.assert_frame_equal(ours[list(theirs)], theirs, rtol=rtol, atol=1e-7)


@pytest.fixture(params=["llama", "phi3", "gemma3"])
def saved(request, tmp_path):
    """A pair in float32, and its folders in files of a few matrices each."""
    base = tiny.make_model(request.param, torch.float32)
    tuned = tiny.tune(base)
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
    return base, tuned, tmp_path


def test_streamed_rows_are_those_in_memory(saved):
    """Each side in several files; modules in the order of their layers."""
    base, tuned, folder = saved
    assert len(list((folder / "base").glob("*.safetensors"))) > 2
    ours = pd.DataFrame(StreamedWeights(folder / "base", folder / "tuned"))
    assert_same_rows(ours, in_memory(base, tuned))
    assert ours.layer.is_monotonic_increasing
    linear = [
        m for b in tiny.blocks_of(base) for m in b.modules() if isinstance(m, torch.nn.Linear)
    ]
    assert len(ours) == len(linear)
    assert (ours.norm_fro > 0).all()


def make_lora(family, folder, **options):
    """A base folder, an adapter folder with random factors, and both models in memory."""
    base = tiny.make_model(family, torch.float32)
    base.save_pretrained(folder / "base")
    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[family], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(tiny.copy_of(base), LoraConfig(**options))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn_like(parameter)
        wrapped.save_pretrained(folder / "lora")
    return base, wrapped.eval().requires_grad_(False)


def test_streamed_rows_of_gpt2_are_those_in_memory(tmp_path):
    """Its files hold [in, out]; a row is still of [out, in]."""
    base = tiny.make_model("gpt2", torch.float32)
    tuned = tiny.tune(base)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    ours = pd.DataFrame(StreamedWeights(tmp_path / "base", tmp_path / "tuned"))
    assert_same_rows(ours, in_memory(base, tuned))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapters_rows_are_those_in_memory(family, options, tmp_path):
    """Only modules that it touches have rows, with its scaling; GPT-2's weights are transposed."""
    base, wrapped = make_lora(family, tmp_path, **options)
    assert isinstance(wrapped, PeftModel)
    ours = pd.DataFrame(StreamedWeights(tmp_path / "base", tmp_path / "lora"))
    merged = wrapped.merge_and_unload()
    theirs = in_memory(base, merged)
    touched = theirs[theirs.norm_fro > 0].drop(columns="rank")
    assert 0 < len(touched) == len(ours)
    assert (ours["rank"] == 3).all()
    assert_same_rows(ours.drop(columns="rank"), touched, rtol=1e-4)


def test_an_adapter_in_memory_keeps_its_factors(tmp_path):
    """The rank is the LoRA's, which the merged weights' rounding would hide; others are 0."""
    base, wrapped = make_lora("llama", tmp_path)
    rows = in_memory(base, wrapped)
    touched = rows.module.isin(["self_attn.q_proj", "mlp.down_proj"])
    assert (rows["rank"] == 3 * touched).all()
    numbers = ["norm_2", "norm_fro", "relative", "stable_rank", "k90", "outside"]
    assert not rows[~touched][numbers].to_numpy().any()
    streamed = pd.DataFrame(StreamedWeights(tmp_path / "base", tmp_path / "lora"))
    assert_same_rows(streamed, rows[touched])


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 1}},
        {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
        {"alpha_pattern": {"q_proj": 9}},
        {"modules_to_save": ["o_proj", "lm_head"]},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_form_of_lora_has_the_rows_of_the_merged_model(tmp_path, options):
    """Ranks and scales of some modules, DoRA, and whole modules, as PEFT merges them."""
    base, wrapped = make_lora("llama", tmp_path, **options)
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name or "magnitude" in name:
            parameter.data *= 1.1
    wrapped.save_pretrained(tmp_path / "lora")
    found = StreamedWeights(tmp_path / "base", tmp_path / "lora")
    ours = pd.DataFrame(found)
    theirs = in_memory(base, wrapped.merge_and_unload())
    touched = theirs[theirs.norm_fro > 0].drop(columns="rank")
    assert 0 < len(touched) == len(ours)
    assert_same_rows(ours.drop(columns="rank"), touched, rtol=1e-3)
    assert found.unserved == (["lm_head.weight"] if "modules_to_save" in options else [])


def test_biases_and_tokens_of_an_adapter_are_named(tmp_path):
    """Name on stderr what is no matrix of a numbered block and has no row."""
    make_lora("llama", tmp_path, lora_bias=True, trainable_token_indices=[3])
    found = StreamedWeights(tmp_path / "base", tmp_path / "lora")
    assert any("lora_B.bias" in name for name in found.unserved)
    assert any("trainable_tokens" in name or "token_adapter" in name for name in found.unserved)
    done = oracle(
        "weights", tmp_path / "base", tmp_path / "lora", "--out", tmp_path / "weights.csv"
    )
    assert done.exit_code == 0, done.output
    assert "no rows for what is no matrix" in done.stderr
    assert "lora_B.bias" in done.stderr


def test_other_adapters_are_refused(tmp_path):
    make_lora("llama", tmp_path)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(
        json.dumps(config | {"peft_type": "IA3"})
    )
    with pytest.raises(InputError, match="IA3"):
        list(StreamedWeights(tmp_path / "base", tmp_path / "lora"))


def test_models_of_different_shape_are_refused_by_the_matrix(saved):
    _, _, folder = saved
    name = "model.layers.0.self_attn.o_proj.weight"
    (folder / "wrong").mkdir()
    save_file({name: torch.zeros(3, 5)}, folder / "wrong" / "model.safetensors")
    (folder / "wrong" / "config.json").write_text((folder / "base" / "config.json").read_text())
    with pytest.raises(InputError, match=r"o_proj.* is .* in the base and \(3, 5\) in the tuned"):
        list(StreamedWeights(folder / "base", folder / "wrong"))


@pytest.mark.parametrize("side", ["base", "tuned", "lora"])
def test_a_folder_without_safetensors_is_refused(tmp_path, side):
    make_lora("llama", tmp_path)
    tuned = "base" if side == "tuned" else "lora"
    for file in (tmp_path / (side if side != "tuned" else "base")).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match=r"safetensors|weights"):
        list(StreamedWeights(tmp_path / "base", tmp_path / tuned))


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError):
        list(StreamedWeights(tmp_path / "nowhere", tmp_path / "neither"))


def test_identical_models_change_nothing(saved):
    base, _, folder = saved
    ours = pd.DataFrame(StreamedWeights(folder / "base", folder / "base"))
    assert_same_rows(ours, in_memory(base, tiny.copy_of(base)))
    assert not ours.drop(columns=["layer", "module", "rows", "columns"]).to_numpy().any()

"""Loading gives what the files hold, and refuses by its name what is not whole."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.support import tiny
from toolkit import InputError, ModelPair
from toolkit.diagnosis.weight_rows import StreamedWeights
from toolkit.models.loading import load_model

UP = "model.layers.1.mlp.up_proj.weight"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def folders(tmp_path):
    return tiny.save_request(tmp_path)


def edit(folder, change):
    """Rewrite the weights in `folder` by what `change` makes of them."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


NOT_WHOLE = {
    "compiled": (lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}, "torch.compile"),
    "data parallel": (lambda t: {f"module.{k}": v for k, v in t.items()}, "data-parallel"),
    "unmerged": (
        lambda t: {k.replace("q_proj.", "q_proj.base_layer."): v for k, v in t.items()},
        "merge it",
    ),
    "missing": (lambda t: without(t, UP), rf"no tensor '{UP}'"),
    "left over": (lambda t: t | {"score.weight": torch.ones(2, 16)}, "'score.weight'.*not have"),
    "mis-shaped": (lambda t: t | {UP: t[UP][:-2].clone()}, r"\(38, 16\) in the files, \(40, 16\)"),
    "NaN": (lambda t: t | {UP: t[UP] * float("nan")}, f"NaN or infinity in '{UP}'"),
}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", NOT_WHOLE)
def test_weights_that_are_not_the_files_are_refused_by_name(folders, name, offload):
    change, message = NOT_WHOLE[name]
    edit(folders / "tuned", change)
    with pytest.raises(InputError, match=message):
        ModelPair.load(folders / "base", folders / "tuned", offload=offload)


def test_files_that_are_cut_off_or_pointers_are_refused(folders):
    path = folders / "tuned" / "model.safetensors"
    content = path.read_bytes()
    for broken, message in (
        (content[:-50], "cut off or damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=message):
            ModelPair.load(folders / "base", folders / "tuned")


def test_files_beside_the_one_that_is_read_are_not(folders):
    """Another naming of the same weights, which transformers does not read."""
    expected = list(StreamedWeights(folders / "base", folders / "tuned"))
    for name in ("base", "tuned"):
        weights = load_file(folders / name / "model.safetensors")
        other = {f"layers.{k}": v.clone() + 1 for k, v in weights.items() if "q_proj" in k}
        save_file(other, folders / name / "consolidated.safetensors")
    assert list(StreamedWeights(folders / "base", folders / "tuned")) == expected
    ModelPair.load(folders / "base", folders / "tuned", offload=True)


def test_a_folder_without_the_prefix_of_its_model_is_read(tmp_path):
    """GPT-2 is stored with and without ``transformer.``."""
    folders = tiny.save_request(tmp_path, "gpt2")
    expected = list(StreamedWeights(folders / "base", folders / "tuned"))
    edit(folders / "base", lambda t: {k.removeprefix("transformer."): v for k, v in t.items()})
    assert list(StreamedWeights(folders / "base", folders / "tuned")) == expected


def make_adapter(folders, **options):
    """A random LoRA of the base in ``tuned``, in place of the model there."""
    base = load_model(folders / "base", torch.float32)
    options = {"r": 4, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **options}
    tuned = get_peft_model(base, LoraConfig(**options))
    generator = torch.Generator().manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    shutil.rmtree(folders / "tuned")
    tuned.peft_config["default"].base_model_name_or_path = str(folders / "base")
    tuned.save_pretrained(folders / "tuned")
    return tuned


def test_an_adapter_beside_weights_is_refused_on_either_side(folders):
    make_adapter(folders)
    shutil.copytree(folders / "base", folders / "both")
    for path in (folders / "tuned").iterdir():
        shutil.copy(path, folders / "both")
    for base, tuned in (("both", "tuned"), ("base", "both")):
        with pytest.raises(InputError, match="an adapter beside them"):
            ModelPair.load(folders / base, folders / tuned)


def test_an_adapter_as_base_is_refused(folders):
    make_adapter(folders)
    with pytest.raises(InputError, match="give it as TUNED"):
        ModelPair.load(folders / "tuned", folders / "base")


def test_an_adapter_that_acts_outside_the_blocks_is_refused(folders):
    """An activated LoRA finds its invocation tokens in the PEFT model's own call."""
    make_adapter(folders, alora_invocation_tokens=[9, 10])
    with pytest.raises(InputError, match="cannot be followed block by block"):
        ModelPair.load(folders / "base", folders / "tuned")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_is_cut_out_of_its_base_leaves_the_base_alone(folders, start):
    """And its rows from files are those of the models."""
    make_adapter(folders, init_lora_weights=start)
    pair = ModelPair.load(folders / "base", folders / "tuned")
    stored = load_file(folders / "base" / "model.safetensors")
    assert all(torch.equal(dict(pair.base.named_parameters())[k], v) for k, v in stored.items())
    (row, *_) = StreamedWeights(folders / "base", folders / "tuned")
    ours, theirs = (
        m.get_submodule(f"{prefix}model.layers.0.self_attn.q_proj")
        for m, prefix in ((pair.base, ""), (pair.tuned, "base_model.model."))
    )
    delta = (theirs(torch.eye(16)) - ours(torch.eye(16))).double()
    assert row["module"] == "self_attn.q_proj"
    assert row["norm_fro"] == pytest.approx(float(delta.norm()), rel=1e-4)


def test_an_adapter_that_writes_to_its_base_gets_a_copy(folders, monkeypatch):
    """Whatever its kind is called: the base's tensors are hashed before and after."""
    from peft import PeftModel

    make_adapter(folders)
    load = PeftModel.from_pretrained

    def writes(model, folder):
        next(model.parameters()).data += 1
        return load(model, folder)

    monkeypatch.setattr(PeftModel, "from_pretrained", writes)
    pair = ModelPair.load(folders / "base", folders / "tuned")
    stored = load_file(folders / "base" / "model.safetensors")
    assert all(torch.equal(dict(pair.base.named_parameters())[k], v) for k, v in stored.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no adapter's configuration"),
        ('{"peft_type": "FUTURE"}', "does not know"),
        ("{}", "'peft_type' is not there"),
    ],
)
def test_a_broken_adapter_configuration_is_one_line(folders, content, message):
    make_adapter(folders)
    (folders / "tuned" / "adapter_config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        ModelPair.load(folders / "base", folders / "tuned")


def test_the_recorded_base_is_known_by_its_content(folders):
    """A link to it, a copy and a hub's snapshot are it; another model in its place is not."""
    make_adapter(folders)
    (folders / "link").symlink_to(folders / "base")
    shutil.copytree(folders / "base", folders / "copy")
    for name in ("link", "copy"):
        ModelPair.load(folders / name, folders / "tuned")
    edit(folders / "copy", lambda t: {k: v + 0.1 for k, v in t.items()})
    with pytest.raises(InputError, match="of another base"):
        ModelPair.load(folders / "copy", folders / "tuned")
    path = folders / "tuned" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "org/tiny"}))
    snapshot = folders / "models--org--tiny" / "snapshots" / "0123"
    shutil.copytree(folders / "base", snapshot)
    ModelPair.load(snapshot, folders / "tuned")


def test_two_precisions_are_refused(folders):
    model = load_model(folders / "tuned").to(torch.bfloat16)
    model.save_pretrained(folders / "tuned")
    with pytest.raises(InputError, match=r"float32 and the fine-tune in bfloat16.*--dtype"):
        ModelPair.load(folders / "base", folders / "tuned", "auto")
    ModelPair.load(folders / "base", folders / "tuned", "float32")


def quantise(folder, config):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def test_float8_weights_are_what_their_scales_say(folders):
    """One scale a matrix. transformers multiplies in bfloat16: to its rounding."""
    plain = load_file(folders / "tuned" / "model.safetensors")
    stored, expected = {}, {}
    for name, weight in plain.items():
        if weight.ndim == 2 and "layers" in name:
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[name.replace("weight", "weight_scale_inv")] = scale.reshape(1, 1)
            expected[name] = stored[name].float() * scale
        else:
            stored[name] = expected[name] = weight
    save_file(stored, folders / "tuned" / "model.safetensors", {"format": "pt"})
    quantise(folders / "tuned", {"quant_method": "fp8", "weight_block_size": [128, 128]})
    model = load_model(folders / "tuned", torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.allclose(parameter, expected[name], rtol=2**-7, atol=1e-6), name
    with pytest.raises(InputError, match=r"quantised \(fp8\).*no --offload"):
        ModelPair.load(folders / "base", folders / "tuned", offload=True)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "of-tomorrow"])
def test_formats_that_cannot_be_made_plain_are_refused(folders, method):
    quantise(folders / "tuned", {"quant_method": method, "bits": 4})
    with pytest.raises(InputError, match=method):
        ModelPair.load(folders / "base", folders / "tuned")


def test_a_trainers_folder_names_the_model_in_it(folders):
    (folders / "runs").mkdir()
    shutil.copytree(folders / "tuned", folders / "runs" / "checkpoint-50")
    with pytest.raises(InputError, match=r"no config.json; .*checkpoint-50 has one"):
        ModelPair.load(folders / "base", folders / "runs")


def test_tokens_and_positions_that_models_lack_are_refused(tmp_path):
    folders = tiny.save_request(tmp_path, "gpt2")
    pair = ModelPair.load(folders / "base", folders / "tuned")
    long = [" ".join(f"w{5 + (i * k) % 50}" for i in range(200)) for k in (1, 3)]
    with pytest.raises(InputError, match=r"200 tokens.*--max-length 128"):
        pair.corpus(long)
    pair.corpus(long, max_length=128)
    pair.tokenizer.add_tokens(["new"])
    with pytest.raises(InputError, match=r"token 60 .*of 60 tokens"):
        pair.corpus(["w5 w6 new w7", "w8 w9 w10"])
    pair.tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # it is never read
    assert pair.corpus(["w5 w6 w7", "w8 w9 w10"]).pad_id == 0


def test_a_name_that_is_no_folder_is_said_to_be_a_hubs(folders, monkeypatch):
    """A relative path given in another folder looks like a name on the hub."""
    monkeypatch.chdir(folders)
    with pytest.raises(InputError, match="'models/base', which is no folder here"):
        ModelPair.load("base", "models/base")

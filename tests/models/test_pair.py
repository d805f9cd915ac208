"""Pairs: what is shared, what is refused and why, for models in memory, folders and adapters."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.support import tiny
from tests.support.properties import restores
from tests.support.recorders import install_recorders
from toolkit import InputError, ModelPair, Options, diagnose
from toolkit.models.loading import fingerprint

IDS = torch.tensor([[5, 6, 7, 8, 9]])
MLP = ["gate_proj", "up_proj", "down_proj"]


def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A base, a tuned model and a LoRA of the base, as a user has them on disk."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.make_model("llama", torch.float32)
    save(base, root / "base", tokenizer)
    save(tiny.tune(base), root / "tuned", tokenizer)
    save_adapter(root, root / "lora")
    return root


def save_adapter(root, folder, family="llama", **options):
    """A LoRA whose factors are random, with base's folder as its base."""
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", *MLP], **options}
    model = tiny.make_model(family, torch.float32)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(4)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    tuned.peft_config["default"].base_model_name_or_path = str(root / "base")
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture
def lora(folders, tmp_path):
    """A copy of the LoRA that a test may spoil."""
    return save_adapter(folders, tmp_path / "lora")


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# --- two models


def test_two_folders_are_a_pair(folders):
    """In float32, evaluation mode, without gradients; every identity was proved."""
    pair = ModelPair.load(folders / "base", folders / "tuned")
    assert pair.dtype == torch.float32
    assert (pair.base_name, pair.tuned_name) == (str(folders / "base"), str(folders / "tuned"))
    assert {check.status for check in pair.checks} == {"passed"}
    assert not pair.unavailable
    for model, source in ((pair.base, "base"), (pair.tuned, "tuned")):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        expected = load_file(folders / source / "model.safetensors")
        assert all(torch.equal(model.state_dict()[name], t) for name, t in expected.items())


def test_the_precision_can_be_chosen(folders):
    assert ModelPair.load(folders / "base", folders / "tuned", "float64").dtype == torch.float64
    assert ModelPair.load(folders / "base", folders / "tuned", "auto").dtype == torch.float32


def test_making_a_pair_changes_neither_model(tokenizer):
    base = tiny.make_model("gemma3")
    tuned = tiny.tune(base)
    for model in (base, tuned):
        install_recorders(model)
    with restores(base), restores(tuned):
        ModelPair.from_models(base, tuned, tokenizer)


def other_llama(**changes):
    config = tiny.FAMILIES["llama"]()
    for name, value in changes.items():
        setattr(config, name, value)
    return type(tiny.make_model("llama"))(config).double().eval()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "differ in num_hidden_layers: base 3, tuned 2; give two models"),
        ({"hidden_size": 32}, "differ in hidden_size: base 16, tuned 32"),
        ({"intermediate_size": 44}, "differ in intermediate_size: base 40, tuned 44"),
        ({"vocab_size": 61}, "differ in vocab_size: base 60, tuned 61; .* ModelPair.load"),
        ({"num_key_value_heads": 4}, "differ in num_key_value_heads: base 2, tuned 4"),
        ({"mlp_bias": True}, r"differ at .*bias: base None, tuned \(40,\)"),
    ],
)
def test_models_of_different_shape_are_refused(tokenizer, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        ModelPair.from_models(tiny.make_model("llama"), other_llama(**changes), tokenizer)
    assert "\n" not in str(caught.value)


def test_models_of_different_families_are_refused(tokenizer):
    pair = tiny.make_model("llama"), tiny.make_model("qwen3")
    with pytest.raises(InputError, match=r"differ in model_type: base llama, tuned qwen3"):
        ModelPair.from_models(*pair, tokenizer)


def test_different_shapes_are_refused_before_weights_are_read(folders, tmp_path):
    save(other_llama(num_hidden_layers=2), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="num_hidden_layers"):
        ModelPair.load(folders / "base", tmp_path)


def test_the_first_differing_token_is_named(folders, tmp_path):
    """Another word at 41, and all words after it."""
    tokenizer = tiny.make_tokenizer()
    save(tiny.make_model("llama", torch.float32), tmp_path, tokenizer)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"w41"', '"new"'))
    with pytest.raises(InputError, match=r"differ at token 41: base has 'w41', tuned has 'new'"):
        ModelPair.load(folders / "base", tmp_path)


def test_a_tuned_model_without_tokenizer_uses_the_bases(folders, tmp_path):
    save(tiny.tune(tiny.make_model("llama", torch.float32)), tmp_path)
    pair = ModelPair.load(folders / "base", tmp_path)
    assert pair.tokenizer.get_vocab() == tiny.make_tokenizer().get_vocab()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_pickled_weights_are_refused(folders, tmp_path, name):
    save(tiny.make_model("llama", torch.float32), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / name)
    with pytest.raises(InputError, match=rf"pickled weights .{name}.*convert them to safetensors"):
        ModelPair.load(folders / "base", tmp_path)


def test_a_missing_model_is_refused(folders, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        ModelPair.load(folders / "base", tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no such GGUF file"):
        ModelPair.load(tmp_path / "nowhere.gguf", folders / "tuned")
    (tmp_path / "notes.txt").write_text("?")
    with pytest.raises(InputError, match=r"neither a model folder nor a .gguf file"):
        ModelPair.load(folders / "base", tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "SmolLM2-135M", "Gemma-3-270M"])
def test_a_packaged_name_that_is_nearly_right_is_refused_without_asking_the_hub(folders, name):
    known = {"s": "SmolLM2-135M-Instruct", "g": "gemma-3-270m"}[name[0].lower()]
    with pytest.raises(InputError, match=f"is {known} meant"):
        ModelPair.load(name, folders / "tuned")


# --- a PEFT adapter as the tuned half


def plain_base(folders):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folders / "base").eval()


def assert_base_is_untouched(pair, folders):
    """Base's own logits are the plain model's, to the bit; so are tuned's with the adapter off."""
    expected = plain_base(folders)(IDS).logits
    assert torch.equal(pair.base(IDS).logits, expected)
    assert not torch.equal(pair.tuned(IDS).logits, expected)
    with pair.tuned.disable_adapter():
        assert torch.equal(pair.tuned(IDS).logits, expected)
    assert torch.equal(pair.base(IDS).logits, expected)


def test_an_adapter_shares_the_bases_weights(folders):
    """One copy of every tensor; base without, tuned with the adapter; off equals base."""
    pair = ModelPair.load(folders / "base", folders / "lora")
    assert {check.status for check in pair.checks} == {"passed"}
    tuned = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in pair.tuned.get_base_model().named_parameters()
        if "lora_" not in name
    }
    for name, tensor in pair.base.named_parameters():
        assert tuned[name].data_ptr() == tensor.data_ptr()
    assert not any("lora" in name for name, _ in pair.base.named_modules())
    assert_base_is_untouched(pair, folders)


def test_an_adapter_is_its_merged_model(folders, tmp_path, tokenizer):
    """All tables of base and adapter are those of base and the model with the adapter merged in."""
    pair = ModelPair.load(folders / "base", folders / "lora", "float64")
    whole = PeftModel.from_pretrained(plain_base(folders).double(), folders / "lora")
    merged = ModelPair.from_models(
        plain_base(folders).double(), whole.merge_and_unload().double(), tokenizer
    )
    runs = [
        diagnose(p, tiny.make_documents(24), Options(new_tokens=3, sample=2), show_progress=False)
        for p in (pair, merged)
    ]
    for ours, theirs in zip(*(run.tables.values() for run in runs), strict=True):
        if ours.name in ("task", "elsewhere", "cross_fitted"):  # which nobody asked for
            assert ours.frame.empty
            continue
        numbers = ours.frame.select_dtypes("number")
        if ours.name == "weights":  # rounding fills the merged change's rank
            numbers = numbers.drop(columns="rank")
        assert len(numbers)
        expected = theirs.frame[list(numbers)]
        torch.testing.assert_close(
            torch.tensor(numbers.to_numpy(float)),
            torch.tensor(expected.to_numpy(float)),
            rtol=1e-4,
            atol=1e-5,
            equal_nan=True,
        )


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [1]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_kinds_of_adapters_leave_the_base_alone(folders, tmp_path, options):
    pair = ModelPair.load(folders / "base", save_adapter(folders, tmp_path, **options))
    assert_base_is_untouched(pair, folders)


def test_an_adapter_that_trains_biases_leaves_the_base_alone(tmp_path, tokenizer):
    """Its biases are its own: they must not be written into the tensors that base shares."""
    base = tiny.make_model("gpt2", torch.float32)
    save(base, tmp_path / "base", tokenizer)
    save_adapter(tmp_path, tmp_path / "lora", "gpt2", target_modules=["c_fc"], bias="all",
                 fan_in_fan_out=True)  # fmt: skip
    pair = ModelPair.load(tmp_path / "base", tmp_path / "lora")
    assert pair.hashes[0] == fingerprint(sorted(base.state_dict().items()))
    assert torch.equal(pair.base(IDS).logits, base(IDS).logits)


def test_an_adapter_that_starts_from_the_weights_leaves_the_base_alone(folders, tmp_path):
    """PiSSA takes its first factors out of the base's weight: not out of the shared one."""
    folder = save_adapter(folders, tmp_path, init_lora_weights="pissa")
    pair = ModelPair.load(folders / "base", folder)
    assert torch.equal(pair.base(IDS).logits, plain_base(folders)(IDS).logits)


def test_an_adapter_of_another_base_is_refused(folders, lora):
    path = lora / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "someone/other-model"}))
    with pytest.raises(
        InputError, match=r"another base: it names 'someone/other-model'.*under that name"
    ):
        ModelPair.load(folders / "base", lora)
    path.write_text(json.dumps(config | {"base_model_name_or_path": "moved/to/base"}))
    ModelPair.load(folders / "base", lora)


def test_an_adapter_of_another_shape_is_refused(folders, lora):
    def widen(tensors):
        for name in tensors:
            if "lora_A" in name:
                tensors[name] = torch.zeros(tensors[name].shape[0], tensors[name].shape[1] + 2)

    change_tensors(lora, widen)
    with pytest.raises(InputError, match="does not fit the base model"):
        ModelPair.load(folders / "base", lora)


@pytest.mark.parametrize("spoil", ["missing", "extra"])
def test_an_adapter_with_missing_or_extra_tensors_is_refused_by_name(folders, lora, spoil):
    def change(tensors):
        first = min(tensors)
        tensor = tensors.pop(first) if spoil == "missing" else tensors[first]
        if spoil == "extra":
            tensors[first.replace("layers.0", "layers.7")] = tensor.clone()

    change_tensors(lora, change)
    with pytest.raises(InputError, match=r"tensor 'base_model.*lora_A.* is on one side only"):
        ModelPair.load(folders / "base", lora)


def test_a_pickled_adapter_is_refused(folders, lora):
    (lora / "adapter_model.safetensors").unlink()
    torch.save({}, lora / "adapter_model.bin")
    with pytest.raises(InputError, match=r"save the adapter as safetensors .*pickled"):
        ModelPair.load(folders / "base", lora)

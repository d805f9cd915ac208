"""Low-rank changes of weights: attached and put back, counted, and saved as PEFT reads them."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.support import tiny
from tests.support.properties import restores
from toolkit import InputError, ModelPair
from toolkit.adapters.weight_change import WeightChange, changed
from toolkit.blocks.read import is_linear, is_transposed
from toolkit.models.locations import resolve

FAMILIES = ("llama", "gpt2")
PATHS = {"llama": "model.layers", "gpt2": "transformer.h"}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


def random_change(model, family, dtype=torch.float64, seed=0):
    """Ranks 0 to 3 in turn over all modules."""
    generator = torch.Generator().manual_seed(seed)
    by_module = {}
    for layer, block in enumerate(tiny.blocks_of(model)):
        for name, module in block.named_modules():
            if is_linear(module):
                rank, (rows, columns) = len(by_module) % 4, module.weight.shape
                if is_transposed(module):
                    rows, columns = columns, rows
                shapes = (rows, rank), (rank, columns)
                by_module[layer, name] = tuple(
                    0.2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
                    for shape in shapes
                )
    blocks = tuple(f"{PATHS[family]}.{layer}" for layer in range(tiny.N_LAYERS))
    return WeightChange(by_module, "plain", "1.5", blocks, "base", family == "gpt2")


def by_hand(model, change):
    """A copy of `model` with the change in its weights."""
    twin = tiny.copy_of(model)
    for (layer, name), (up, down) in change.by_module.items():
        module = tiny.blocks_of(twin)[layer].get_submodule(name)
        delta = up @ down
        module.weight.data += (delta.T if is_transposed(module) else delta).to(module.weight.dtype)
    return twin


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_is_in_the_weights_as_long_as_its_context(family):
    model = tiny.make_model(family)
    change = random_change(model, family)
    plain, expected = model(IDS).logits, by_hand(model, change)(IDS).logits
    twice = by_hand(by_hand(model, change), change)(IDS).logits
    before = dict(model.named_parameters())
    with restores(model):
        with changed(model, change):
            torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-10)
            assert not torch.allclose(expected, plain, atol=1e-2)
        with changed(model, change, resolve(model)), changed(model, change):
            torch.testing.assert_close(model(IDS).logits, twice, rtol=0, atol=1e-10)
    assert torch.equal(model(IDS).logits, plain)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_come_back_even_after_an_error(dtype):
    model = tiny.make_model("llama", dtype)
    change = random_change(model, "llama", torch.float32)

    def fail():
        with changed(model, change):
            assert {p.dtype for p in model.parameters()} == {dtype}
            raise RuntimeError("inside")

    with restores(model), pytest.raises(RuntimeError, match="inside"):
        fail()


def test_what_shares_a_tensor_is_left_alone():
    """A tuned model that is a LoRA on the base's own tensors, and a matrix tied to another."""
    model = tiny.make_model("llama")
    shared = {id(p): p for p in (*model.parameters(), *model.buffers())}
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    tuned = get_peft_model(copy.deepcopy(model, shared), lora).eval()
    blocks = tiny.blocks_of(model)
    blocks[1].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    up, down = torch.ones(tiny.D_FF, 1).double(), torch.ones(1, tiny.D_MODEL).double()
    change = WeightChange({(0, "mlp.up_proj"): (up, down)}, "plain", 1)
    plain, tied = tuned(IDS).logits, blocks[1].mlp.up_proj.weight.clone()
    with changed(model, change):
        assert torch.equal(tuned(IDS).logits, plain)
        assert torch.equal(blocks[1].mlp.up_proj.weight, tied)
        assert not torch.equal(blocks[0].mlp.up_proj.weight, tied)
    assert blocks[0].mlp.up_proj.weight is blocks[1].mlp.up_proj.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_change_is_a_lora_of_the_same_logits(family, tmp_path):
    model = tiny.make_model(family)
    change = random_change(model, family)
    change.save_pretrained(tmp_path / "lora")
    with changed(model, change):
        expected = model(IDS).logits
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == change.parameters
    assert change.parameters == sum(u.numel() + d.numel() for u, d in change.by_module.values())
    loaded = PeftModel.from_pretrained(tiny.copy_of(model), tmp_path / "lora")
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=0, atol=1e-10)
    scales = {m.scaling["default"] for m in loaded.modules() if hasattr(m, "lora_A")}
    assert scales == {1.0}


def test_a_pair_is_loaded_from_a_saved_change(tmp_path):
    tiny.save_pair(tmp_path)
    model = tiny.make_model("llama", torch.float32)
    change = random_change(model, "llama", torch.float32)
    change.save_pretrained(tmp_path / "lora")
    pair = ModelPair.load(tmp_path / "base", tmp_path / "lora")
    with changed(pair.base, change):
        torch.testing.assert_close(pair.tuned(IDS).logits, pair.base(IDS).logits)


def test_a_change_says_what_it_is():
    change = random_change(tiny.make_model("llama"), "llama")
    assert (change.kind, change.location, change.fit, change.rank) == ("lora", "", "plain", "1.5")


@pytest.mark.parametrize(
    ("place", "shapes", "message"),
    [
        ((9, "mlp.up_proj"), (tiny.D_FF, tiny.D_MODEL), "no 'mlp.up_proj' in a block 9"),
        ((0, "mlp.other"), (tiny.D_FF, tiny.D_MODEL), "no 'mlp.other' in a block 0"),
        ((0, "input_layernorm"), (1, 1), "is a LlamaRMSNorm, not a matrix"),
        ((0, "mlp.up_proj"), (tiny.D_MODEL, tiny.D_FF), "is 40 × 16, the change is 16 × 40"),
    ],
)
def test_a_change_of_another_model_is_refused(place, shapes, message):
    model = tiny.make_model("llama")
    fits = random_change(model, "llama").by_module
    wrong = torch.ones(shapes[0], 1), torch.ones(1, shapes[1])
    change = WeightChange({**fits, place: wrong}, "plain", 1)
    with restores(model), pytest.raises(InputError, match=message), changed(model, change):
        pass


def test_weights_that_come_from_disk_cannot_be_changed(tmp_path):
    tiny.save_pair(tmp_path)
    pair = ModelPair.load(tmp_path / "base", tmp_path / "tuned", offload=True)
    change = random_change(tiny.make_model("llama"), "llama")
    with pytest.raises(InputError, match="come from disk"), changed(pair.base, change):
        pass


def test_what_cannot_be_saved_is_refused(tmp_path):
    empty = torch.ones(tiny.D_FF, 0), torch.ones(0, tiny.D_MODEL)
    with pytest.raises(InputError, match="rank 0 everywhere"):
        WeightChange({(0, "mlp.up_proj"): empty}, "plain", "0").save_pretrained(tmp_path)
    full = torch.ones(tiny.D_FF, 1), torch.ones(1, tiny.D_MODEL)
    with pytest.raises(InputError, match="blocks' names"):
        WeightChange({(0, "mlp.up_proj"): full}, "plain", 1).save_pretrained(tmp_path)

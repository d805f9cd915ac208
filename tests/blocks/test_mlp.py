"""Every family's MLP as matrices: the same outputs, and what fine-tuning changed of them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.support import tiny
from tests.support.textbook import mlp_output
from toolkit.blocks.mlp import Change
from toolkit.blocks.read import mlps, module_change

DENSE = ["llama", "gemma2", "gemma3", "qwen3", "olmo2", "phi3", "gpt2", "neox", "opt", "falcon"]


def tokens(n=4, d=tiny.D_MODEL):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("family", DENSE)
def test_matrices_compute_what_the_module_computes(family):
    model = tiny.make_model(family)
    pairs = mlps(model, tiny.tune(model))
    for block, (mlp, _) in zip(tiny.blocks_of(model), pairs, strict=True):
        expected = torch.from_numpy(mlp_output(block, tokens().numpy()))
        assert torch.allclose(mlp(tokens()), expected, atol=1e-12)


@pytest.mark.parametrize("family", DENSE)
def test_a_change_is_the_difference_of_all_weights(family):
    """``x ↦ ΔW x + Δb`` for every projection, fused ones cut in two."""
    base = tiny.make_model(family)
    tuned = tiny.tune(base)
    for (ours, change), (theirs, _) in zip(mlps(base, tuned), mlps(tuned, tuned), strict=True):
        for name in ("gate", "down") if ours.up is None else ("gate", "up", "down"):
            dW = getattr(theirs, name) - getattr(ours, name)
            db = getattr(theirs, f"{name}_bias") - getattr(ours, f"{name}_bias")
            x = tokens(d=dW.shape[1])
            assert torch.allclose(getattr(change, name)(x), x @ dW.T + db, atol=1e-12)
        assert (change.up is None) == (ours.up is None)


def test_factors_are_their_product():
    """``ΔW = B A``, whole or cut into the gate's and the up's rows."""
    B, A, b = tokens(8, 2), tokens(2, 5), tokens(1, 8)[0]
    factored, whole, x = Change((B, A), b), Change((B @ A,), b), tokens(3, 5)
    assert torch.allclose(factored(x), whole(x))
    for ours, theirs in zip(factored.halves(), whole.halves(), strict=True):
        assert torch.allclose(ours(x), theirs(x))
        assert ours(x).shape == (3, 4)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_scaled_change_is_so_many_times_the_change(family):
    """Weights and biases, of factors too; without a gate's partner there is none still."""
    base = tiny.make_model(family)
    ((_, change), *_) = mlps(base, tiny.tune(base))
    scaled = change.scaled(-2.5)
    assert (scaled.up is None) == (family == "gpt2")
    for name, part in vars(change).items():
        if part is not None:
            x = tokens(d=part.factors[-1].shape[1])
            assert torch.allclose(getattr(scaled, name)(x), -2.5 * part(x), atol=1e-12)
    factored = Change((tokens(8, 2), tokens(2, 5)), tokens(1, 8)[0])
    assert torch.allclose(factored.scaled(3.0)(tokens(3, 5)), 3 * factored(tokens(3, 5)))
    assert [f.shape for f in factored.scaled(3.0).factors] == [(8, 2), (2, 5)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_another_precision_is_of_all_tensors(family):
    """float64 weights rounded to float32 and nothing else changed."""
    base = tiny.make_model(family)
    ((mlp, change), *_) = mlps(base, tiny.tune(base))
    single, difference = mlp.to(torch.float32), change.to(torch.float32)
    assert {v.dtype for v in vars(single).values() if isinstance(v, torch.Tensor)} == {
        torch.float32
    }
    assert torch.equal(single.down, mlp.down.float())
    assert torch.allclose(single(tokens().float()).double(), mlp(tokens()), atol=1e-4)
    for part in vars(difference).values():
        if part is not None:
            assert {part.bias.dtype, *(f.dtype for f in part.factors)} == {torch.float32}
    assert torch.equal(difference.down.factors[0], change.down.factors[0].float())


def lora_of(base, **options):
    """A LoRA with random factors on gate and down projections of a copy of `base`."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["gate_proj", "down_proj"], **options)
    wrapped = get_peft_model(base, config).double()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter)
    return wrapped.eval().requires_grad_(False)


@pytest.mark.parametrize("options", [{"lora_alpha": 7}, {"use_rslora": True}, {"use_dora": True}])
def test_a_loras_change_is_that_of_the_merged_module(options):
    """Factors of rank 3 where it is plain, whole matrices for DoRA; unchanged modules give 0."""
    wrapped = lora_of(tiny.make_model("llama"), **options)
    block = wrapped.get_base_model().model.layers[1].mlp
    base = tiny.blocks_of(tiny.make_model("llama"))[1].mlp
    for name in ("gate_proj", "down_proj", "up_proj"):
        theirs = getattr(block, name)
        plain = theirs.get_base_layer() if hasattr(theirs, "get_base_layer") else theirs
        change = module_change(plain, theirs)
        x = tokens(d=plain.weight.shape[1])
        expected = theirs(x) - getattr(base, name)(x)
        assert torch.allclose(change(x), expected, atol=1e-10)
        factored = name != "up_proj" and "use_dora" not in options
        assert len(change.factors) == (2 if factored else 1)
        assert not factored or len(change.factors[1]) == 3


def test_experts_are_no_dense_mlp():
    model = tiny.make_model("mixtral", torch.float32)
    with pytest.raises(ValueError, match=r".{20}"):
        mlps(model, model)

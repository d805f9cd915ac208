"""The path from the attention branch through the MLP, in families that have one."""

import functools

import numpy as np
import pytest
import torch

from tests.support import textbook, tiny
from toolkit.blocks.read import mlps, read_sublayers
from toolkit.documents.batches import make_batches
from toolkit.documents.tokens import encode_all
from toolkit.models.locations import resolve
from toolkit.models.runner import BlockRunner

FAMILIES = ["llama", "gemma2", "gemma3", "qwen3", "olmo2", "phi3", "gpt2"]
LAYER, N_HEADS = 1, 4
ROUNDING = 2e-5  # most families' norms compute in float32, whatever the model is in


def read(family, dtype=torch.float64):
    """A model's blocks, and what `read_sublayers` makes of them."""
    model = tiny.make_model(family, dtype)
    batch = make_batches(encode_all(tiny.make_documents(6), tiny.make_tokenizer()))[0]
    matrices = [mlp for mlp, _ in mlps(model, model)]
    found = read_sublayers(BlockRunner(model, resolve(model)), matrices, batch)
    return tiny.blocks_of(model), found, model


@functools.cache
def case(family):
    """One block, its tail and heads, and what a document's tokens are in it."""
    blocks, found, model = read(family)
    seen = textbook.run(model, list(range(5, 18)))
    states = {name: seen.states[name, LAYER][1:] for name in ("post_block", "post_mlp", "heads")}
    return blocks[LAYER], *found[LAYER], states


def of_stream(states):
    """The residual stream behind the first skip: the block's output less the MLP's share."""
    return torch.from_numpy(states["post_block"] - states["post_mlp"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tail_reproduces_the_blocks_output(family):
    _, sublayer, _, states = case(family)
    x, relative = of_stream(states), 1e-6
    for ours, name in ((sublayer(x), "post_block"), (sublayer.branch(x), "post_mlp")):
        expected = torch.from_numpy(states[name])
        assert (ours - expected).norm() < relative * expected.norm()
    branch = sublayer.to(torch.float32).branch(x.float())
    assert branch.dtype == torch.float32
    assert (branch - sublayer.branch(x)).norm() < 1e-5 * branch.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_jacobians_are_autograds_through_the_blocks_own_modules(family):
    """To the block and to the branch, which is the same less the identity."""
    block, sublayer, _, states = case(family)
    x = of_stream(states)
    expected = textbook.per_token_jacobian(lambda t: textbook.sublayer(block, t), x.numpy())
    scale = np.abs(expected).max()
    to_block, to_branch = sublayer.to_block(x), sublayer.to_branch(x)
    np.testing.assert_allclose(to_block.dense(), expected, rtol=0, atol=ROUNDING * scale)
    branch = expected - np.eye(tiny.D_MODEL)
    np.testing.assert_allclose(to_branch.dense(), branch, rtol=0, atol=ROUNDING * scale)
    v = torch.randn(*x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    for product, J in ((to_block.push, expected), (to_block.pull, expected.swapaxes(1, 2))):
        theirs = np.einsum("noi,ni->no", J, v.numpy())
        np.testing.assert_allclose(product(v), theirs, rtol=0, atol=10 * ROUNDING * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_directions_span_what_the_heads_z_does_to_the_stream(family):
    """Orthonormal, and projecting onto them is projecting onto ∂(post(W_o z + b))/∂z of a head."""
    block, _, heads, states = case(family)
    z = states["heads"]
    bases = heads.directions(torch.from_numpy(z)).numpy()
    head_dim = z.shape[1] // N_HEADS
    assert bases.shape == (len(z), N_HEADS, tiny.D_MODEL, head_dim)
    gram = np.einsum("nhdi,nhdj->nhij", bases, bases)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(head_dim), gram.shape), atol=1e-10)
    derivative = textbook.per_token_jacobian(lambda t: textbook.heads_output(block, t), z)
    for head in range(N_HEADS):
        moved = derivative[:, :, head * head_dim : (head + 1) * head_dim]
        for basis, J in zip(bases[:, head], moved, strict=True):
            spanned = np.linalg.svd(J, full_matrices=False)[0]
            np.testing.assert_allclose(basis @ basis.T, spanned @ spanned.T, atol=1e-3)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "llama"])
def test_a_small_change_of_a_heads_z_moves_the_stream_along_its_directions(family):
    """Finite differences; another head's directions do not hold the change."""
    block, _, heads, states = case(family)
    z, step = torch.from_numpy(states["heads"]), 1e-2
    bases, head_dim = heads.directions(z), z.shape[1] // N_HEADS
    for head in range(N_HEADS):
        v = torch.zeros_like(z)
        at = slice(head * head_dim, (head + 1) * head_dim)
        v[:, at] = torch.randn(len(z), head_dim, generator=torch.Generator().manual_seed(head))
        ends = [textbook.heads_output(block, z + sign * step * v) for sign in (1, -1)]
        moved = ends[0] - ends[1]
        for other in range(N_HEADS):
            along = (moved[:, None] @ bases[:, other] @ bases[:, other].mT)[:, 0]
            left = (moved - along).norm() / moved.norm()
            assert left < 1e-3 if other == head else left > 0.1


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "olmo2"])
def test_norms_annihilate_the_direction_that_they_norm(family):
    """The radial gain is below 10⁻⁵ of that of other directions; a LayerNorm drops the mean too."""
    _, sublayer, _, states = case(family)
    x = 30 * of_stream(states)  # so that the norms' ε is nothing beside it
    J = sublayer.to_block(x).dense() - torch.eye(tiny.D_MODEL)
    sizes = J.norm(dim=(1, 2))
    radial = x / x.norm(dim=1, keepdim=True)
    assert ((J @ radial[..., None])[..., 0].norm(dim=1) < 1e-5 * sizes).all()
    mean = torch.full_like(x, tiny.D_MODEL**-0.5)
    along_mean = (J @ mean[..., None])[..., 0].norm(dim=1) / sizes
    assert (along_mean < 1e-5).all() if family == "gpt2" else (along_mean > 1e-2).all()


@pytest.mark.parametrize("family", ["neox", "falcon", "opt"])
def test_a_family_without_a_path_says_why(family):
    """The reason is interp-engine's: it names the model and what is undefined there."""
    model = tiny.make_model(family)
    sites = resolve(model)
    with pytest.raises(ValueError, match="ForCausalLM") as error:
        read(family)
    assert str(error.value) == sites.unavailable["resid_mid"]
    assert ("parallel" in str(error.value)) == (family != "opt")


def test_what_was_read_must_reproduce_the_model():
    """Granite scales its branches before adding them, which no module shows."""
    with pytest.raises(ValueError, match=r"block 0 is not .* as read .*relative difference"):
        read("granite")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_are_read_too(dtype):
    """bfloat16's rounding is no reason to refuse."""
    _, found, _ = read("gemma3", dtype)
    assert len(found) == tiny.N_LAYERS
    assert found[0][0].mlp.down.dtype == dtype


def test_granite_is_refused_in_bfloat16():
    """Half of a branch missing is far above bfloat16's rounding."""
    with pytest.raises(ValueError, match="as read"):
        read("granite", torch.bfloat16)


def test_reading_leaves_the_model_alone():
    """`to` copies: the model's own norms stay in their precision."""
    blocks, found, _ = read("gemma3")
    sublayer, heads = found[LAYER]
    sublayer.to(torch.float32)
    heads.directions(torch.randn(2, heads.weight.shape[1]))
    assert {p.dtype for p in blocks.parameters()} == {torch.float64}

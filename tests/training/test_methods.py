"""Every way to adapt a model: nothing at first, the base whole behind it, and it learns."""

import pytest
import torch

from tests.support import tiny
from tests.support.properties import restores
from tests.support.rows import make_rows
from toolkit import InputError
from toolkit.adapters.collection import Adapters
from toolkit.adapters.gated_heads import GatedHeads
from toolkit.adapters.kinds import KINDS
from toolkit.adapters.linear import Linear
from toolkit.models.locations import resolve
from toolkit.training.lora_overlap import Overlap
from toolkit.training.methods import Method, adapted
from toolkit.training.trainer import TrainingOptions, response_loss, train

RANK, D, LAYERS, HEADS = 2, tiny.D_MODEL, tiny.N_LAYERS, 4
LINEAR_MODULES = (  # a llama block's, [out, in]
    (D, D), (D // 2, D), (D // 2, D), (D, D), (tiny.D_FF, D), (tiny.D_FF, D), (D, tiny.D_FF),
)  # fmt: skip
LORA = LAYERS * RANK * sum(map(sum, LINEAR_MODULES))
METHODS = {
    "sft": (Method("sft", "sft"), None),
    "lora": (Method("lora", "lora", rank=RANK), LORA),
    "joint": (Method("joint", "joint", "post_block", RANK), LORA + LAYERS * 2 * RANK * D),
    "vector": (Method("vector", "vector", "post_mlp"), LAYERS * D),
    "linear": (Method("linear", "linear", "pre_mlp", RANK), LAYERS * 2 * RANK * D),
    "full": (Method("full", "linear", "post_block", "full"), LAYERS * D * D),
    "loreft": (Method("loreft", "loreft", "post_block", RANK), LAYERS * (2 * RANK * D + RANK)),
    "nonlinear": (Method("nl", "nonlinear", "post_block", RANK), LAYERS * 2 * RANK * D),
    "head_vector": (Method("hv", "head_vector", "heads"), LAYERS * D),
    "head_affine": (Method("ha", "head_affine", "heads"), LAYERS * 2 * D),
    "gated_heads": (Method("gh", "gated_heads", "heads"), LAYERS * (2 * D + 2 * HEADS)),
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def base_model():
    return tiny.make_model("llama").float()


def test_every_kind_of_adapter_is_tried():
    assert set(KINDS) < {method.kind for method, _ in METHODS.values()}


@pytest.mark.parametrize("sites_given", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_starts_as_nothing_learns_and_leaves_the_base_whole(name, sites_given):
    method, n_parameters = METHODS[name]
    base, rows = base_model(), make_rows(8)
    sites = resolve(base) if sites_given else None
    plain = base(IDS).logits
    rate = {"sft": 2e-3, "lora": 1e-2, "steering": 2e-2}[method.family]
    options = TrainingOptions(rate, batch_size=8, max_steps=30, warmup=0.0)
    with restores(base), adapted(base, method, sites) as found:
        assert torch.allclose(found.model(IDS).logits, plain, atol=1e-5)
        assert found.parameters == (n_parameters or sum(p.numel() for p in base.parameters()))
        asking = [p for p in found.trainee.parameters() if p.requires_grad]
        assert sum(p.numel() for p in asking) == found.parameters
        before, start = response_loss(found.model, rows, 0), [p.clone() for p in asking]
        train(found.trainee, rows, options)
        assert response_loss(found.model, rows, 0) < before - 0.1
        if method.kind != "sft":  # a word that no row holds has no gradient in the embeddings
            assert not any(torch.equal(p, s) for p, s in zip(asking, start, strict=True))
        assert found.weights_changed == (method.family != "steering")
        assert (found.adapters is None) == (method.kind in ("sft", "lora"))
    assert torch.equal(base(IDS).logits, plain)


@pytest.mark.parametrize("kind", ["linear", "gated_heads"])
def test_what_was_trained_is_the_same_from_disk(kind, tmp_path):
    """Also gates: in evaluation they are no longer drawn."""
    method, base, rows = METHODS[kind][0], base_model(), make_rows(8)
    with adapted(base, method) as found:
        train(found.trainee, rows, TrainingOptions(2e-2, batch_size=8, max_steps=5))
        expected = found.model(IDS).logits
        found.adapters.save_pretrained(tmp_path)
    start, untrained = (
        Adapters.from_pretrained(tmp_path),
        Method("kept", kind, method.location, trained=False),
    )
    for again in (method, untrained):
        with restores(base), adapted(base, again, start=start) as found:
            assert torch.equal(found.model(IDS).logits, expected)
            assert (found.trainee is None) == (again is untrained)


def test_a_start_serves_several_trainings():
    """The second rate begins where the first began, not where it ended."""
    base, rows = base_model(), make_rows(8)
    adapter = lambda: Linear(0.1 * torch.randn(D, 2), torch.randn(2, D), torch.zeros(D))  # noqa: E731
    start = Adapters("post_block", {layer: adapter() for layer in range(LAYERS)}, "forced")
    losses = []
    for _ in range(2):
        with adapted(base, METHODS["linear"][0], start=start) as found:
            losses.append(response_loss(found.model, rows, 0))
            train(found.trainee, rows, TrainingOptions(2e-2, batch_size=8, max_steps=5))
            assert response_loss(found.model, rows, 0) != losses[-1]
    assert losses[0] == losses[1]


def test_seeds_draw_other_starts_and_one_seed_the_same():
    base, method = base_model(), METHODS["linear"][0]
    drawn = []
    for seed in (0, 0, 1):
        with adapted(base, method, seed=seed) as found:
            drawn.append(found.adapters.by_layer[0].down.clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_nothing_is_the_base():
    base = base_model()
    with restores(base), adapted(base, Method("base", "none")) as found:
        assert found.model is base
        assert (found.trainee, found.adapters, found.parameters) == (None, None, 0)


def test_unknown_kinds_and_positions_are_refused():
    base = base_model()
    with (
        pytest.raises(InputError, match="'magic': expected one of vector, linear"),
        adapted(base, Method("?", "magic", "post_block")),
    ):
        pass
    wrong = Method("?", "vector", "post_block", positions="some")
    with pytest.raises(InputError, match="positions is 'some'"), adapted(base, wrong):
        pass


def test_positions_say_which_tokens_are_steered():
    """Under ``last_prompt`` the logits before a prompt's last token are the base's."""
    base = base_model()
    plain = base(IDS).logits
    vectors = KINDS["vector"]
    method = Method("v", "vector", "post_block", positions="last_prompt", trained=False)
    with adapted(base, method) as found:
        assert isinstance(found.adapters.by_layer[0], vectors)
        for adapter in found.adapters.by_layer.values():
            adapter.bias += 1
        steered = found.model(IDS).logits
    assert torch.equal(steered[:, :-1], plain[:, :-1])
    assert not torch.allclose(steered[:, -1], plain[:, -1], atol=1e-2)


def test_gates_are_drawn_in_training_alone():
    gates = GatedHeads.identity(D, HEADS)
    assert torch.equal(gates.open_gates(), gates.open_gates())
    gates.train()
    assert not torch.equal(gates.open_gates(), gates.open_gates())


# --- joint


@pytest.mark.parametrize("sites_given", [False, True])
def test_both_halves_of_joint_steer(sites_given):
    """The adapters act on the copy that LoRA is in, and get gradients from the loss alone."""
    base, method = base_model(), METHODS["joint"][0]
    with adapted(base, method, resolve(base) if sites_given else None) as found:
        plain = found.model(IDS).logits
        for adapter in found.adapters.by_layer.values():
            adapter.up.data += 0.3
        assert not torch.allclose(found.model(IDS).logits, plain, atol=1e-2)
        found.model(IDS, labels=IDS).loss.backward()
        for module in (found.trainee.adapters, found.model):
            gradients = [p.grad for p in module.parameters() if p.requires_grad]
            assert all(g is not None for g in gradients)
            assert any(g.any() for g in gradients)
    assert torch.allclose(base(IDS).logits, plain, atol=1e-5)


def filled(found, up, factor):
    """Every adapter's `up` and every LoRA factor B, as the two matrices say."""
    for adapter in found.adapters.by_layer.values():
        adapter.up.data[:] = up
    for name, parameter in found.model.named_parameters():
        if "lora_B" in name and ("o_proj" in name or "down_proj" in name):
            parameter.data[:] = factor


def test_overlap_is_nothing_for_orthogonal_columns_and_one_for_parallel():
    Q = torch.linalg.qr(torch.randn(D, 4, generator=torch.Generator().manual_seed(0))).Q
    line = Q[:, :1].repeat(1, 2)
    with adapted(base_model(), METHODS["joint"][0]) as found:
        overlap = Overlap(found.model, found.adapters)
        assert float(overlap().detach()) == 0  # neither writes anything yet
        for up, factor, expected in (
            (3 * Q[:, :2], 0.1 * Q[:, 2:], 0.0),
            (3 * line, -0.1 * line, 1.0),
            (Q[:, :2], Q[:, :2], 0.5),  # of four pairs of columns two are the same
            (line, (Q[:, :2] + Q[:, 2:]) / 2**0.5, 0.25),
        ):
            filled(found, up, factor)
            assert float(overlap().detach()) == pytest.approx(expected, abs=1e-4)
        filled(found, line, line)  # both outputs of all blocks count: one of six undone
        with torch.no_grad():
            found.model.get_parameter(
                "base_model.model.model.layers.1.mlp.down_proj.lora_B.default.weight"
            ).zero_()
        assert float(overlap().detach()) == pytest.approx(5 / 6, abs=1e-4)


def test_the_penalty_keeps_what_the_two_write_apart():
    """Trained alike, with and without it."""
    base, rows, ends = base_model(), make_rows(8), {}
    for weight in (0.0, 10.0):
        method = Method("joint", "joint", "post_block", RANK, orthogonal=weight)
        with adapted(base, method, resolve(base), seed=1) as found:
            before = response_loss(found.model, rows, 0)
            train(found.trainee, rows, TrainingOptions(1e-2, batch_size=8, max_steps=40))
            assert response_loss(found.model, rows, 0) < before - 0.1
            ends[weight] = float(Overlap(found.model, found.adapters)().detach())
    assert ends[10.0] < 0.5 * ends[0.0]

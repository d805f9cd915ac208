"""Analyses on a pretended GPU give what they give on the CPU, and mix no devices."""

import pandas as pd
import pytest
import torch

from tests.support import tiny
from tests.support.pretended import GPU, pretended_gpu
from toolkit import ModelPair, Options, diagnose
from toolkit.analysis.linear_fit import fit_linear
from toolkit.analysis.reachability import reach
from toolkit.analysis.shared_map import Problem, fit_shared
from toolkit.analysis.spectrum import spectrum
from toolkit.analysis.weight_change import weight_row
from toolkit.blocks.jacobian import MLPJacobian
from toolkit.blocks.mlp import MLP, Change
from toolkit.fitting.closed_form import fit_adapters
from toolkit.fitting.spec import FitSpec
from toolkit.runtime import placement
from toolkit.statistics import MomentSums, Reservoir

PAIRS = [("x", "x"), ("t", "x"), ("t", "t")]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def gpu(request, monkeypatch):
    """A GPU that is fast in float64, or is not."""
    placement.decide_again()
    monkeypatch.setattr(placement, "is_fast", lambda device: request.param)
    with pretended_gpu():
        yield GPU if request.param else placement.CPU
    placement.decide_again()


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_devices_are_not_mixed():
    with pretended_gpu(), pytest.raises(RuntimeError, match="on one device"):
        draw(3).to(GPU) + draw(3)


def test_analyses_of_models_on_the_cpu_run_there():
    assert placement.analysis_device(torch.device("cpu")) == placement.CPU


def test_moments_and_fits(gpu):
    values = {"x": draw(40, 6), "t": draw(40, 5)}
    found = {}
    for device in (placement.CPU, GPU):
        sums = MomentSums(PAIRS)
        sums.update({name: value.to(device) for name, value in values.items()})
        moments = sums.result()
        fit = fit_linear(moments, "x", "t", max_rank=3)
        shape = spectrum(moments.second_moment("t"), moments.mean["t"], 1.0, moments.n)
        found[device] = (fit, shape)
    (ours, our_shape), (theirs, their_shape) = found[GPU], found[placement.CPU]
    assert ours.full.device == gpu
    for rank in (0, 2, "full"):
        assert torch.allclose(ours.matrix(rank).cpu(), theirs.matrix(rank), **CLOSE)
    assert our_shape.rms == pytest.approx(their_shape.rms, rel=1e-10)


def test_samples_are_where_analyses_run(gpu):
    sample = Reservoir(4)
    states, keys = draw(9, 3), torch.rand(9, dtype=torch.float64)
    sample.update({"h": states.to(GPU)}, keys.to(GPU))
    found = sample.result()["h"]
    assert found.device == gpu
    assert torch.equal(found.cpu(), states[keys.argsort()[:4]])


def test_reachability(gpu):
    maps, targets, radii = draw(2, 7, 5), draw(2, 1, 7), draw(2, 3).abs()
    theirs = reach(maps.__getitem__, targets, radii)
    there = maps.to(GPU)
    ours = reach(there.__getitem__, targets.to(GPU), radii.to(GPU))
    assert torch.allclose(ours.residual.cpu(), theirs.residual, atol=1e-8)
    assert torch.allclose(ours.steering.cpu(), theirs.steering, atol=1e-7)
    assert torch.equal(ours.rank.cpu(), theirs.rank)


def test_shared_maps(gpu):
    silu = torch.nn.functional.silu
    mlp = MLP(silu, draw(9, 5), draw(9), draw(5, 9), draw(5), draw(9, 5), draw(9))
    x, wanted = draw(30, 5), draw(30, 5)

    def fitted(device):
        there, h, v = mlp.to(torch.float64, device), x.to(device), wanted.to(device)
        sides = [
            Problem(MLPJacobian.at(there, h[part]), h[part], v[part])
            for part in (slice(20), slice(20, 30))
        ]
        return fit_shared(*sides, ranks=(0, 1, "full"))

    for rank, theirs in fitted(placement.CPU).items():
        assert torch.allclose(fitted(GPU)[rank](x.to(GPU)).cpu(), theirs(x), atol=1e-7)


def test_changes_of_weights(gpu):
    weight, delta, bias = draw(6, 4), draw(6, 4), draw(6)
    theirs = weight_row(weight, Change((delta,), bias))
    ours = weight_row(weight.to(GPU), Change((delta.to(GPU),), bias.to(GPU)))
    assert vars(ours) == pytest.approx(vars(theirs), rel=1e-10)


def test_a_march_with_sequential_fits(gpu, tokenizer):
    specs = [FitSpec.linear("post_block", 2, "sequential"), FitSpec.linear("pre_mlp", 2, "forced")]
    documents = tiny.make_documents(6)
    base = tiny.make_model("llama")
    tuned = tiny.tune(base)
    theirs = fit_adapters(ModelPair.from_models(base, tuned, tokenizer), documents, specs)
    pair = ModelPair.from_models(base.to(GPU), tuned.to(GPU), tokenizer)
    for spec, ours in fit_adapters(pair, documents, specs).items():
        for layer, adapter in ours.by_layer.items():
            expected = theirs[spec].by_layer[layer]
            product = adapter.up.detach().cpu() @ adapter.down.detach().cpu()
            assert torch.allclose(product, expected.up.cpu() @ expected.down.cpu(), atol=1e-7)


@pytest.mark.parametrize("gpu", [True], indirect=True)
def test_a_whole_diagnosis(gpu, tokenizer):
    """March, analyses, generation, replacement and close look: every table is the CPU's.

    Of a family whose norms and activations add no number: of such a sum, torch's rules of forward
    derivatives make tensors that the pretended device cannot hold.
    """
    documents = tiny.make_documents(36)
    options = Options(new_tokens=3, sample=1, shared_sample=12, max_prompts=3)
    base = tiny.make_model("opt")
    tuned = tiny.tune(base)
    found = {}
    for device in (placement.CPU, GPU):
        pair = ModelPair.from_models(base.to(device), tuned.to(device), tokenizer)
        found[device] = diagnose(pair, documents, options, show_progress=False).tables
    of_numbers = "parameters_percent"  # embeddings that are tied do not stay so on the way there
    for name, table in found[placement.CPU].items():
        ours, theirs = (
            frame.drop(columns=of_numbers, errors="ignore")
            for frame in (found[GPU][name].frame, table.frame)
        )
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-5, atol=1e-6, obj=name)

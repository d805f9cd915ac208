"""Kind × format, cell by cell: exact, approximate with its KL, or refused and why.

What each format's consumer makes of an exported folder is compared with our own steering.
"""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support import tiny
from tests.support.kinds import CASES, randomised
from tests.support.steered import batch_of, steered_logits
from tests.support.steering import PROMPTS, generate
from toolkit import InputError
from toolkit.adapters.attach import steer
from toolkit.adapters.positions import Positions
from toolkit.export import FORMATS, Base, export

FAMILIES = ("llama", "gemma3", "gpt2")
NO_MAP = "a nonlinear adapter is no affine map"
STREAM = "reads the residual stream, which no one matrix writes"
NORM = "a norm or a scale stands between it and"
NO_BIAS = "this family's configuration gives their matrices no bias"


def in_weights(family, kind, location):
    """Why a change of weights cannot do it; empty where it can."""
    if kind == "nonlinear":
        return NO_MAP
    if location == "post_block" and kind != "vector":
        return STREAM
    return NORM if family == "gemma3" and location != "heads" else ""


def kept_weights(family, kind, location):
    """The same of a plain model: Llama and GPT-2 keep every bias, Gemma attention's."""
    return in_weights(family, kind, location)


def everything(family, kind, location):
    return ""


REFUSED = {"peft": in_weights, "weights": kept_weights, "folder": everything}
TABLE = [
    (family, form, kind, location)
    for family in FAMILIES
    for form in REFUSED
    for kind, location in CASES
]
HELD = [cell for cell in TABLE if not REFUSED[cell[1]](cell[0], *cell[2:])]
NOT_HELD = [cell for cell in TABLE if cell not in HELD]


@pytest.fixture(scope="module")
def bases():
    tokenizer = tiny.make_tokenizer()
    return {name: Base(tiny.make_model(name), tokenizer, "base") for name in FAMILIES}


def loaded(form, base, folder):
    """What the format's consumer makes of a folder, in float64."""
    if form == "peft":
        twin = tiny.copy_of(base.model)
        return PeftModel.from_pretrained(twin, folder, low_cpu_mem_usage=True)
    trust = form == "folder"
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, trust_remote_code=trust
    )


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(("family", "form", "kind", "location"), HELD)
def test_the_consumer_does_what_the_held_adapters_do(
    bases, family, form, kind, location, tmp_path
):
    """Logits at every token of a padded batch, and the same tokens in generation."""
    base = bases[family]
    adapters = randomised(base.model, kind, location, "every")
    record = export(adapters, form, tmp_path / f"{family}-{form}", base)
    assert record["fidelity"] == "exact"
    assert record == json.loads((tmp_path / f"{family}-{form}" / "export.json").read_text())
    model = loaded(form, base, tmp_path / f"{family}-{form}")
    tokens = batch_of()["attention_mask"].bool()
    expected = steered_logits(base.model, adapters)[tokens]
    bare = base.model(**batch_of()).logits[tokens]
    assert not torch.allclose(expected, bare, atol=1e-3)
    found = model(**batch_of()).logits[tokens]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    with steer(base.model, adapters):
        said = generate(base.model)
    assert torch.equal(generate(model), said)


@pytest.mark.parametrize(("family", "form", "kind", "location"), NOT_HELD)
def test_what_a_format_cannot_hold_is_refused(bases, family, form, kind, location, tmp_path):
    """Even where an approximation is asked for, and nothing is written."""
    base = bases[family]
    adapters = randomised(base.model, kind, location, "all")
    reason = REFUSED[form](family, kind, location)
    with pytest.raises(InputError, match=f"{form} cannot hold these adapters: .*{reason}"):
        export(adapters, form, tmp_path / "out", base, approximate=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("form", "kind", "location"), sorted({cell[1:] for cell in HELD if cell[1] != "folder"})
)
def test_all_but_the_first_token_is_an_approximation_in_weights(
    bases, form, kind, location, tmp_path
):
    """Refused unless it is asked for; then the KL is that of steering the first token too."""
    base = bases["llama"]
    adapters = randomised(base.model, kind, location, "all")
    with pytest.raises(InputError, match="also steers each sequence's first token"):
        export(adapters, form, tmp_path / "out", base)
    found = export(adapters, form, tmp_path / "out", base, PROMPTS[:1], approximate=True)
    assert found["fidelity"] == "approximate"
    assert (found["adapters"]["positions"], found["exported"]["positions"]) == ("all", "every")
    by_hand = nats(base.model, adapters, Positions.parse("every"), PROMPTS[0], 32)
    assert found["loss"]["kl"] == pytest.approx(by_hand, rel=1e-6)
    assert found["loss"]["kl"] > 0


def nats(model, adapters, positions, prompt, n_new):
    """KL(ours ‖ at other positions) a token, along our own greedy tokens, in whole passes."""
    ids = list(prompt)
    with steer(model, adapters):
        for _ in range(n_new):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tiny.EOS:
                break
        ours = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    other = type(adapters)(
        adapters.location, adapters.by_layer, adapters.fit, adapters.info, positions
    )
    with steer(model, other):
        theirs = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())

"""Kind × format, cell by cell: exact, approximate with its KL, or refused and why.

What each format's consumer makes of an exported folder is compared with our own steering.
"""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support import tiny
from tests.support.commands import oracle
from tests.support.kinds import CASES, randomised
from tests.support.steered import batch_of, steered_logits
from tests.support.steering import PROMPTS, generate
from toolkit import Adapters, InputError
from toolkit.adapters.attach import steer
from toolkit.export import FORMATS, Base, export

FAMILIES = ("llama", "gemma3", "gpt2")
NO_MAP = "a nonlinear adapter is no affine map"
STREAM = "reads the residual stream, which no one matrix writes"
NORM = "a norm or a scale stands between it and"


def in_weights(family, kind, location):
    """Why a change of weights cannot do it; empty where it can."""
    if kind == "nonlinear":
        return NO_MAP
    if location == "post_block" and kind != "vector":
        return STREAM
    return NORM if family == "gemma3" and location != "heads" else ""


def everything(family, kind, location):
    return ""


REFUSED = {"peft": in_weights, "weights": in_weights, "folder": everything}
# All cells in Llama; of the other families, each kind where it is most at home.
AT_HOME = [(kind, where) for kind, where in CASES if where in ("post_mlp", "heads")]
TABLE = [
    (family, form, kind, location)
    for family in FAMILIES
    for form in REFUSED
    for kind, location in (CASES if family == "llama" else AT_HOME)
]
HELD = [cell for cell in TABLE if not REFUSED[cell[1]](cell[0], *cell[2:])]
NOT_HELD = [cell for cell in TABLE if cell not in HELD]


@pytest.fixture(scope="module")
def bases():
    tokenizer = tiny.make_tokenizer()
    return {name: Base(tiny.make_model(name), tokenizer, "base") for name in FAMILIES}


def loaded(form, base, folder):
    """Load a folder as the format's consumer does, in float64."""
    if form == "peft":
        twin = tiny.copy_of(base.model)
        return PeftModel.from_pretrained(twin, folder, low_cpu_mem_usage=True)
    trust = form == "folder"
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, trust_remote_code=trust
    )


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(("family", "form", "kind", "location"), HELD)
def test_the_consumer_does_what_the_held_adapters_do(bases, family, form, kind, location, tmp_path):
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
    if location in ("post_mlp", "heads") and family == "llama":
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


WEIGHTS = [cell for cell in HELD if cell[0] == "llama" and cell[1] != "folder"]


@pytest.mark.parametrize(("family", "form", "kind", "location"), WEIGHTS)
def test_all_but_the_first_token_is_an_approximation_in_weights(
    bases, family, form, kind, location
):
    adapters = randomised(bases[family].model, kind, location, "all")
    found = FORMATS[form].fidelity(adapters, bases[family])
    assert (found.level, str(found.held.positions)) == ("approximate", "every")
    assert found.held.by_layer is adapters.by_layer
    assert "also steers each sequence's first token" in found.reason


@pytest.mark.parametrize("positions", ["last_prompt", "first_last(2)"])
@pytest.mark.parametrize("form", ["peft", "weights"])
def test_positions_of_a_prompt_are_refused_in_weights(bases, form, positions, tmp_path):
    adapters = randomised(bases["llama"].model, "linear", "post_mlp", positions)
    with pytest.raises(InputError, match="cannot steer at positions"):
        export(adapters, form, tmp_path / "out", bases["llama"], approximate=True)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(("kind", "location"), [("linear", "post_mlp"), ("head_vector", "heads")])
def test_the_loss_is_the_divergence_from_our_steering(bases, kind, location, tmp_path):
    """Refused unless it is asked for; then it is the KL of steering the first token too."""
    base = bases["llama"]
    adapters = randomised(base.model, kind, location, "all")
    with pytest.raises(InputError, match="Give --approximate"):
        export(adapters, "peft", tmp_path / "out", base)
    found = export(adapters, "peft", tmp_path / "out", base, PROMPTS[:1], approximate=True)
    assert found["fidelity"] == "approximate"
    assert (found["adapters"]["positions"], found["exported"]["positions"]) == ("all", "every")
    model = loaded("peft", base, tmp_path / "out")
    said, by_hand = nats(base.model, adapters, model, PROMPTS[0], 32)
    assert found["loss"]["kl"] == pytest.approx(by_hand, rel=1e-6)
    assert found["loss"]["kl"] > 0
    assert found["loss"]["tokens"] == said


def nats(model, adapters, exported, prompt, n_new):
    """Tokens, and KL(ours ‖ `exported`) of each, along our own greedy tokens, in whole passes."""
    with steer(model, adapters):
        ids = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=n_new, do_sample=False
        )
        ours = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    theirs = exported(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return len(ours), float((ours.exp() * (ours - theirs)).sum(-1).mean())


def test_adapters_of_another_width_are_refused(bases, tmp_path):
    adapters = randomised(bases["llama"].model, "vector", "post_mlp", "every")
    adapters.by_layer[0].bias.data = torch.ones(tiny.D_MODEL + 1)
    for form in REFUSED:
        with pytest.raises(InputError, match="of another width"):
            export(adapters, form, tmp_path / "out", bases["llama"])


def test_a_format_that_reads_the_model_asks_for_it(bases, tmp_path):
    adapters = randomised(bases["llama"].model, "vector", "post_mlp", "every")
    with pytest.raises(InputError, match="give --base"):
        export(adapters, "peft", tmp_path / "out")
    with pytest.raises(InputError, match="expected one of peft"):
        export(adapters, "unknown", tmp_path / "out", bases["llama"])


@pytest.mark.parametrize(("family", "kept"), [("qwen3", "heads"), ("phi3", "")])
def test_families_that_would_lose_a_bias_are_refused(family, kept, tmp_path):
    """Qwen 3's configuration gives attention biases, and the MLP none; Phi-3's gives none."""
    base = Base(tiny.make_model(family), tiny.make_tokenizer(), "base")
    for kind, location in (("head_vector", "heads"), ("vector", "post_mlp")):
        adapters = randomised(base.model, kind, location, "every")
        if location == kept:
            export(adapters, "weights", tmp_path / family, base)
            model = loaded("weights", base, tmp_path / family)
            tokens = batch_of()["attention_mask"].bool()
            expected = steered_logits(base.model, adapters)[tokens]
            found = model(**batch_of()).logits[tokens]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
            assert base.model.config.attention_bias is False
        else:
            with pytest.raises(InputError, match="configuration gives their matrices no bias"):
                export(adapters, "weights", tmp_path / "out", base)


def test_an_export_that_fails_leaves_no_folder(bases, tmp_path, monkeypatch):
    """So that the same command can be given again."""
    base, out = bases["llama"], tmp_path / "out"
    adapters = randomised(base.model, "linear", "post_mlp", "every")
    with monkeypatch.context() as broken:
        broken.setattr(base.model, "save_pretrained", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(adapters, "folder", out, base)
    assert not out.exists()
    assert export(adapters, "folder", out, base)["fidelity"] == "exact"


def test_weights_in_16_bits_are_rounded_and_the_loss_is_that_of_the_file(tmp_path):
    """A small change may vanish between two numbers of bfloat16: the file's logits judge."""
    model = tiny.make_model("llama", torch.bfloat16)
    base = Base(model, tiny.make_tokenizer(), "base")
    adapters = randomised(tiny.make_model("llama"), "linear", "post_mlp", "every", size=0.002)
    adapters.modules.float()
    with pytest.raises(InputError, match="in bfloat16 the change is rounded"):
        export(adapters, "weights", tmp_path / "out", base)
    found = export(adapters, "weights", tmp_path / "out", base, PROMPTS[:1], approximate=True)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    _, by_hand = nats(model, adapters, read.requires_grad_(False), PROMPTS[0], 32)
    assert found["loss"]["kl"] > 0
    assert found["loss"]["kl"] == pytest.approx(by_hand, rel=0.2)
    assert str(adapters.positions) == found["exported"]["positions"] == "every"


def test_prompts_past_the_learned_positions_are_refused(bases, tmp_path):
    base = bases["gpt2"]
    adapters = randomised(base.model, "linear", "post_mlp", "all")
    prompts = [[5 + n % 50 for n in range(120)]]
    with pytest.raises(InputError, match="passes the model's 128 learned positions"):
        export(adapters, "peft", tmp_path / "out", base, prompts, approximate=True)
    assert not (tmp_path / "out").exists()


def test_adapters_that_change_nothing_are_no_interventions(bases, tmp_path):
    vector = Adapters.identity("vector", "post_block", range(2), tiny.D_MODEL)
    for form in ("reft", "easysteer", "gguf"):
        with pytest.raises(InputError, match="change nothing"):
            export(vector, form, tmp_path / "out", bases["llama"])
    vector.by_layer[1].bias.data += 1
    export(vector, "reft", tmp_path / "out", bases["llama"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [layer for layer, *_ in config["representations"]] == [1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, adapters with what one prompt says of them, and documents."""
    folder = tiny.save_request(tmp_path_factory.mktemp("files"))
    adapters = randomised(tiny.make_model("llama", torch.float32), "linear", "post_mlp", "all")
    adapters.info.update(base=str(folder / "base"), recovered={"mean": 0.5, "sem": float("nan")})
    adapters.save_pretrained(folder / "adapters")
    return folder


def test_the_command_says_what_is_known(files, tmp_path):
    asked = ["export", files / "adapters", "--to", "peft", "--approximate", "--data",
             files / "data.jsonl", "--out"]  # fmt: skip
    done = oracle(*asked, tmp_path / "out", "--max-prompts", 1)
    assert done.exit_code == 0, done.output
    assert "on 1 prompts" in done.stdout
    assert "recover 0.500 of KL" in done.stdout
    assert "nan" not in done.stdout
    refused = oracle(*asked, tmp_path / "other", "--max-prompts", -3)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "expected 1 or more" in refused.stderr

"""Models with different numbers of tokens are compared over those that both have."""

import peft
import pytest
import torch

from tests.support import tiny
from toolkit import InputError, ModelPair, Options, diagnose
from toolkit.analysis.divergence import Predictions

TEXTS = [" ".join(f"w{5 + (3 * i * j) % 50}" for j in range(8 + i)) for i in range(1, 9)]


def saved(folder, n_tokens, n_named=60, seed=0, n_tuned=0):
    """Save a model with embeddings of `n_tokens`, of which `n_named` have a name."""
    model = tiny.make_model("llama", torch.float32)
    if n_tuned:
        tiny.tune(model)
    torch.manual_seed(seed)
    model.resize_token_embeddings(n_tokens, mean_resizing=False)
    model.save_pretrained(folder)
    tiny.make_tokenizer(n_tokens=n_named).save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(("n_base", "n_tuned"), [(60, 62), (64, 62), (60, 64)])
def test_divergences_are_over_the_tokens_of_both(n_base, n_tuned, tmp_path):
    whole = [saved(tmp_path / "base", n_base), saved(tmp_path / "tuned", n_tuned, n_tuned, 1)]
    pair = ModelPair.load(tmp_path / "base", tmp_path / "tuned")
    kept = min(n_base, n_tuned)
    ids = torch.randint(kept, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cut = [model(ids).logits for model in (pair.base, pair.tuned)]
        expected = [model(ids).logits[..., :kept] for model in whole]
    assert [c.shape[-1] for c in cut] == [kept, kept]
    nats = Predictions(cut[1]).divergence(cut[0])
    assert torch.allclose(nats, Predictions(expected[1]).divergence(expected[0]), atol=1e-6)
    run = diagnose(pair, TEXTS, Options(new_tokens=3, sample=0, shared_sample=0))
    said = [check for check in run.checks if check.name.startswith("vocabulary")]
    assert [check.name for check in said] == [f"vocabulary ({left.side})" for left in pair.left_out]
    assert said


def test_the_probability_of_what_is_left_out_is_said(tmp_path):
    whole = saved(tmp_path / "tuned", 70, 60, 1)
    saved(tmp_path / "base", 60)
    pair = ModelPair.load(tmp_path / "base", tmp_path / "tuned")
    (left,) = pair.left_out
    batch = pair.corpus(TEXTS).fit_batches[0]
    with torch.no_grad():
        logits = whole(batch.ids, attention_mask=batch.mask.long()).logits[batch.counted]
        before = pair.tuned(batch.ids).logits
        mass = logits.double().softmax(-1)[:, 60:].sum(-1).mean()
        assert f"{mass:.1e} of the probability" in left.check(batch).detail
        assert torch.equal(pair.tuned(batch.ids).logits, before)


@pytest.mark.parametrize("trained", [["embed_tokens", "lm_head"], None])
def test_an_adapter_with_more_tokens_than_its_base(trained, tmp_path):
    """The embeddings are saved along: as trained modules, or since they were resized."""
    saved(tmp_path / "base", 60)
    grown = tiny.make_model("llama", torch.float32)
    grown.resize_token_embeddings(63, mean_resizing=False)
    config = peft.LoraConfig(
        target_modules=["q_proj", "down_proj"], modules_to_save=trained, init_lora_weights=False
    )
    model = peft.get_peft_model(grown, config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=trained is None)
    pair = ModelPair.load(tmp_path / "base", tmp_path / "adapter")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(pair.tuned(ids).logits, model.eval()(ids).logits[..., :60])
        assert pair.base(ids).logits.shape[-1] == 60


def test_documents_with_tokens_of_one_model_alone_are_refused(tmp_path):
    saved(tmp_path / "base", 60)
    saved(tmp_path / "tuned", 62, 62, 1)
    pair = ModelPair.load(tmp_path / "base", tmp_path / "tuned")
    with pytest.raises(InputError, match=r"token 61 \('w61'\), which one of the models lacks"):
        pair.corpus([*TEXTS, "w8 w61 w9"])


def test_a_word_with_another_id_is_refused(tmp_path):
    saved(tmp_path / "base", 62, 62)
    saved(tmp_path / "tuned", 62, 62, 1)
    path = tmp_path / "tuned" / "tokenizer.json"
    text = path.read_text().replace('"w60": 60', '"other": 60').replace('"w61": 61', '"w60": 61')
    assert '"other"' in text
    path.write_text(text)
    with pytest.raises(InputError, match=r"'w60' is token 60 of base and 61 of tuned"):
        ModelPair.load(tmp_path / "base", tmp_path / "tuned")


def test_an_added_padding_token_may_be_left_out(tmp_path):
    """The most common fine-tune with more tokens; embeddings know their padding token's id."""
    saved(tmp_path / "base", 60)
    model = tiny.make_model("llama", torch.float32)
    model.resize_token_embeddings(61, mean_resizing=False)
    model.config.pad_token_id = 60
    model.save_pretrained(tmp_path / "tuned")
    pair = ModelPair.load(tmp_path / "base", tmp_path / "tuned")
    assert pair.tuned(torch.arange(5, 15)[None]).logits.shape[-1] == 60

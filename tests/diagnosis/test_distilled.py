"""A diagnosis that distils: every place at two sizes, beside closed form's floor."""

from tests.support import tiny
from toolkit import Options, diagnose


def test_every_place_has_its_distilled_rows(llama_pair):
    """A vector and rank 8; training moves them, and the run says how long it trained."""
    options = Options(new_tokens=4, sample=0, shared_sample=0, distil=4)
    run = diagnose(llama_pair, tiny.make_documents(30), options, show_progress=False)
    rows = run.steerability.frame.query("fit == 'distilled'")
    places = ("pre_mlp", "post_mlp", "post_block")
    expected = [(place, rank) for place in places for rank in (0, 8)]
    assert list(zip(rows.location, rows["rank"], strict=True)) == expected
    assert rows.kl.notna().all()
    assert run.info["distillation"] == {"steps": 4}

"""The report: its sentences say what the tables say, and no text of others becomes markup."""

import copy
import json
import re

import pandas as pd
import pytest

from tests.support.blank import blanked
from tests.support.plausible import candidates, frames
from toolkit import Check, Run, Table
from toolkit.diagnosis.headline import beside, floors, headline, weights_beside
from toolkit.report.folder import publish, read_run
from toolkit.report.page import render
from toolkit.tables.spec import specs

EVIL = "<script>alert(1)</script>"
FULL = frames(6, 8)


def chosen(**change):
    row = next(r for r in candidates(6) if r["fit"] == "sequential" and r["rank"] == 8)
    answer = {"lower": 0.94, "asked": 0.9, "reached": True, "n_candidates": 20, "smaller": None}
    return {**row, **answer, "best": row, **change}


def make_run(tables=FULL, recommendation=None):
    info = {
        "versions": {"python": "3.11"}, "commit": None, "family": "LlamaForCausalLM",
        "base": {"name": EVIL, "sha256": "0", "dtype": "float32"},
        "tuned": {"name": "b", "sha256": "1", "dtype": "float32"},
        "parameters": 135, "layers": 6, "device": "cpu", "machine": "x86_64, 2 threads",
        "data": {"fit": {"documents": 4, "tokens": 9}, "held_out": {"documents": 1, "tokens": 2},
                 "prompts": 1},
        "options": {"new_tokens": 32},
        "stages": {"march": {"seconds": 1.0, "peak_memory_bytes": 1}},
    }  # fmt: skip
    return Run(
        tables={name: Table(name, tables[name]) for name in specs()},
        recommendation=recommendation,
        adapters=None,
        samples=[{"prompt": EVIL, "base": EVIL, "tuned": "42"}],
        checks=[Check("a", "failed", EVIL), Check("b", "passed", "fine")],
        info=info,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    publish(make_run(recommendation=chosen()), path)
    return path


def test_text_of_others_is_escaped(folder):
    html = (folder / "report.html").read_text()
    assert EVIL not in html
    assert "&lt;script&gt;alert(1)" in html


def test_self_contained(folder):
    html = (folder / "report.html").read_text()
    assert not re.search(r'(src|href)="(https?:)?//', html)
    assert "@import" not in html
    assert html.count("<svg") == len(specs())
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert {target[1:] for target in re.findall(r'href="(#[^"]+)"', html)} <= set(ids)
    figures = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in html.split("<svg")[1:]]
    assert sum(map(len, figures)) == len(set().union(*figures))  # no figure uses another's ids


def test_report_json_is_json(folder):
    text = (folder / "report.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["findings"].keys() == specs().keys()
    assert "0.978 ± 0.01" in found["headline"] or "0.98 ± 0.01" in found["headline"]


def test_a_run_survives_its_files(folder, tmp_path):
    publish(read_run(folder), tmp_path)
    for name in ("report.html", "report.json", "run.json", "tables/linear_fit.csv"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_one_prompt_has_no_standard_error():
    none = float("nan")
    frame = FULL["steerability"].assign(recovered_sem=none, kl_sem=none)
    run = make_run(
        {**FULL, "steerability": frame}, chosen(recovered_sem=none, kl_sem=none, lower=none)
    )
    html = render(run, dict.fromkeys(specs(), "<svg></svg>"))
    assert "one held-out prompt" in html
    assert not re.search(r"\bnan\b", html)
    assert "recovers 0.98 with" in headline(chosen(recovered_sem=None, lower=none), False)


def test_a_failed_check_is_named_beside_the_answer():
    html = render(make_run(recommendation=chosen()), dict.fromkeys(specs(), "<svg></svg>"))
    assert html.index("Failed: a.") < html.index("Evidence")


def test_a_free_fit_is_said_to_overshoot_only_where_it_does():
    frame = FULL["sequential_kl"]
    assert "adds at every block" in specs()["sequential_kl"].finding(frame)
    better = frame.assign(kl_mean=frame.kl_mean.where(frame.fit != "free", 0.0))
    assert "adds at every block" not in specs()["sequential_kl"].finding(better)


@pytest.mark.parametrize("name", specs())
def test_nothing_measured_is_not_said_to_be_nothing_changed(name):
    assert specs()[name].finding(blanked(FULL[name], float("nan"))).startswith("Not applicable")
    assert specs()[name].finding(FULL[name].iloc[:0]).startswith("Not applicable")


@pytest.mark.parametrize("name", specs())
def test_findings_of_nothing(name):
    """A table of zeros says that nothing changed."""
    # Which have no rows then, or describe the base model as well.
    describe = ("noise", "reachability", "normalisation", "mlp_fit", "task", "response_loss")
    if name not in describe:
        assert "othing changed" in specs()[name].finding(blanked(FULL[name], 0.0))


def test_findings_say_what_the_table_says():
    frame = FULL["steerability"]
    words = specs()["steerability"].finding(frame)
    for row in frame[(frame["rank"] == 8) & (frame.layers == "all")].itertuples():
        assert f"{row.fit} {row.recovered:.2f} ±".replace("-", "−") in words
    rows = FULL["spectrum"].query("location == 'post_block' and mode == 'free'")
    assert f"in {rows.k90.min()} to {rows.k90.max()} dimensions" in specs()["spectrum"].finding(
        FULL["spectrum"]
    )


def test_headlines():
    assert "after the block (post-block) in every block, fitted sequentially" in headline(
        chosen(), False
    )
    assert "shown to recover 0.9" in headline(chosen(), False)
    assert "at least 0.940 at 95 %, over all 20 candidates" in headline(chosen(), False)
    nearest = headline(chosen(reached=False), False)
    assert nearest.startswith("None of these adapters is shown to recover 0.9 ")
    assert "The nearest is a linear map of rank 8" in nearest
    assert "at least" not in headline(chosen(lower=float("nan")), False)
    assert "recovers anything" in headline(None, nothing_changed=False)
    assert "nothing changed" in headline(None, nothing_changed=True)
    earlier = {k: v for k, v in chosen().items() if k not in ("asked", "lower")}
    assert headline(earlier, False).startswith("Steer with a linear map")


def reported(**change):
    shown = {
        "estimate": 0.961, "low": 0.93, "high": 0.99, "n": 24, "sem": 0.01, "apart": True,
        "kl": 0.03, "base_kl": 0.8, "half_width_of_four_times": 0.014,
        "more_than_runner_up": {"estimate": 0.02, "low": -0.01, "high": 0.05, "n": 24, "sem": 0.01},
    }  # fmt: skip
    return chosen(reported={**shown, **change}, runner_up={**chosen(), "rank": 4})


def test_the_headline_is_of_prompts_that_did_not_choose():
    words = headline(reported(), False)
    assert words.startswith("The smallest adapter shown to recover 0.9 of the fine-tune is ")
    assert "It recovers 0.96 (95 % interval 0.93 to 0.99) of the fine-tune with " in words
    assert words.endswith(", on 24 prompts that had no part in choosing it.")
    doubted = headline(reported(low=0.88), False)
    assert doubted.startswith("Chosen as the smallest to recover 0.9")
    assert doubted.endswith(", which does not confirm 0.9.")
    together = headline(reported(low=0.88, apart=False, n=3), False)
    assert "on the same 3 prompts that chose it" in together
    assert "confirm" not in together
    found = {**reported(), "reached": False, "n_choosing": 9}
    assert headline(found, False).startswith("On the 9 prompts that choose, no candidate's")
    few = headline(reported(low=None, high=None, n=3), False)  # all but one without a change
    assert few.endswith("which does not confirm 0.9.")
    one = headline(reported(low=None, high=None, apart=False, n=1), False)
    assert "It recovers 0.96 of the fine-tune" in one
    assert one.endswith("on the one prompt that chose it.")


def test_how_sure_the_answer_is():
    words = beside(reported())
    assert "runner-up, post-block rank 4 sequential, it recovers +0.020 (−0.010 to +0.050" in words
    assert "the interval of ± 0.030 would be about ± 0.014" in words
    assert beside(reported(low=None, high=None)) == ""


def test_the_page_has_the_verdict(tmp_path):
    publish(make_run(recommendation=reported()), tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "<b>steerable at this size</b>" in html
    assert "0.930 to 0.990 at 95 %, on 24 prompts that did not choose it" in html
    assert json.loads((tmp_path / "report.json").read_text())["verdict"]["study"]


def test_what_stands_beside_the_answer():
    vector = {**chosen(), "rank": 0, "kind": "vector", "recovered": 0.41}
    assert beside(chosen()) == beside(None) == ""
    assert "fewer numbers post-block vector" in beside(chosen(smaller=vector))
    assert "most is recovered by post-block vector" in beside(chosen(best=vector))


def test_closed_form_is_a_floor_and_distillation_stands_beside_it():
    frame = FULL["steerability"]
    would_be = {"steps": 0, "would_be": 300, "estimated_seconds": 7200}
    text = floors(frame, would_be)
    assert "rank 8 pre-MLP 0.94" in text
    assert "These are floors" in text
    assert "--distil 300" in text
    assert "about 2.0 hours" in text
    row = frame[(frame.location == "pre_mlp") & (frame["rank"] == 8)].iloc[[0]]
    both = pd.concat([frame, row.assign(fit="distilled", recovered=0.97)])
    assert "rank 8 pre-MLP 0.94, distillation 0.97" in floors(both, {"steps": 300})
    assert "floors" not in floors(both, {"steps": 300})


def test_weights_stand_beside_steering():
    text = weights_beside(FULL["steerability"])
    assert "0.61 ± 0.02 with the numbers of steering of rank 8" in text
    assert weights_beside(FULL["steerability"].query("kind != 'lora'")) == ""


def test_a_run_gives_its_tables_by_name():
    run = make_run()
    assert run.spectrum is run.tables["spectrum"]
    assert copy.deepcopy(run).norms.name == "norms"
    with pytest.raises(AttributeError, match="no 'spectra': its tables are steerability"):
        _ = run.spectra

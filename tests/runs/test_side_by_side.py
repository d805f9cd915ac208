"""Finished runs beside each other: the runs' own numbers, overlap and transfer anew, refusals."""

import json
import re
import shutil
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from tests.support import tiny
from tests.support.commands import oracle
from tests.support.numbers_page import COMPARE_PAGE, MARKED, with_tables
from toolkit import InputError, ModelPair, Options, read_documents, steer
from toolkit.adapters.collection import Adapters
from toolkit.analysis.divergence import recovered
from toolkit.documents.tokens import encode_all
from toolkit.evaluation.reference import Reference
from toolkit.jobs.diagnose import Job, run_job
from toolkit.runs import compare_runs, write_comparison
from toolkit.runs.comparison import SPECS
from toolkit.runs.page import render
from toolkit.tables import drawing

ASKED = Options(new_tokens=4, sample=0, shared_sample=0, recover=0.5)


def undrawn(figure, path):
    """Drawing takes longer than all else: one test draws."""
    paths = [path.with_name(f"{path.name}{suffix}") for suffix in (".svg", ".png")]
    for place in paths:
        place.write_text("<svg></svg>")
    return paths


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Two fine-tunes of one base, of two doses, and a finished run of each with its statistics."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.save_request(folder, dtype=torch.float64, n_documents=40, names=("base", "heavy"))
    light = tiny.tune(tiny.make_model("llama"), size=0.1, seed=5)
    light.save_pretrained(folder / "light")
    tiny.make_tokenizer().save_pretrained(folder / "light")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "save", undrawn)
        for name in ("light", "heavy"):
            run_job(
                Job(
                    str(folder / "base"), str(folder / name), folder / "data.jsonl",
                    folder / f"run-{name}", ASKED, "float64",
                    keep_statistics=True, show=False, memory_check=False,
                )
            )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def found(desk):
    runs = [desk / "run-light", desk / "run-heavy"]
    return compare_runs(runs, with_transfer=True, show_progress=False)


def copied(run, name, **info):
    """A copy of a run's folder beside it, with other values in its ``run.json``."""
    twin = run.parent / name
    shutil.copytree(run, twin, dirs_exist_ok=True)
    record = json.loads((twin / "run.json").read_text())
    for half, values in info.items():
        record[half].update(values)
    (twin / "run.json").write_text(json.dumps(record))
    return twin


def test_rows_are_the_runs_own(desk, found):
    assert found.left_out == []
    for name in ("run-light", "run-heavy"):
        own = pd.read_csv(desk / name / "tables" / "steerability.csv")
        rows = found.recovery[found.recovery.run == name]
        fitted = own[own.kind.isin(["vector", "linear", "lora"]) & (own.layers == "all")]
        assert len(rows) == len(fitted) + (~rows.layers.eq("all")).sum() > 10
        rows = rows[rows.layers == "all"]
        for column in ("recovered", "recovered_sem", "kl", "parameters"):
            assert rows[column].tolist() == fitted[column].tolist()
        base = own[own.kind == "none"].iloc[0]
        assert set(rows.base_kl) == {base.kl}
        assert set(rows.base_kl_sem) == {base.kl_sem}


def test_what_is_reported_stands_beside_the_recommended_alone(desk, found):
    for name in ("run-light", "run-heavy"):
        chosen = json.loads((desk / name / "report.json").read_text())["run"]["recommendation"]
        rows = found.recovery[found.recovery.run == name]
        (row,) = rows[rows.recommended].to_dict("records")
        for key in ("location", "kind", "rank", "fit", "layers", "recovered"):
            assert row[key] == chosen[key]
        assert row["reported"] == chosen["reported"]["estimate"]
        assert row["reported_low"] == chosen["reported"]["low"]
        assert rows[~rows.recommended].reported.isna().all()


def test_dose_in_weights_is_that_of_the_matrices(desk, found):
    base, light, heavy = (
        dict(tiny.blocks_of(ModelPair.load(desk / "base", desk / name, "float64").tuned)
             .named_parameters())
        for name in ("base", "light", "heavy")
    )  # fmt: skip
    matrices = [name for name, value in base.items() if value.ndim == 2]
    whole = sum(base[name].square().sum() for name in matrices) ** 0.5
    for name, tuned in (("run-light", light), ("run-heavy", heavy)):
        change = sum((tuned[m] - base[m]).square().sum() for m in matrices) ** 0.5
        dose = found.recovery[found.recovery.run == name].weights_relative
        assert dose.iloc[0] == pytest.approx(float(change / whole), rel=1e-6)


def free_deltas(desk, name):
    """The change of every block's output at every counted token, read from whole forward passes."""
    pair = ModelPair.load(desk / "base", desk / name, "float64")
    documents = encode_all(read_documents(desk / "data.jsonl"), pair.tokenizer)
    found = []
    for document in documents:
        ids = torch.tensor([document.ids])
        tuned, base = (
            m(ids, output_hidden_states=True).hidden_states for m in (pair.tuned, pair.base)
        )
        found.append([(t - b)[0, 1:].numpy() for t, b in zip(tuned, base, strict=True)])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def test_overlap_is_that_of_the_deltas_themselves(desk, found):
    light, heavy = (free_deltas(desk, name) for name in ("light", "heavy"))
    rows = found.overlap.query(
        "run == 'run-light' and other == 'run-heavy' and location == 'post_block' "
        "and mode == 'free'"
    ).set_index("layer")
    k = tiny.D_MODEL // 4
    for layer in range(tiny.N_LAYERS - 1):  # the last state that models return is a normed one
        a, b = light[layer + 1], heavy[layer + 1]
        u, v = (np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:k].T for x in (a, b))
        row = rows.loc[layer]
        assert row.directions == row.other_directions == k
        assert row.overlap == pytest.approx(((u.T @ v) ** 2).sum() / k, rel=1e-6)
        means = a.mean(0), b.mean(0)
        cosine = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
        assert row.mean_cosine == pytest.approx(cosine, rel=1e-6)
        assert row.chance == k / tiny.D_MODEL


def test_identical_runs_overlap_wholly(desk):
    twin = copied(desk / "run-heavy", "twin")
    same = compare_runs([desk / "run-heavy", twin], show_progress=False)
    pairs = same.overlap[same.overlap.run != same.overlap.other]
    assert len(pairs) == tiny.N_LAYERS * 3 * 2
    np.testing.assert_allclose(pairs.overlap, 1, rtol=1e-9)
    np.testing.assert_allclose(pairs.mean_cosine, 1, rtol=1e-9)
    own = same.overlap[same.overlap.run == same.overlap.other]
    assert own.overlap.between(0, 0.9999).all()  # other documents have other directions


def test_the_diagonal_of_the_transfer_is_what_the_runs_report(desk, found):
    own = found.transfer[found.transfer.adapters == found.transfer.prompts]
    assert sorted(own.prompts) == ["run-heavy", "run-light"]
    for row in own.itertuples():
        report = json.loads((desk / row.prompts / "report.json").read_text())
        reported = report["run"]["recommendation"]["reported"]
        assert row.n_prompts == reported["n"]
        for name, key in (("recovered", "estimate"), ("recovered_low", "low"), ("kl", "kl")):
            assert getattr(row, name) == pytest.approx(reported[key], rel=1e-6, abs=1e-9)
        assert row.more_than_own == row.more_than_own_low == 0


def test_a_runs_adapters_are_judged_on_the_others_prompts(desk, found):
    adapters = Adapters.from_pretrained(desk / "run-light" / "adapters")
    pair = ModelPair.load(desk / "base", desk / "heavy", "float64")
    prompts = pair.corpus(read_documents(desk / "data.jsonl")).reporting()
    reference = Reference(pair.tuned, pair.tokenizer, [d.prompt_ids for d in prompts], 4)
    base = reference.divergence(pair.base)
    with steer(pair.base, adapters):
        steered = reference.divergence(pair.base)
    (row,) = found.transfer.query("adapters == 'run-light' and prompts == 'run-heavy'").itertuples()
    assert row.recovered == pytest.approx(recovered(steered, base)[0], rel=1e-6)
    own = found.transfer.query("adapters == 'run-heavy' and prompts == 'run-heavy'").iloc[0]
    assert row.more_than_own == pytest.approx(row.recovered - own.recovered, rel=1e-6)
    assert row.more_than_own_low < row.more_than_own < row.more_than_own_high


def test_files_are_a_page_and_its_tables(found, tmp_path):
    write_comparison(found, tmp_path / "out")
    html = (tmp_path / "out" / "compare.html").read_text()
    assert not re.search(r'(src|href)="(https?:)?//', html)
    assert html.count("<svg") == 3
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["tables"] == ["compare.csv", "overlap.csv", "transfer.csv"]
    for spec in SPECS:
        frame = pd.read_csv(tmp_path / "out" / f"{spec.name}.csv")
        assert list(frame.columns) == list(spec.columns)
        assert record["findings"][spec.name][:40] in html.replace("&#39;", "'")
    recovered = pd.read_csv(tmp_path / "out" / "compare.csv").recovered
    assert recovered.tolist() == found.recovery.recovered.tolist()


def test_fewer_tables_leave_nothing_of_an_earlier_comparison(found, desk, tmp_path):
    write_comparison(found, tmp_path)
    assert (tmp_path / "figures" / "transfer.svg").is_file()
    runs = [desk / "run-light", desk / "run-heavy"]
    write_comparison(compare_runs(runs, show_progress=False), tmp_path)
    assert not list(tmp_path.rglob("transfer.*"))


def test_a_comparison_that_fails_leaves_nothing(found, tmp_path, monkeypatch):
    """So that the same command can be given again; an earlier comparison stays."""

    def stopped(figure, path):
        raise KeyboardInterrupt

    (tmp_path / "empty").mkdir()
    ours = drawing.save
    monkeypatch.setattr(drawing, "save", stopped)
    for out in (tmp_path / "empty", tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            write_comparison(found, out)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert not list((tmp_path / "empty").iterdir())
    monkeypatch.setattr(drawing, "save", ours)
    write_comparison(found, tmp_path / "empty")
    monkeypatch.setattr(drawing, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_comparison(found, tmp_path / "empty")
    assert (tmp_path / "empty" / "compare.json").is_file()


def test_transfer_onto_runs_without_adapters_of_their_own_is_said(desk):
    """None of them has its own adapters' figures to be held against, and none is made up."""
    alone = copied(desk / "run-heavy", "alone")
    shutil.rmtree(alone / "adapters")
    gone = copied(desk / "run-light", "gone", data={"file": "gone.jsonl"})
    found = compare_runs([gone, alone], with_transfer=True, show_progress=False)
    (row,) = found.transfer.itertuples()
    assert (row.adapters, row.prompts) == ("gone", "alone")
    assert "The best transfer is of gone to alone" in found.findings["transfer"]
    assert "paired" not in found.findings["transfer"]
    assert render(found, dict.fromkeys(found.findings, "<svg></svg>"))


def test_places_stand_in_order_of_the_dose(found):
    doses = found.recovery.groupby("run").base_kl.first()
    names = list(doses.sort_values().index)
    said = found.findings["compare"]
    assert all(said.index(f"({a})") < said.index(f"({b})") for a, b in pairwise(names))


def test_without_statistics_adapters_are_compared_or_the_reason_said(desk):
    bare = copied(desk / "run-light", "bare")
    shutil.rmtree(bare / "statistics")
    ours = Adapters.from_pretrained(bare / "adapters")
    same = compare_runs([desk / "run-light", bare], show_progress=False)
    rows = same.overlap[same.overlap.source == "adapters"]
    assert "bare ran without" in same.left_out[0]
    if ours.kind == "linear":
        assert rows.layer.tolist() == sorted(ours.by_layer)
        np.testing.assert_allclose(rows.overlap, 1, rtol=1e-6)
    shutil.rmtree(bare / "adapters")
    nothing = compare_runs([desk / "run-light", bare], show_progress=False)
    assert "no overlap of run-light and bare" in nothing.left_out[0]
    assert "no pair of runs" in nothing.findings["overlap"]
    assert not (nothing.overlap.run != nothing.overlap.other).any()


def test_an_earlier_run_is_shown_as_far_as_it_goes(desk):
    """Without the tables, columns and answers that came later, and with its documents gone."""
    early = copied(desk / "run-light", "early", data={"file": "gone.jsonl"})
    (early / "tables" / "weights.csv").unlink()
    report = json.loads((early / "report.json").read_text())
    del report["run"]["recommendation"]["reported"], report["tables"]["weights"]
    (early / "report.json").write_text(json.dumps(report))
    found = compare_runs([early, desk / "run-heavy"], with_transfer=True, show_progress=False)
    rows = found.recovery[found.recovery.run == "early"]
    assert rows.recovered.notna().all()
    assert rows.weights_relative.isna().all()
    assert rows.reported.isna().all()
    assert any("early has no table of weights" in reason for reason in found.left_out)
    assert any("gone.jsonl" in reason for reason in found.left_out)
    assert set(found.transfer.prompts) == {"run-heavy"}
    (early / "tables" / "steerability.csv").write_text("location,kind\n")
    found = compare_runs([early, desk / "run-heavy"], show_progress=False)
    assert set(found.recovery.run) == {"run-heavy"}
    (early / "tables" / "steerability.csv").unlink()
    del report["tables"]["steerability"]
    (early / "report.json").write_text(json.dumps(report))
    found = compare_runs([early, desk / "run-heavy"], show_progress=False)
    assert set(found.recovery.run) == {"run-heavy"}
    assert any("early has no table of what is recovered" in reason for reason in found.left_out)
    assert render(found, dict.fromkeys(found.findings, "<svg></svg>"))


def test_models_and_documents_that_changed_are_not_judged_on(desk):
    other = copied(desk / "run-light", "other", tuned={"name": str(desk / "heavy")})
    found = compare_runs([other, desk / "run-heavy"], with_transfer=True, show_progress=False)
    assert any("has changed since the run" in reason for reason in found.left_out)
    assert set(found.transfer.prompts) == {"run-heavy"}


def test_runs_that_cannot_stand_beside_each_other_are_refused(desk, tmp_path):
    ours = desk / "run-light"
    with pytest.raises(InputError, match="expected two or more"):
        compare_runs([ours])
    with pytest.raises(InputError, match="named twice"):
        compare_runs([ours, desk / ".." / desk.name / "run-light"])
    with pytest.raises(InputError, match="not a finished run"):
        compare_runs([ours, desk / "base"])
    stranger = copied(ours, "stranger", base={"sha256": "f" * 64, "name": "elsewhere"})
    with pytest.raises(InputError, match=r"other bases: .* and elsewhere .*ffff"):
        compare_runs([ours, stranger])
    for text in ('{"base": {', '{"base": {}}', "[]"):
        (stranger / "run.json").write_text(text)
        with pytest.raises(InputError, match="stranger holds no records of a run"):
            compare_runs([ours, stranger])
    begun = desk / "begun"
    (desk / "begun.partial").mkdir()
    with pytest.raises(InputError, match="not finished"):
        compare_runs([ours, begun])


def test_the_command_says_what_it_found_and_refuses_in_one_line(desk, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "save", undrawn)
    runs = [desk / "run-light", desk / "run-heavy"]
    done = oracle("compare", *runs, "--out", tmp_path / "out", "--quiet")
    assert done.exit_code == 0, done.output
    assert "Overlap of two runs" in done.stdout
    assert str(tmp_path / "out" / "compare.html") in done.stdout
    assert not (tmp_path / "out" / "transfer.csv").exists()
    refused = oracle("compare", runs[0], "--out", tmp_path / "one", "--quiet")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "one").exists()
    kept = oracle("compare", *runs, "--out", desk / "base", "--quiet")
    assert kept.exit_code == 2
    assert "did not make" in kept.stderr


def test_page_explains_every_column():
    text = COMPARE_PAGE.read_text("utf-8")
    assert [name for _, name, _ in MARKED.findall(text)] == [spec.name for spec in SPECS]
    assert with_tables(text) == text
    assert text.count("\n*Misleads*") == len(SPECS)

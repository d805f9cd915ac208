"""Objects show themselves as a cell's output: the answer first, and no markup of others."""

import html
import re
from html.parser import HTMLParser

import pytest
import torch

from tests.report.test_page import EVIL, FULL, chosen, make_run
from tests.support import tiny
from tests.support.steering import random_adapters
from toolkit import Check, Table
from toolkit.report import show

VOID = ("img", "meta", "link", "br")


class Tags(HTMLParser):
    """The tags of a text, which must be closed in order, and its first bold words."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.bold = [], set(), []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "b":
            self.bold.append(data)


@pytest.fixture(scope="module")
def pair():
    made = tiny.make_pair("llama", torch.float32, tiny.make_tokenizer())
    made.base_name = made.unavailable["pre_mlp"] = EVIL
    return made


def evil_adapters():
    adapters = random_adapters("post_mlp")
    adapters.info.update(base=EVIL, tuned=EVIL)
    return adapters


def test_a_run_shows_its_answer_and_its_best_candidates():
    run = make_run(recommendation=chosen())
    text = run._repr_html_()
    found = Tags(text)
    assert "".join(found.bold) == run.headline
    assert "script" not in found.seen
    frame = FULL["steerability"].query("kind in ('vector', 'linear')")
    best = sorted(frame.recovered, reverse=True)[:6]
    shown = re.findall(r"<td>([^<]*)</td><td>[^<]*</td></tr>", text)
    assert shown == [f"{value:.4g}" for value in best]
    assert "failed: a" in text


@pytest.mark.parametrize("name", ["norms", "noise"])
def test_a_table_shows_its_finding_first_rows_and_figure(name):
    table = Table(name, FULL[name])
    text = table._repr_html_()
    assert "".join(Tags(text).bold) == table.finding()
    assert text.count("<tr>") == 1 + min(5, len(table.frame))
    assert 'src="data:image/png;base64,' in text
    assert all(f"<th>{column}</th>" in text for column in table.frame)


def test_text_of_others_is_escaped(pair):
    table = Table("norms", FULL["norms"].assign(comment=EVIL))
    shown = [pair, evil_adapters(), Check("a", "failed", EVIL), table]
    for thing in (*shown, make_run()):
        text = thing._repr_html_()
        assert "script" not in Tags(text).seen
        assert html.escape(EVIL) in text


def test_a_pair_and_adapters_say_what_they_are(pair):
    assert f"{pair.n_parameters:,}" in pair._repr_html_()
    assert f"{pair.n_layers} blocks of width {pair.d_model}" in pair._repr_html_()
    assert "linear, rank 3" in evil_adapters()._repr_html_()


def test_the_report_is_shown_in_the_cell(monkeypatch):
    monkeypatch.setattr(Table, "plot", lambda self, noise: self.name)  # drawing takes long
    monkeypatch.setattr("toolkit.report.cell.svg", lambda name: f"<svg><title>{name}</title></svg>")
    run = make_run(recommendation=chosen())
    (page,) = re.findall(r'srcdoc="([^"]*)"></iframe>$', show(run)._repr_html_())
    page = html.unescape(page)
    assert page.startswith("<!doctype html>")
    assert run.headline in page
    assert all(f"<title>{name}</title>" in page for name in run.tables)

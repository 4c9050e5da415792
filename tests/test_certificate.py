"""The certificate: what a tally makes of a rule, its three forms, and the command that makes it."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from dcpbench import codec
from dcpbench.cli import main
from dcpbench.report.certificate import Certificate, Failure, Together, entries_of, together_of, write_certificate
from dcpbench.report.certificate_page import as_html, as_markdown
from dcpbench.rules import FAMILIES, RULES

MESSAGE = "R101 wrong-bytes: '<w>' differs\n  expected   00\n  got        01"


def certificate(tally, failures=(), backends=("one", "other"), absent=None, together=()) -> Certificate:
    entries = entries_of(backends, Counter(tally), list(failures), absent or {})
    numbers = tuple(range(len(backends)))
    return Certificate(
        backends,
        entries,
        numbers,
        numbers,
        "quick",
        4,
        "cpu",
        "random",
        61.5,
        "2026-01-01T00:00:00+00:00",
        (("a", "1"),),
        together=together,
    )


@pytest.mark.parametrize(
    ("tally", "status", "num_cases", "num_broken"),
    [
        ({}, "UNKNOWN", 0, 0),
        ({"pass": 3}, "PASS", 3, 0),
        ({"pass": 3, "unsupported": 2}, "PASS", 3, 0),
        ({"unsupported": 2}, "UNSUPPORTED", 0, 0),
        ({"pass": 3, "fail": 1}, "FAIL", 4, 1),
        ({"pass": 3, "known": 2}, "FAIL", 5, 2),
        ({"pass": 3, "inherited": 2}, "PASS", 5, 0),
        ({"inherited": 2}, "UNKNOWN", 2, 0),
    ],
)
def test_status_of_a_rule(tally, status, num_cases, num_broken):
    found = certificate({("R101", "one", how): n for how, n in tally.items()})
    entry = found.entry("R101", "one")
    assert (entry.status, entry.num_cases, entry.num_broken) == (status, num_cases, num_broken)
    assert found.entry("R101", "other").status == "UNKNOWN"


def test_a_rule_that_needs_what_is_absent_is_unsupported():
    found = certificate({("R101", "one", "pass"): 3}, absent={"one": {"objects", "metadata"}})
    assert [found.entry(rule, "one").status for rule in ("R101", "R301", "R401")] == ["PASS", *["UNSUPPORTED"] * 2]
    assert found.entry("R401", "other").status == "UNKNOWN"
    assert certificate({("R401", "one", "fail"): 1}, absent={"one": {"objects"}}).entry("R401", "one").status == "FAIL"


def test_backends_together_have_rows_of_their_own():
    tally = Counter(
        {("R101", "one to other", "known"): 2, ("R101", "other to one", "pass"): 4, ("R402", "one to other", "fail"): 1}
    )
    failure = Failure("R402", "one to other", MESSAGE, "x.json")
    cases = {"one": 9, "one to other": 7, "other to one": 4}
    pairs = together_of(("one", "other"), cases, tally, [failure])
    assert pairs == (
        Together("one to other", 7, ("R101", "R402"), False, failure),
        Together("other to one", 4),
    )
    found = certificate({}, together=pairs)
    assert "| other to one | 4 | nothing |" in as_markdown(found)
    assert "## R402 on one to other" in as_markdown(found)
    assert "one to other</td><td>7</td><td>R101, R402</td>" in as_html(found)


def test_every_rule_has_an_entry():
    found = certificate({})
    assert {entry.rule for entry in found.entries} == set(RULES)
    assert sum(found.count("one", status) for status in ("PASS", "FAIL", "UNSUPPORTED", "UNKNOWN")) == len(RULES)


def test_the_most_basic_broken_rule_comes_first():
    found = certificate({(rule, "one", "fail"): 1 for rule in ("R101", "R107", "R301", "R402")})
    assert [entry.rule for entry in found.failures("one")] == ["R101", "R301", "R402", "R107"]
    assert found.failures("other") == []


def test_json_goes_both_ways(tmp_path):
    found = certificate({("R101", "one", "fail"): 1}, [Failure("R101", "one", MESSAGE, "x.json")])
    paths = write_certificate(found, tmp_path / "deep" / "out")
    assert [path.name for path in paths] == ["certificate.json", "certificate.md", "certificate.html"]
    assert codec.from_json(Certificate, json.loads(paths[0].read_text()), "here") == found
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == sorted(path.name for path in paths)


class Outline(HTMLParser):
    """What a page asks of the network, and the order in which its tags nest."""

    def __init__(self):
        super().__init__()
        self.asked, self.open, self.headings = [], [], []

    def handle_starttag(self, tag, attributes):
        self.asked += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def test_the_page_is_whole_and_asks_nothing_of_the_network():
    found = certificate(
        {("R101", "one", "fail"): 1, ("R402", "other", "known"): 2}, [Failure("R101", "one", MESSAGE, "x.json")]
    )
    text = as_html(found)
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    assert outline.asked == []
    assert not re.search(r"https?://|@import|url\(", text)
    assert outline.headings == ["Broken by one", "Broken by other", *map(str.capitalize, FAMILIES), "Made with"]
    assert "&#x27;&lt;w&gt;&#x27; differs" in text
    assert all(rule.name in text for rule in RULES.values())


def test_markdown_has_a_row_per_rule():
    text = as_markdown(certificate({("R101", "one", "fail"): 1}, [Failure("R101", "one", MESSAGE, "x.json")]))
    assert sum(bool(re.match(r"\| [A-Z]\d{3} ", line)) for line in text.splitlines()) == len(RULES)
    assert MESSAGE in text


def test_a_misspelt_backend_is_one_line(capsys, tmp_path):
    assert main(["conformance", "--backend=torhc", f"--out={tmp_path}"]) == 2
    assert "Unknown backend 'torhc'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

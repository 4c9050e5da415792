"""The table of what generated cases reach: each argument of torch's has a row, and each row a number or a reason."""

from __future__ import annotations

from collections import Counter

import pytest

from dcpbench.coverage import page
from dcpbench.coverage.reach import FEATURES, REACHED, REASONS
from dcpbench.coverage.surface import surface
from dcpbench.errors import UsageError

ROWS = [row for held in surface().values() for row in held]


def test_each_argument_is_reached_or_has_a_reason():
    assert [row for row in ROWS if row not in REACHED and row not in REASONS] == []
    assert page.misplaced_rows() == []
    assert all(REASONS.values())


def test_a_new_argument_makes_an_empty_row(monkeypatch):
    counts = page.Counts(Counter({(row, "test_a"): 2 for row in (*REACHED, *FEATURES)}), Counter(test_a=2))
    assert page.empty_rows(counts) == []
    monkeypatch.setattr(page, "surface", lambda: {"Saving and loading": ["save.state_dict", "save.brand_new"]})
    assert page.empty_rows(counts) == ["save.brand_new"]
    text = page.coverage_page(counts, "standard", 8)
    assert "| `save.state_dict` | 2 | a |" in text
    assert "| `save.brand_new` | - | **nobody knows** |" in text


def test_a_profile_that_is_not_there_is_answered_in_one_line():
    with pytest.raises(UsageError, match="--profile"):
        page.drawn_counts("huge", 4)

"""One thing after another: chains of layouts, and any sequence of steps."""

from __future__ import annotations

from hypothesis import given, settings

from dcpbench import cases, judge


@settings(max_examples=max(settings.default.max_examples // 4, 4))
@given(case=cases.chains())
def test_any_path_of_layouts_ends_at_the_same_bytes(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))


@settings(max_examples=max(settings.default.max_examples // 2, 4))
@given(case=cases.sequences())
def test_any_sequence_of_steps(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))

"""Generated models under every parallelism: their state is read, saved, resumed elsewhere, and set again."""

from __future__ import annotations

from hypothesis import given

from dcpbench import judge, share, training


@share(1 / 4)
@given(case=training.models())
def test_a_model_resumes_under_any_parallelism(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))


@share(1 / 4)
@given(case=training.models())
def test_one_resumes_what_the_other_saved(case, pool, saver, loader, check):
    check(judge(case, pool.run(case, saver, load_backend=loader)))


@share(1 / 4)
@given(case=training.options())
def test_a_state_is_read_and_set_with_any_options(case, pool, backend, check):
    check(judge(case, pool.run(case, backend)))

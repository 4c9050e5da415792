"""`dcpbench bench planning`: what is planned is whole, what is said of growth is right, and the page is kept up."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from dcpbench.bench import planning_models, planning_steps
from dcpbench.bench.planning_models import MODELS, Model
from dcpbench.bench.planning_page import BEGIN, END, PlanningRun, goals_of, page, plot, with_section
from dcpbench.bench.planning_scale import measure
from dcpbench.bench.power_law import fit
from dcpbench.errors import UsageError
from dcpbench.geometry import Box, tiling_fault

SIZES = (64, 256, 1024)


def run(side, size, exponent, factor=1.0):
    seconds = dict.fromkeys(planning_steps.STEPS, factor * size**exponent)
    return PlanningRun(side, "moe-1t", size, seconds, 10 * size, 8 * size, 100 * size, 2**20 * size)


@pytest.fixture
def runs():
    return [run(side, n, *law) for n in SIZES for side, law in (("torch", (1.3, 1.0)), ("reference", (1.0, 0.1)))]


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_the_boxes_of_all_ranks_tile_each_tensor(model):
    grid = model.grid(128)
    held = {leaf.fqn.split(".", 3)[-1]: leaf for leaf in model.leaves() if leaf.fqn.startswith("model.")}
    for leaf in held.values():
        first = leaf.stage * grid.first * grid.second
        boxes = {grid.box(leaf, first + number) for number in range(grid.first * grid.second)} - {None}
        assert tiling_fault(leaf.shape, [Box(*box) for box in boxes]) is None, leaf


def test_the_models_are_as_large_as_they_are_said_to_be():
    sizes = {name: sum(math.prod(x.shape) for x in model.leaves()) / 3e9 for name, model in MODELS.items()}
    assert 395 < sizes["llama3-405b"] < 415
    assert 950 < sizes["moe-1t"] < 1150


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("side", ["torch", "reference"])
def test_a_side_runs_at_one_size(side, is_whole, monkeypatch):
    monkeypatch.setitem(planning_models.MODELS, "small", Model("llama3-405b", "small", 8, 8))
    done = planning_steps.run(side, "small", 64, is_whole=is_whole)
    assert set(done["seconds"]) == {*planning_steps.STEPS} - (
        set() if is_whole else {"unpack plans", "dedup", "global plan", "validation"}
    )
    assert done["num_chunks"] == 1518
    assert done["metadata_bytes"] > 10_000


def test_growth_is_that_of_the_points():
    law = fit({n: 3.0 * n**1.25 for n in SIZES})
    assert law.exponent == pytest.approx(1.25)
    assert law.low == pytest.approx(law.high)
    assert law.at(4096) == pytest.approx(3.0 * 4096**1.25)
    noisy = fit({64: 1.0, 256: 5.0, 1024: 16.0})
    assert noisy.low < 1.0 < noisy.high


def test_goals_are_missed_where_they_are(runs):
    faster, grows = goals_of(runs)
    assert faster.is_met
    assert grows.value == pytest.approx(1.0)
    slower = [run("reference", one.world_size, 1.2) if one.side == "reference" else one for one in runs]
    assert [goal.is_met for goal in goals_of(slower)] == [False, False]


def test_the_page_says_what_was_not_measured(runs):
    text = page(runs)
    assert "at 16,384 ranks, by its fits (not measured)" in text
    assert "| **all steps**, s |" in text
    partial = [*runs, *(run(side, 4096, 1.0) for side in ("torch", "reference"))]
    for one in partial[-2:]:
        del one.seconds["dedup"]
    assert "| - | - |" in page(partial)
    ET.fromstring(plot(partial))


def test_other_sections_of_the_page_stay():
    old = f"# Scale\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n"
    new = with_section(old, "new\n")
    assert new == f"# Scale\n\nBefore.\n\n{BEGIN}\nnew\n{END}\n\nAfter.\n"
    assert with_section("# Scale\n", "new\n").startswith("# Scale\n\n<!--")


@pytest.mark.parametrize("ranks", ["", "many", "63", "100", "32768"])
def test_sizes_that_cannot_be_measured_are_refused(ranks):
    with pytest.raises(UsageError, match="powers of two"):
        measure(ranks, None, None, None)


def test_runs_that_are_kept_are_not_made_again(runs, tmp_path, monkeypatch, capsys):
    made = []

    def make(model, size, side, *, is_whole):
        made.append((size, side, is_whole))
        return next(one for one in runs if (one.world_size, one.side) == (size, side))

    monkeypatch.setattr("dcpbench.bench.planning_scale._run", make)
    for _ in range(2):
        measure("64,256,1024", ["moe-1t"], tmp_path / "runs.json", tmp_path, whole_up_to=256)
    assert len(made) == len(set(made)) == 6
    assert (1024, "torch", False) in made
    assert "written" in capsys.readouterr().out
    assert (tmp_path / "scale.md").read_text().count(BEGIN) == 1

"""The page and the plot of `dcpbench bench planning`: tables, growth exponents with intervals, what is extrapolated."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dcpbench.bench.goals import Goal, at_least, at_most
from dcpbench.bench.planning_models import MODELS
from dcpbench.bench.power_law import fit

__all__ = ["PlanningRun", "goals_of", "page", "plot", "table_lines", "with_section"]

EXTRAPOLATED = 16_384
BEGIN, END = "<!-- made by dcpbench bench planning: begin -->", "<!-- made by dcpbench bench planning: end -->"

_COORDINATOR = ("unpack plans", "dedup", "global plan", "validation", "metadata encode")
_EACH_RANK = ("local plan", "metadata decode", "load plan")
_COLOURS = {"torch": "#d1495b", "reference": "#00798c"}


@dataclass(frozen=True)
class PlanningRun:
    """One side at one size.

    Attributes:
        seconds: of one thread's CPU, by step.
        num_items: write items of all local plans.
        num_chunks: what is left of them without replicas.
        metadata_bytes: size of the metadata file.
        peak_bytes: the coordinator's high-water mark over what it held before the plans arrived.
    """

    side: str
    model: str
    world_size: int
    seconds: dict[str, float]
    num_items: int
    num_chunks: int
    metadata_bytes: int
    peak_bytes: int

    @property
    def total_s(self) -> float:
        """All steps: what a save and a load wait for, one after the other; NaN where some were not measured."""
        return sum(self.seconds.get(step, math.nan) for step in (*_COORDINATOR, *_EACH_RANK))


def goals_of(runs: Sequence[PlanningRun]) -> list[Goal]:
    """Returns the goals for the reference, at 4,096 ranks or the most that were measured."""
    goals: list[Goal] = []
    for model in _models(runs):
        sides = {side: _of(runs, model, side) for side in ("torch", "reference")}
        most = sides["reference"][-1].world_size
        ratio = sides["torch"][-1].seconds["load plan"] / sides["reference"][-1].seconds["load plan"]
        goals.append(at_least(f"{model}: load plan of a rank of {most}, times faster", ratio, 20))
        totals = {run.world_size: run.total_s for run in sides["reference"] if run.total_s > 0}
        if len(totals) > 1:
            growth = fit(totals)
            interval = f"95 % {growth.low:.2f} to {growth.high:.2f}" if growth.low is not None else ""
            goals.append(at_most(f"{model}: growth exponent of all steps", growth.exponent, 1.1, "", interval))
    return goals


def table_lines(runs: Sequence[PlanningRun]) -> list[str]:
    """Returns a table of one model as Markdown: a line for each step, both sides at each size."""
    sizes = sorted({run.world_size for run in runs})
    held = {(run.world_size, run.side): run for run in runs}
    head = ["step", *(f"{side} {size:,}" for size in sizes for side in ("torch", "ref")), "torch grows", "ref grows"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    lines: list[tuple[str, list[float], list[float], str]] = []
    for step in (*_COORDINATOR, *_EACH_RANK):
        name = f"{step} (each rank)" if step in _EACH_RANK else step
        lines.append((name, *_both(held, sizes, functools.partial(_seconds_of, step)), "s"))
    lines.append(("**all steps**", *_both(held, sizes, lambda run: run.total_s), "s"))
    lines.append(("metadata", *_both(held, sizes, lambda run: run.metadata_bytes / 2**20), "MiB"))
    lines.append(("coordinator's memory", *_both(held, sizes, lambda run: run.peak_bytes / 2**20), "MiB"))
    for name, torch_values, own_values, unit in lines:
        cells = [_short(v) for pair in zip(torch_values, own_values, strict=True) for v in pair]
        grows = [_growth(sizes, values) for values in (torch_values, own_values)]
        rows.append([f"{name}, {unit}", *cells, *grows])
    title = MODELS[runs[0].model].title
    counts = "; ".join(f"{size:,} ranks: {held[size, 'torch'].num_chunks:,} chunks" for size in sizes)
    return ["", f"### {title}", "", *("| " + " | ".join(row) + " |" for row in rows), "", f"{counts}."]


def page(runs: Sequence[PlanningRun]) -> str:
    """Returns the section of ``docs/scale.md``."""
    lines = [
        "## Planning at scale",
        "",
        "Made by `dcpbench bench planning --out docs`. Seconds are CPU time of one thread. Local plan, metadata decode",
        "and load plan are what one rank does (plans: the median of three); the others are the coordinator's, over",
        "the plans of all ranks. `unpack plans` is their way back from bytes; a load has the layout of the save.",
        "`grows` is the exponent of a power law through all that was measured, with an interval of 95 %; `-` was not",
        "measured at that size.",
        "",
        "![seconds over ranks](planning.svg)",
    ]
    for model in _models(runs):
        own = [run for run in runs if run.model == model]
        lines += table_lines(own)
        lines += ["", *_beyond(own)]
    goals = goals_of(runs)
    lines += ["", "### Goals", "", "| goal | measured | limit | |", "| --- | ---: | ---: | --- |"]
    for goal in goals:
        limit = f"{'at least' if goal.is_minimum else 'at most'} {goal.limit:g}"
        verdict = "met" if goal.is_met else "missed"
        lines.append(f"| {goal.name} | {goal.value:.3g} {goal.note} | {limit} | {verdict} |")
    return "\n".join(lines) + "\n"


def with_section(text: str, section: str) -> str:
    """Returns a page in which the section of this command is ``section``; at its end, if it had none."""
    block = f"{BEGIN}\n{section}{END}\n"
    if BEGIN in text and END in text:
        return text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) + 1 :]
    return f"{text.rstrip()}\n\n{block}"


def plot(runs: Sequence[PlanningRun]) -> str:
    """Returns an SVG: for each model a panel, seconds of all steps and of a rank's load plan over ranks."""
    models = _models(runs)
    parts = [_panel(number, [run for run in runs if run.model == model]) for number, model in enumerate(models)]
    width = 60 + 420 * len(models)
    style = "text{font:12px sans-serif;fill:#333}path{fill:none;stroke-width:2}line{stroke:#ddd}"
    legend = "".join(
        f'<text x="{60 + 90 * n}" y="350" style="fill:{colour}">{side}</text>'
        for n, (side, colour) in enumerate(_COLOURS.items())
    )
    legend += (
        '<text x="240" y="350">lines: all steps; dashes: load plan of one rank; the last point is by the fit</text>'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 370" role="img">'
    return "\n".join([head, f"<style>{style}</style>", *parts, legend, "</svg>"]) + "\n"


def _panel(number: int, runs: Sequence[PlanningRun]) -> str:
    left, top, wide, high = 60 + 420 * number, 40, 340, 250
    sizes = sorted({run.world_size for run in runs})
    low, far = math.log(sizes[0]), math.log(EXTRAPOLATED)
    values = [v for run in runs for v in (run.total_s, run.seconds["load plan"]) if v > 0]
    floor = math.floor(math.log10(min(values)))
    ceiling = math.ceil(math.log10(max(values))) + 1

    def x(ranks: float) -> float:
        return left + wide * (math.log(ranks) - low) / (far - low)

    def y(seconds: float) -> float:
        return top + high * (ceiling - math.log10(seconds)) / (ceiling - floor)

    parts = [f'<text x="{left}" y="22">{MODELS[runs[0].model].name}: CPU seconds over ranks; dots are measured</text>']
    for power in range(floor, ceiling + 1):
        at = y(10.0**power)
        parts.append(f'<line x1="{left}" y1="{at:.0f}" x2="{left + wide}" y2="{at:.0f}"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.0f}" text-anchor="end">{10.0**power:g}</text>')
    parts += [
        f'<text x="{x(size):.0f}" y="{top + high + 18}" text-anchor="middle">{size:,}</text>'
        for size in dict.fromkeys((*sizes, EXTRAPOLATED))
    ]
    for side, colour in _COLOURS.items():
        for dashes, value in (("", "total"), ("5 4", "load plan")):
            points = {r.world_size: r.total_s if value == "total" else r.seconds[value] for r in _of(runs, None, side)}
            points = {n: seconds for n, seconds in points.items() if seconds > 0}
            power_law = fit(points) if len(points) > 1 else None
            line = [(x(n), y(v)) for n, v in points.items()]
            parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in line]
            if power_law is not None and max(points) < EXTRAPOLATED:
                line.append((x(EXTRAPOLATED), y(power_law.at(EXTRAPOLATED))))
            path = " L".join(f"{px:.1f} {py:.1f}" for px, py in line)
            parts.append(f'<path d="M{path}" stroke="{colour}" stroke-dasharray="{dashes}"/>')
    return "\n".join(parts)


def _beyond(runs: Sequence[PlanningRun]) -> list[str]:
    """Returns a sentence for each side on what the fits say of more ranks than were measured."""
    lines = []
    most = max(run.world_size for run in runs)
    if most >= EXTRAPOLATED or len({run.world_size for run in runs}) < 2:
        return []
    for side in ("torch", "reference"):
        own = _of(runs, None, side)
        total = fit({run.world_size: run.total_s for run in own})
        load = fit({run.world_size: run.seconds["load plan"] for run in own})
        memory = fit({run.world_size: run.peak_bytes for run in own})
        lines.append(
            f"- {side} at {EXTRAPOLATED:,} ranks, by its fits (not measured): all steps {total.factor:.3g} s x "
            f"ranks^{total.exponent:.2f} = {total.at(EXTRAPOLATED):,.0f} s, load plan {load.factor:.3g} s x "
            f"ranks^{load.exponent:.2f} = {load.at(EXTRAPOLATED):.2g} s, coordinator's memory "
            f"{memory.at(EXTRAPOLATED) / 2**30:.1f} GiB"
        )
    return lines


def _models(runs: Sequence[PlanningRun]) -> list[str]:
    return list(dict.fromkeys(run.model for run in runs))


def _of(runs: Sequence[PlanningRun], model: str | None, side: str) -> list[PlanningRun]:
    found = [run for run in runs if run.side == side and model in (None, run.model)]
    return sorted(found, key=lambda run: run.world_size)


def _both(
    held: dict[tuple[int, str], PlanningRun], sizes: Sequence[int], value: Callable[[PlanningRun], float]
) -> tuple[list[float], list[float]]:
    one, other = ([float(value(held[size, side])) for size in sizes] for side in ("torch", "reference"))
    return one, other


def _growth(sizes: Sequence[int], values: Sequence[float]) -> str:
    return str(fit(dict(zip(sizes, values, strict=True)))) if len(sizes) > 1 else ""


def _seconds_of(step: str, run: PlanningRun) -> float:
    return run.seconds.get(step, math.nan)


def _short(value: float) -> str:
    if not value > 0:
        return "-"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"

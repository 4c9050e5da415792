"""Style and script of the benchmark page: nothing is fetched, and the page reads without the script too."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --line: #8884; --pass: #1a7f37; --fail: #cf222e; --unknown: #9a6700; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .25rem; }
p.about { margin: .1rem 0 .75rem; opacity: .75; max-width: 60rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .75rem; }
figure { margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: .4rem; min-width: 0; }
figcaption { font-size: .85rem; font-weight: 600; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11.5px system-ui, sans-serif; fill: currentColor; } svg text.muted { fill: #888; font-size: 10.5px; }
svg .grid { stroke: #8883; fill: none; } svg .whisker { stroke: currentColor; fill: none; opacity: .65; }
.legend { list-style: none; padding: 0; margin: .5rem 0; font-size: .9em; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .4em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; overflow-wrap: normal; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
.badge { padding: 0 .5em; border-radius: .6em; color: #fff; font-weight: 600; font-size: .85em; white-space: nowrap; }
.VALID { background: var(--pass); } .FAIL { background: var(--fail); } .INVALID { background: var(--unknown); }
.filters input { font: inherit; padding: .2rem .5rem; max-width: 14rem; } #count { opacity: .75; font-size: .9em; }
details { border-bottom: 1px solid var(--line); } summary { cursor: pointer; padding: .25rem 0; }
dl { display: grid; grid-template-columns: minmax(9rem, max-content) 1fr; gap: 0 1rem; font-size: .85rem; }
dt { opacity: .75; } dd { margin: 0; }
pre { overflow-x: auto; padding: .75rem; background: #8881; border-radius: .4rem; font-size: .8em; }
@media (max-width: 40rem) { body { padding: .6rem; } dl { grid-template-columns: 1fr; } dd { margin: 0 0 .3rem 1rem; } }
"""

SCRIPT = """
"use strict";
const body = document.querySelector("#table tbody"), heads = [...document.querySelectorAll("#table th")];
const input = document.querySelector("#filter"), count = document.querySelector("#count");
function key(row, column) {
  const value = row.cells[column].dataset.v;
  return value === undefined ? null : value.trim() !== "" && isFinite(value) ? Number(value) : value;
}
function order(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}
heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
  const down = head.getAttribute("aria-sort") === "ascending";
  heads.forEach(other => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...body.rows].map(row => [key(row, column), row]);
  rows.sort(([a], [b]) => a === null || b === null || !down ? order(a, b) : order(b, a));
  body.append(...rows.map(([, row]) => row));
}));
function filter() {
  const words = input.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const row of body.rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
    shown += !row.hidden;
  }
  count.textContent = `${shown} of ${body.rows.length} rows`;
}
input.addEventListener("input", filter);
filter();
addEventListener("hashchange", () => {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
});
"""

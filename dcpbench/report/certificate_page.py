"""A certificate as Markdown and as one HTML page that needs nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

from dcpbench.report.certificate import Certificate, Entry, Together
from dcpbench.rules import FAMILIES, RULES

__all__ = ["as_html", "as_markdown"]

_MARKS = {"PASS": "✓", "FAIL": "✗", "UNSUPPORTED": "–", "UNKNOWN": "?"}
_STATUSES = {
    "PASS": "put to the test, and never broken",
    "FAIL": "broken in at least one case",
    "UNSUPPORTED": "needs a capability that the backend lacks, and never did it wrong where it was asked for",
    "UNKNOWN": "not put to the test in this run; never a pass",
}

_STYLE = """
:root {
  color-scheme: light dark;
  --line: #8883; --pass: #1a7f37; --fail: #cf222e; --none: #6e7781; --unknown: #9a6700;
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .25rem; }
p.about { margin: .1rem 0 .5rem; opacity: .75; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .5rem; border-bottom: 1px solid var(--line); }
th.backend, td.status { text-align: center; white-space: nowrap; }
th.backend { max-width: 12rem; overflow-wrap: anywhere; white-space: normal; }
.code { font: .9em ui-monospace, monospace; } .sentence { opacity: .75; font-size: .9em; }
.badge { display: inline-block; min-width: 1.7em; padding: 0 .4em; border-radius: .6em; color: #fff; font-weight: 600; }
.PASS { background: var(--pass); } .FAIL { background: var(--fail); }
.UNSUPPORTED { background: var(--none); } .UNKNOWN { background: var(--unknown); }
.count { display: block; font-size: .75em; opacity: .7; }
pre { overflow-x: auto; padding: .75rem; background: #8881; border-radius: .4rem; font-size: .85em; }
summary { cursor: pointer; padding: .25rem 0; }
ul.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .9em; }
@media (max-width: 40rem) { .sentence { display: none; } body { padding: .6rem; } th, td { padding: .3rem .25rem; } }
"""


def as_markdown(certificate: Certificate) -> str:
    """Returns the certificate for a README or a job summary."""
    backends = certificate.backends
    lines = ["# dcpbench certificate", "", f"{_setting(certificate)}.", ""]
    lines += [f"- **{backend}**: {_summary(certificate, backend)}" for backend in backends]
    lines += _lacks(certificate)
    lines += ["", "| rule | must | " + " | ".join(backends) + " |", "| --- | --- |" + " --- |" * len(backends)]
    for code, rule in RULES.items():
        cells = (_cell(certificate.entry(code, backend)) for backend in backends)
        lines.append(f"| {code} {rule.name} | {rule.sentence} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {_MARKS[status]} {status}: {text}" for status, text in _STATUSES.items())]
    if certificate.together:
        lines += ["", "## Together", "", "| who | cases | broken |", "| --- | --- | --- |"]
        lines += [f"| {one.name} | {one.num_cases} | {_broken(one)} |" for one in certificate.together]
    lines += ["", *_unmatched(certificate)] if certificate.unmatched else []
    for backend in backends:
        for entry in certificate.failures(backend):
            lines += ["", f"## {entry.rule} on {backend}", ""]
            lines += ["```", entry.failure.text, "```"] if entry.failure else [_without_case(entry)]
            lines += [f"\n{implied}" for implied in _implied(entry)]
    for one in certificate.together:
        lines += ["", f"## {one.failure.rule} on {one.name}", "", "```", one.failure.text, "```"] if one.failure else []
    return "\n".join(lines) + "\n"


def as_html(certificate: Certificate) -> str:
    """Returns the certificate as a page: works from a file, on a phone, and asks nothing of the network."""
    body = "\n".join(_body(certificate))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>dcpbench certificate</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _body(certificate: Certificate) -> Iterator[str]:
    yield f"<h1>dcpbench certificate</h1>\n<p>{escape(_setting(certificate))}.</p>\n<ul>"
    for backend in certificate.backends:
        yield f"<li><b>{escape(backend)}</b>: {escape(_summary(certificate, backend))}</li>"
    yield "</ul>"
    yield from (f"<p class='about'>{escape(line.removeprefix('- '))}</p>" for line in _lacks(certificate) if line)
    yield "<ul class='legend'>"
    for status, text in _STATUSES.items():
        yield f"<li>{_badge(status)} {status}: {text}</li>"
    yield "</ul>"
    yield from _failures(certificate)
    for family, about in FAMILIES.items():
        yield f"<h2>{escape(family.capitalize())}</h2>\n<p class='about'>{escape(about)}</p>"
        heads = "".join(f"<th class='backend'>{_breakable(backend)}</th>" for backend in certificate.backends)
        yield f"<div class='wide'><table>\n<tr><th>rule</th>{heads}</tr>"
        for code, rule in RULES.items():
            if rule.family == family:
                cells = "".join(_html_cell(certificate.entry(code, backend)) for backend in certificate.backends)
                name = f"<span class='code'>{code}</span> {escape(rule.name)}"
                yield f"<tr><td>{name}<div class='sentence'>{escape(rule.sentence)}</div></td>{cells}</tr>"
        yield "</table></div>"
    if certificate.together:
        yield "<h2>Together</h2>\n<p class='about'>The one loads what the other saved, or each brings parts.</p>"
        yield "<div class='wide'><table>\n<tr><th>who</th><th>cases</th><th>broken</th></tr>"
        for one in certificate.together:
            yield f"<tr><td>{_breakable(one.name)}</td><td>{one.num_cases}</td><td>{escape(_broken(one))}</td></tr>"
        yield "</table></div>"
        shown = [one.failure for one in certificate.together if one.failure]
        for failure in shown:
            title = f"{failure.rule} on {failure.backend}"
            yield f"<details><summary>{escape(title)}</summary><pre>{escape(failure.text)}</pre></details>"
    yield from (f"<p>{escape(line)}</p>" for line in _unmatched(certificate))
    yield "<h2>Made with</h2>\n<p>" + ", ".join(f"{escape(n)} {escape(v)}" for n, v in certificate.versions) + "</p>"


def _failures(certificate: Certificate) -> Iterator[str]:
    for backend in certificate.backends:
        broken = certificate.failures(backend)
        if not broken:
            continue
        yield f"<h2>Broken by {escape(backend)}</h2>\n<p class='about'>The most basic rule first.</p>"
        for entry in broken:
            rule = RULES[entry.rule]
            text = f"<pre>{escape(entry.failure.text)}</pre>" if entry.failure else ""
            shown = text or f"<p>{escape(_without_case(entry))}</p>"
            implied = "".join(f"<p>{escape(line)}</p>" for line in _implied(entry))
            title = f"<span class='code'>{entry.rule}</span> {escape(rule.name)}: {escape(rule.sentence)}"
            yield f"<details><summary>{title}</summary>{shown}{implied}</details>"


def _breakable(backend: str) -> str:
    """Returns the name of a backend as HTML that may break behind its dots and colons."""
    return re.sub(r"([.:,])", r"\1<wbr>", escape(backend))


def _setting(certificate: Certificate) -> str:
    return (
        f"Profile {certificate.profile} on {certificate.world_size} ranks, {certificate.device}, "
        f"seed {certificate.seed}, {certificate.seconds:.0f} s, {certificate.made_at}"
    )


def _summary(certificate: Certificate, backend: str) -> str:
    number = certificate.backends.index(backend)
    counts = ", ".join(f"{certificate.count(backend, status)} {status}" for status in _STATUSES)
    unknown = certificate.num_unknown[number]
    more = f", {unknown} of them could not be judged" if unknown else ""
    return f"{counts}; {certificate.num_cases[number]} cases{more}"


def _cell(entry: Entry) -> str:
    return f"{_MARKS[entry.status]} {entry.status} ({_count(entry)})"


def _count(entry: Entry) -> str:
    if entry.status == "FAIL":
        if not entry.num_cases:
            return "over all cases"  # such as C003, which no single case can break
        known = f", {entry.num_known} known" if entry.num_known else ""
        return f"{entry.num_broken} of {entry.num_cases}{known}"
    counts = [f"{entry.num_cases}"] if entry.num_cases or entry.status == "PASS" else []
    counts += [f"{entry.num_inherited} inherited"] if entry.num_inherited else []
    counts += [f"{entry.num_unsupported} unsupported"] if entry.num_unsupported else []
    return ", ".join(counts) or "no case"


def _html_cell(entry: Entry) -> str:
    return f"<td class='status'>{_badge(entry.status)}<span class='count'>{escape(_count(entry))}</span></td>"


def _badge(status: str) -> str:
    return f"<span class='badge {status}' title='{status}'>{_MARKS[status]}</span>"


def _without_case(entry: Entry) -> str:
    return f"{entry.num_known} findings, all explained by known defects of {entry.backend}."


def _lacks(certificate: Certificate) -> list[str]:
    """Returns a line for each backend that lacks something."""
    pairs = zip(certificate.backends, certificate.absent, strict=False)
    return ["", *(f"- {backend} has no {', '.join(absent)}" for backend, absent in pairs if absent)]


def _broken(one: Together) -> str:
    if not one.broken:
        return "nothing"
    return ", ".join(one.broken) + (", all by known defects" if one.is_known else "")


def _unmatched(certificate: Certificate) -> list[str]:
    return [f"No case met the known defect {name!r} of {backend}." for backend, name in certificate.unmatched]


def _implied(entry: Entry) -> list[str]:
    implied = RULES[entry.rule].implies
    return [f"What breaks this may break {', '.join(implied)} as well."] if implied else []

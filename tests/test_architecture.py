"""The house rules that a machine can hold: who imports whom, no drawers without a name, the public surface."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dcpbench
from dcpbench import rules

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "hypothesis", "pandas", "pytest", "pyarrow", "_pytest"}
ALLOWED = {
    "errors": set(),
    "geometry": set(),
    "rules": set(),
    "case": set(),
    "case_files": set(),
    "protocol_case": set(),
    "protocol_seen": set(),
    "bench.planning_models": set(),
    "bench.planning_page": set(),
    "bench.planning_scale": set(),
    "models.case": set(),
    "models.facts": set(),
    "models.observed": set(),
    "models.tree": set(),
    "codec": set(),
    "objects": set(),
    "content": set(),
    "messages": set(),
    "facts": set(),
    "known_defects": set(),
    "oracle": set(),
    "report": {"pandas"},
    "bench.record": {"pandas"},
    "strategies": {"hypothesis"},
    "suite_session": {"hypothesis"},
    "plugin": {"hypothesis", "pytest"},
    "cli": set(),
    "replay": set(),
    "ranks.pool": set(),
}


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The top-level names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("area", ALLOWED)
def test_a_part_imports_only_what_it_may(area):
    place = ROOT / "dcpbench" / area.replace(".", "/")
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files
    for path in files:
        heavy = {name.split(".")[0] for name in imported(path)} & HEAVY
        assert heavy <= ALLOWED[area], f"{path.relative_to(ROOT)} imports {sorted(heavy - ALLOWED[area])}"


def test_the_oracle_knows_no_backend():
    for path in python_files("dcpbench/oracle"):
        assert not any(name.startswith(("reference", "dcpbench.backends", "dcpbench.ranks")) for name in imported(path))


def test_the_reference_stands_alone():
    for path in python_files("reference"):
        assert not any(name.split(".")[0] in {"dcpbench", "tests", "suites"} for name in imported(path)), path


def test_the_suites_name_no_backend():
    for path in python_files("suites"):
        assert {name.split(".")[0] for name in imported(path)} <= {
            "dcpbench",
            "hypothesis",
            "pytest",
        } | sys.stdlib_module_names


def test_no_drawers_without_a_name():
    torchs = ROOT / "reference" / "utils.py"  # a name that code written against DCP imports; it only hands names on
    for folder in ("dcpbench", "reference", "suites", "tests"):
        for path in python_files(folder):
            assert path.stem not in {"utils", "util", "common", "helpers", "misc"} or path == torchs, path
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.parse(torchs.read_text()).body)


def test_modules_read_in_a_sitting():
    for folder in ("dcpbench", "reference", "suites"):
        for path in python_files(folder):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_the_public_names_are_sorted_and_there():
    assert dcpbench.__all__ == sorted(dcpbench.__all__)
    for name in dcpbench.__all__:
        assert getattr(dcpbench, name).__doc__


def test_the_controller_needs_no_torch():
    script = (
        "import json, runpy, sys, dcpbench.plugin, dcpbench.report.terminal\n"
        "for path in sys.argv[1:]: runpy.run_path(path)\n"
        "print(json.dumps([name for name in ('torch', 'reference') if name in sys.modules]))"
    )
    suites = map(str, sorted((ROOT / "suites").glob("test_*.py")))
    done = subprocess.run([sys.executable, "-c", script, *suites], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == []


def test_the_page_of_rules_is_made_from_the_catalogue():
    assert (ROOT / "docs" / "rules.md").read_text(encoding="utf-8") == rules.as_markdown()


def test_rules_are_numbered_by_family_and_read_as_demands():
    families = list(rules.FAMILIES)
    numbered = {}
    for rule in rules.RULES.values():
        assert rule.family in families
        assert " must " in rule.sentence or " may " in rule.sentence
        assert numbered.setdefault(rule.code[:2], rule.family) == rule.family
    assert list(rules.RULES) == sorted(rules.RULES)

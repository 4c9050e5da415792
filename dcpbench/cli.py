"""The command line: ``dcpbench`` = ``python -m dcpbench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcpbench import __version__, rules
from dcpbench.bench_commands import add_bench, add_compare, add_report
from dcpbench.errors import DcpbenchError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 all is well, 1 a rule is broken or a goal missed, 2 bad input."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        return int(given.run(given))
    except DcpbenchError as error:
        print(f"dcpbench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dcpbench: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcpbench", description="Correctness and benchmarks for distributed checkpoints."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    replay = commands.add_parser("replay", help="run a case file again and print the verdict")
    replay.add_argument("file", type=Path, help="what a failing suite wrote under results/failures/")
    replay.add_argument("--backend", help="backend to run it on (default: the one that the file names)")
    replay.add_argument("--load-backend", help="backend that loads, if another one than saves")
    replay.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    replay.add_argument("--rank-timeout", type=float, default=60.0, metavar="SECONDS")
    replay.set_defaults(run=_replay)

    script = commands.add_parser("script", help="write a standalone script that shows what a case file shows")
    script.add_argument("file", type=Path, help="a case file")
    script.add_argument("--backend", default="torch", help="torch (default) or reference")
    script.set_defaults(run=_script)

    catalogue = commands.add_parser("rules", help="print the rules that a backend must keep")
    catalogue.add_argument("--markdown", action="store_true", help="as the page docs/rules.md")
    catalogue.set_defaults(run=_rules)

    conform = commands.add_parser("conformance", help="run the suites on a backend and write its certificate")
    conform.add_argument("--backend", action="append", required=True, metavar="NAME", help="may be given several times")
    conform.add_argument("--out", type=Path, default=Path("certificate"), metavar="DIR", help="(default: certificate)")
    conform.add_argument("--world-size", type=int, default=4, metavar="N", help="ranks (default: 4)")
    conform.add_argument("--profile", default="quick", metavar="quick|standard|nightly", help="(default: quick)")
    conform.add_argument("more", nargs="*", metavar="ARGUMENT", help="further arguments of pytest, behind --")
    conform.set_defaults(run=_conformance)

    _add_power(commands)
    bench = commands.add_parser("bench", help="measure").add_subparsers(required=True, metavar="WHAT")
    _add_benches(bench)
    add_bench(bench)
    add_compare(commands)
    add_report(commands)
    faults = commands.add_parser("faults", help="crashes, failing calls, damage, hostile files").add_subparsers(
        required=True, metavar="WHAT"
    )
    table = faults.add_parser("table", help="print docs/faults.md: backends side by side")
    table.add_argument("--backend", action="append", help="several times (default: torch and reference)")
    table.add_argument("--trials", type=int, default=10_000, metavar="N", help="of damage (default: 10000)")
    table.set_defaults(run=_faults_table)
    trace = faults.add_parser("trace", help="print what a save does to its storage, and how a crash breaks it")
    trace.add_argument("--backend", default="torch", help="torch (default), reference or package.module:attribute")
    trace.add_argument("--scenario", default="overwrite", help="what is saved (default: overwrite)")
    trace.set_defaults(run=_faults_trace)
    again = faults.add_parser("replay", help="load the storage in a failure's file again")
    again.add_argument("file", type=Path, help="what a failing fault suite wrote under results/failures/")
    again.add_argument("--backend", help="backend that loads (default: the one that the file names)")
    again.set_defaults(run=_faults_replay)
    return parser


def _add_power(commands: Any) -> None:
    power = commands.add_parser("power", help="run the suites on a bank of wrong and odd backends: what do they find?")
    power.add_argument("--bank", default="tests.bank", metavar="MODULE", help="(default: tests.bank, in a checkout)")
    power.add_argument(
        "--only", action="append", metavar="TEXT", help="backends with this in their name; several times"
    )
    power.add_argument("--half", default="", choices=("tuning", "reporting"), help="of the mutants; nothing odd")
    power.add_argument("--world-size", type=int, default=4, metavar="N", help="ranks (default: 4)")
    power.add_argument("--profile", default="standard", metavar="quick|standard|nightly", help="(default: standard)")
    power.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    power.add_argument("--seeds", type=int, default=10, metavar="N", help="runs of each odd backend (default: 10)")
    power.add_argument("--rank-timeout", type=float, default=10.0, metavar="SECONDS", help="(default: 10)")
    power.add_argument("--shrink-seconds", type=float, default=20.0, metavar="SECONDS", help="(default: 20)")
    power.add_argument("--max-seconds", type=float, default=600.0, metavar="SECONDS", help="per mutant (default: 600)")
    power.add_argument("--rows", type=Path, metavar="FILE", help="go on with a file of rows (default: a new one)")
    power.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    power.add_argument("--page", type=Path, metavar="FILE", help="write the kill matrix as Markdown")
    power.set_defaults(run=_power)

    coverage = commands.add_parser("coverage", help="print docs/coverage.md: what of DCP the generated cases reach")
    coverage.add_argument("--profile", default="standard", metavar="quick|standard|nightly", help="(default: standard)")
    coverage.add_argument("--world-size", type=int, default=8, metavar="N", help="ranks (default: 8)")
    coverage.set_defaults(run=_coverage)


def _add_benches(bench: Any) -> None:
    harness = bench.add_parser("harness", help="what the harness itself costs, side by side with bare calls")
    harness.add_argument("--world-size", type=int, default=8, metavar="N")
    harness.add_argument("--trips", type=int, default=15, metavar="N", help="round trips per sample")
    harness.set_defaults(run=_bench_harness)
    reference = bench.add_parser("reference", help="the reference beside torch and the raw I/O limit")
    reference.add_argument("--rounds", type=int, default=5, metavar="N", help="timed rounds (default: 5)")
    reference.add_argument("--scale", type=float, default=1.0, metavar="SHARE", help="of the state (default: 1.0)")
    reference.add_argument("--disk", type=Path, metavar="FOLDER", help="a folder on a disk (default: the system's)")
    reference.add_argument("--json", type=Path, metavar="FILE", help="write every sample to a file")
    reference.add_argument("--gate", action="store_true", help="exit with 1 if a goal is missed")
    reference.set_defaults(run=_bench_reference)
    simulator = bench.add_parser("simulator", help="cases a second, legal orders, and one case of thousands of ranks")
    simulator.add_argument("--seconds", type=float, default=5.0, metavar="S", help="on each storage (default: 5)")
    simulator.add_argument("--ranks", type=int, default=4096, metavar="N", help="of the large case (default: 4096)")
    simulator.add_argument("--tensors", type=int, default=500, metavar="N", help="of the large case (default: 500)")
    simulator.set_defaults(run=_bench_simulator)
    planning = bench.add_parser("planning", help="planning at scale, torch and the reference side by side")
    planning.add_argument("--ranks", default="64,256,1024,4096", metavar="N,…", help="(default: 64,256,1024,4096)")
    planning.add_argument("--model", action="append", metavar="NAME", help="llama3-405b, moe-1t (default: both)")
    planning.add_argument(
        "--whole-up-to", type=int, default=4096, metavar="N", help="beyond it without the coordinator (default: 4096)"
    )
    planning.add_argument("--runs", type=Path, metavar="FILE", help="keep each run there, and make none twice")
    planning.add_argument("--out", type=Path, metavar="FOLDER", help="write scale.md and planning.svg (such as docs)")
    planning.set_defaults(run=_bench_planning)


def _replay(given: argparse.Namespace) -> int:
    from dcpbench.replay import replay  # the ranks' modules load only where a command needs them

    done = replay(
        given.file,
        backend=given.backend,
        load_backend=given.load_backend,
        device=given.device,
        rank_timeout_s=given.rank_timeout,
    )
    via = done.backend if done.backend == done.load_backend else f"{done.backend} to {done.load_backend}"
    for finding in done.verdict.findings:
        print(f"{finding.text()}\n")
    reason = f": {done.verdict.reason}" if done.verdict.reason else ""
    print(f"{done.case.id} on {via}: {done.verdict.status}{reason}")
    return 0 if done.verdict.status == "PASS" else 1


def _script(given: argparse.Namespace) -> int:
    from dcpbench.case_files import load_case
    from dcpbench.script import as_script

    print(as_script(load_case(given.file), given.backend), end="")
    return 0


def _rules(given: argparse.Namespace) -> int:
    if given.markdown:
        print(rules.as_markdown(), end="")
    else:
        for rule in rules.RULES.values():
            print(f"{rule.code} {rule.name:<22} {rule.sentence}")
    return 0


def _faults_table(given: argparse.Namespace) -> int:
    from dcpbench.faults.report import faults_page

    print(faults_page(given.backend or ["torch", "reference"], given.trials, lambda line: print(line, file=sys.stderr)))
    return 0


def _faults_trace(given: argparse.Namespace) -> int:
    from dcpbench.faults.report import trace_lines

    lines, is_kept = trace_lines(given.backend, given.scenario)
    print("\n".join(lines))
    return 0 if is_kept else 1


def _faults_replay(given: argparse.Namespace) -> int:
    from dcpbench.faults.report import replay_lines

    print("\n".join(replay_lines(given.file, given.backend)))
    return 0


def _bench_harness(given: argparse.Namespace) -> int:
    from dcpbench.bench.harness import measure

    return measure(given.world_size, given.trips)


def _bench_simulator(given: argparse.Namespace) -> int:
    from dcpbench.bench.simulator import Options, measure

    return measure(Options(given.seconds, given.ranks, given.tensors))


def _bench_planning(given: argparse.Namespace) -> int:
    from dcpbench.bench.planning_scale import measure

    return measure(given.ranks, given.model, given.runs, given.out, whole_up_to=given.whole_up_to)


def _conformance(given: argparse.Namespace) -> int:
    from dcpbench.conformance import conformance

    return conformance(
        given.backend, given.out.resolve(), world_size=given.world_size, profile=given.profile, more=given.more
    )


def _coverage(given: argparse.Namespace) -> int:
    from dcpbench.coverage.page import coverage_page, drawn_counts, empty_rows

    counts = drawn_counts(given.profile, given.world_size)
    print(coverage_page(counts, given.profile, given.world_size), end="")
    if empty := empty_rows(counts):
        print(f"dcpbench: nothing reaches {', '.join(empty)}, and no reason is given", file=sys.stderr)
    return 1 if empty else 0


def _power(given: argparse.Namespace) -> int:
    from dcpbench.power.run import Options, power

    return power(
        Options(
            given.bank,
            tuple(given.only or ()),
            given.half,
            given.world_size,
            given.profile,
            given.seed,
            given.seeds,
            given.rank_timeout,
            given.shrink_seconds,
            given.max_seconds,
            given.rows,
            given.results,
            given.page,
        )
    )


def _bench_reference(given: argparse.Namespace) -> int:
    from dcpbench.bench.reference import Options, measure

    return measure(Options(given.rounds, given.scale, given.disk, given.json, given.gate))


if __name__ == "__main__":
    raise SystemExit(main())

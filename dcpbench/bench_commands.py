"""The commands that measure, compare and report, for :mod:`dcpbench.cli`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dcpbench.errors import expected

__all__ = ["add_bench", "add_compare", "add_report"]

_DEFAULTS = "llama3-8b, one rank's view of llama3-70b, many-small, few-huge"


def add_bench(bench: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``run``, ``counters``, ``memory`` and ``honesty`` to ``dcpbench bench``."""
    run = bench.add_parser("run", help="backends beside each other, with proofs, on real ranks")
    run.add_argument("--workload", action="append", metavar="NAME", help=f"several times (default: {_DEFAULTS})")
    run.add_argument("--layout", action="append", metavar="NAME", help="fsdp2, hsdp, tp, 3d (default: fsdp2 and tp)")
    run.add_argument("--backend", action="append", metavar="NAME", help="(default: torch, reference, gathered)")
    run.add_argument("--world-size", type=int, default=2, metavar="N", help="ranks that save (default: 2)")
    run.add_argument("--load-world-size", type=int, action="append", metavar="N", help="ranks that load, several times")
    run.add_argument("--rounds", type=int, default=5, metavar="N", help="timed rounds (default: 5)")
    run.add_argument("--size", type=int, default=32, metavar="MIB", help="scale each state down to it (default: 32)")
    run.add_argument("--scale", type=float, metavar="SHARE", help="of the published size instead of --size")
    run.add_argument("--storage", type=Path, metavar="DIR", help="where to save (default: the results folder)")
    run.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    run.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    run.add_argument("--warm", action="store_true", help="load from the page cache, and say so")
    run.add_argument("--no-async", action="store_true", help="leave out saves in the background")
    run.add_argument("--mtbf", type=float, default=4.0, metavar="HOURS", help="between failures (default: 4)")
    run.set_defaults(run=_run)

    counters = bench.add_parser("counters", help="system calls, bytes, collectives and copies of small cases")
    counters.add_argument("--expect", type=Path, metavar="FILE", help="exit with 1 where they differ from this file")
    counters.add_argument("--write", type=Path, metavar="FILE", help="write them to a file")
    counters.set_defaults(run=_counters)

    memory = bench.add_parser("memory", help="fit peak = a + b x local bytes over a sweep")
    memory.add_argument("--backend", action="append", metavar="NAME", help="(default: torch, reference)")
    memory.add_argument("--storage", type=Path, default=Path(), metavar="DIR", help="(default: this folder)")
    memory.set_defaults(run=_memory)

    honesty = bench.add_parser("honesty", help="false alarms, planted slowdowns and memory, an outside clock")
    honesty.add_argument("--trials", type=int, default=20, metavar="N", help="comparisons of each kind (default: 20)")
    honesty.add_argument("--rounds", type=int, default=40, metavar="N", help="pairs in each (default: 40)")
    honesty.add_argument("--size", type=int, default=16, metavar="MIB", help="of the state (default: 16)")
    honesty.add_argument("--storage", type=Path, default=Path(), metavar="DIR", help="(default: this folder)")
    honesty.set_defaults(run=_honesty)


def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``dcpbench compare``."""
    compare = commands.add_parser("compare", help="two runs, or two backends of one: faster, slower, same, cannot tell")
    compare.add_argument("first", metavar="A", help="a run's folder; with --in, a backend")
    compare.add_argument("second", metavar="B", help="another; the verdict is about this one")
    compare.add_argument("--in", dest="within", type=Path, metavar="RUN", help="compare backends A and B of this run")
    compare.add_argument("--alpha", type=float, default=0.01, help="chance of a false alarm (default: 0.01)")
    compare.add_argument("--margin", type=float, default=0.03, help="what still counts as the same (default: 0.03)")
    compare.add_argument("--strict", action="store_true", help="exit with 3 where it cannot be told")
    compare.set_defaults(run=_compare)


def add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``dcpbench report``."""
    report = commands.add_parser("report", help="a run as an HTML page, Markdown and CSV")
    report.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder, results/<machine>/<time>")
    report.add_argument("--out", type=Path, metavar="DIR", help="(default: the run's folder)")
    report.add_argument("--history", type=Path, metavar="DIR", help="a results folder with earlier runs to plot")
    report.set_defaults(run=_report)


def _run(given: argparse.Namespace) -> int:
    from dcpbench.bench.group import Rounds
    from dcpbench.bench.run import DEFAULT_BACKENDS, DEFAULT_LAYOUTS, DEFAULT_WORKLOADS, Matrix, measure
    from dcpbench.bench.status_line import say
    from dcpbench.report.bench_files import write_report
    from dcpbench.report.bench_tables import terminal_line, terminal_title

    if given.mtbf <= 0:
        raise expected("more than 0 hours", "--mtbf", given.mtbf, "Give, for example, 4.")
    matrix = Matrix(
        workloads=tuple(given.workload or DEFAULT_WORKLOADS),
        layouts=tuple(given.layout or DEFAULT_LAYOUTS),
        backends=tuple(dict.fromkeys(given.backend or DEFAULT_BACKENDS)),
        world_size=given.world_size,
        load_world_sizes=tuple(given.load_world_size or ()),
        size_mib=given.size,
        scale=given.scale,
        device=given.device,
        storage=given.storage,
        results=given.results,
        rounds=Rounds(given.rounds, not given.warm, not given.no_async, mtbf_s=given.mtbf * 3600),
    )
    shown: list[str] = []

    def show(row: object) -> None:
        say("")
        if not shown:
            print(terminal_title(), flush=True)
        shown.append(terminal_line(row))  # type: ignore[arg-type]
        print(shown[-1], flush=True)

    run = measure(matrix, show, say)
    page = write_report(run, run.folder, run.folder.parent.parent)
    print(f"\n{page}")
    return 0 if all(row.status == "VALID" for row in run.rows) else 1


def _compare(given: argparse.Namespace) -> int:
    from dcpbench.bench.store import read_run
    from dcpbench.report.comparison import Change, compare_backends, compare_runs, exit_code, lines_of

    if not 0 < given.alpha < 0.5 or not 0 < given.margin < 1:
        raise expected("--alpha below 0.5 and --margin below 1", "--alpha", given.alpha, "Give, for example, 0.01.")
    changes: list[Change] = []
    if given.within is not None:
        run = read_run(given.within)
        compared = compare_backends(run, given.first, given.second, alpha=given.alpha, margin=given.margin)
    else:
        first, second = (read_run(Path(name)) for name in (given.first, given.second))
        compared, changes = compare_runs(first, second, alpha=given.alpha, margin=given.margin)
    print("\n".join(lines_of(compared, changes)))
    return exit_code(compared, changes, is_strict=given.strict)


def _report(given: argparse.Namespace) -> int:
    from dcpbench.bench.store import read_run
    from dcpbench.report.bench_files import write_report

    run = read_run(given.run_folder)
    print(write_report(run, given.out or run.folder, given.history))
    return 0


def _counters(given: argparse.Namespace) -> int:
    from dcpbench.bench.gate import differences, measure_counters, read_counters, write_counters

    found = measure_counters()
    if given.write is not None:
        write_counters(found, given.write)
    expected_counts = read_counters(given.expect) if given.expect is not None else {}
    lines = differences(expected_counts, found) if expected_counts else []
    for name, counts in found.items():
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in counts.items())}")
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


def _memory(given: argparse.Namespace) -> int:
    from dcpbench.bench.memory_law import measure_laws

    for line in measure_laws(tuple(given.backend or ("torch", "reference")), given.storage):
        print(line, flush=True)
    return 0


def _honesty(given: argparse.Namespace) -> int:
    from dcpbench.bench.honesty import Experiment, measure_honesty

    return measure_honesty(Experiment(given.trials, given.rounds, given.size, given.storage))

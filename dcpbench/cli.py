"""The command line: ``dcpbench`` = ``python -m dcpbench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dcpbench import __version__, rules
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

    bench = commands.add_parser("bench", help="measure").add_subparsers(required=True, metavar="WHAT")
    harness = bench.add_parser("harness", help="what the harness itself costs, side by side with bare calls")
    harness.add_argument("--world-size", type=int, default=8, metavar="N")
    harness.add_argument("--trips", type=int, default=15, metavar="N", help="round trips per sample")
    harness.set_defaults(run=_bench_harness)
    return parser


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
    from dcpbench.case import Case
    from dcpbench.script import as_script

    print(as_script(Case.load(given.file), given.backend), end="")
    return 0


def _rules(given: argparse.Namespace) -> int:
    if given.markdown:
        print(rules.as_markdown(), end="")
    else:
        for rule in rules.RULES.values():
            print(f"{rule.code} {rule.name:<22} {rule.sentence}")
    return 0


def _bench_harness(given: argparse.Namespace) -> int:
    from dcpbench.bench.harness import measure

    return measure(given.world_size, given.trips)


if __name__ == "__main__":
    raise SystemExit(main())

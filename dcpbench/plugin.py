"""The pytest plugin: options, fixtures, header, verdicts into reports. Runs in the controller."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from dcpbench import codec, known_defects, profiles
from dcpbench.backends import parts, registry
from dcpbench.backends.parts import names_in
from dcpbench.errors import DcpbenchError, UsageError, expected
from dcpbench.oracle.verdict import RuleBrokenError
from dcpbench.profiles import PROFILES
from dcpbench.report.certificate import STATUSES, Failure, write_certificate
from dcpbench.report.progress import Progress
from dcpbench.strategies import scope
from dcpbench.suite_session import Settings, SuiteSession
from dcpbench.suites_folder import SUITES

__all__ = ["session_of"]

MAX_WORLD_SIZE = 128
_NEEDS_TWO = "needs two backends of the same format: give --backend=torch --backend=reference"
_BACKEND_PARAMETERS = ("backend", "saver", "loader", "swapped")
_SESSION = pytest.StashKey[SuiteSession]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dcpbench", "distributed checkpoint suites")
    group.addoption("--world-size", type=int, default=4, metavar="N", help="ranks to run on (default: 4)")
    group.addoption("--device", default="cpu", metavar="cpu|cuda", help="where tensors live (default: cpu)")
    group.addoption(
        "--backend",
        action="append",
        metavar="NAME",
        help="backend under test: torch, reference or package.module:attribute; may be given several times "
        "(default: torch and reference)",
    )
    group.addoption(
        "--profile", default="standard", metavar="|".join(PROFILES), help="how many cases (default: standard)"
    )
    group.addoption(
        "--rank-timeout", type=float, default=60.0, metavar="SECONDS", help="when a rank counts as hung (default: 60)"
    )
    group.addoption(
        "--results", default="results", metavar="DIR", help="where records and failures go (default: results)"
    )
    group.addoption(
        "--known-defects",
        type=Path,
        metavar="FILE",
        help="known defects of the backends under test (default: those that dcpbench knows of torch)",
    )
    group.addoption("--certificate", metavar="DIR", help="write a certificate there: every rule on every backend")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    try:
        settings = _settings(config)
        files = _defect_files(settings, config.getoption("--known-defects"))
        defects = {name: known_defects.load_defects(file, name) for name, file in files.items()}
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    scope.max_world_size = settings.world_size
    profiles.register()
    hypothesis.settings.load_profile(settings.profile)
    known = getattr(config, "workerinput", {}).get("dcpbench", {"torch_parts": {}, "described": {}})
    config.stash[_SESSION] = SuiteSession(settings, defects, known["torch_parts"], files)
    config.stash[_SESSION].backends.described |= known["described"]


def _settings(config: pytest.Config) -> Settings:
    world_size = config.getoption("--world-size")
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise expected(f"1 to {MAX_WORLD_SIZE} ranks", "--world-size", world_size, "Give a number in that range.")
    device = config.getoption("--device")
    if device not in ("cpu", "cuda"):
        raise expected("'cpu' or 'cuda'", "--device", device, "Give one of them.")
    profile = config.getoption("--profile")
    if profile not in PROFILES:
        raise expected(f"one of {', '.join(PROFILES)}", "--profile", profile, "Give one of them.")
    timeout = config.getoption("--rank-timeout")
    if not 0 < timeout <= 86_400:
        raise expected("seconds above 0, at most a day", "--rank-timeout", timeout, "Give, for example, 60.")
    backends = tuple(dict.fromkeys(config.getoption("--backend") or ["torch", "reference"]))
    for backend in backends:
        registry.check_spelling(backend)
    return Settings(world_size, device, backends, profile, timeout, Path(config.getoption("--results")))


def _defect_files(settings: Settings, own: Path | None) -> dict[str, Path]:
    """Returns the list of known defects of each backend: of those that ship beside the suites, of others ``own``."""
    files = {name: SUITES / "known_defects" / f"{name}.toml" for name in (*registry.KNOWN, *settings.backends)}
    if own is not None:
        if not own.is_file():
            raise expected("a file of known defects", "--known-defects", str(own), "Give one, or leave it out.")
        files |= dict.fromkeys(settings.backends, own)
    return files


def session_of(config: pytest.Config) -> SuiteSession:
    """Returns the suite session of this pytest run."""
    return config.stash[_SESSION]


def pytest_report_header(config: pytest.Config) -> str:
    session = session_of(config)
    used = session.settings
    known = ", ".join(f"{name} {len(found)}" for name in used.backends if (found := session.defects[name])) or "none"
    return (
        f"dcpbench: {used.world_size} ranks on {used.device}, backends {', '.join(used.backends)}, "
        f"profile {used.profile} ({PROFILES[used.profile]} cases a test), known defects: {known}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = session_of(metafunc.config)
    names = session.settings.backends
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", names)
    if "saver" in metafunc.fixturenames:
        shared = [name for name in names if name in registry.KNOWN]
        pairs = [pytest.param(one, other, id=f"{one}-to-{other}") for one in shared for other in shared if one != other]
        metafunc.parametrize(("saver", "loader"), pairs or [_none("torch", "reference", why=_NEEDS_TWO)])
    if "swapped" in metafunc.fixturenames:
        both = combinations([name for name in names if name in registry.KNOWN], 2)
        mixed = [s for one, other in both for s in parts.combinations(one, other) if len(names_in(s)) > 1]
        ids = ["-".join((parts.parts_of(specification) or {}).values()) for specification in mixed]
        metafunc.parametrize("swapped", mixed or [_none("", why=_NEEDS_TWO)], ids=ids or None)
    if "regression" in metafunc.fixturenames:
        files = sorted((SUITES / "regressions").glob("*.json"))
        regressions = [pytest.param(file, id=file.stem) for file in files]
        metafunc.parametrize("regression", regressions or [_none(None, why="no case ever failed")])
    if "known_defect" in metafunc.fixturenames:
        entries = [pytest.param(entry, id=f"{name}-{entry.id}") for name in names for entry in session.defects[name]]
        why = f"no known defects of {', '.join(names)}"
        metafunc.parametrize("known_defect", entries or [_none(None, why=why)])


def _none(*values: object, why: str) -> Any:
    """Returns the one parameter set of a test that has none: it is skipped, with the reason."""
    return pytest.param(*values, marks=pytest.mark.skip(reason=why), id="none")


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    session_of(config).is_whole = _runs_all_suites(session)
    needs_ranks = any("pool" in getattr(item, "fixturenames", ()) for item in session.items)
    if not needs_ranks or config.getoption("collectonly"):
        return
    suite = session_of(config)
    try:
        from dcpbench.bench.record import check_writable

        check_writable(suite.settings.results)
        if not hasattr(config, "workerinput"):  # the controller of xdist has done it for its workers
            _check_backends(suite)
    except DcpbenchError as error:
        suite.close()
        raise pytest.UsageError(str(error)) from error


def _runs_all_suites(session: pytest.Session) -> bool:
    collected = {item.path for item in session.items}
    option = session.config.option
    is_selected = option.keyword or option.markexpr or option.deselect or getattr(option, "lf", False)
    return collected >= set(SUITES.glob("test_*.py")) and not is_selected


def _check_backends(suite: SuiteSession) -> None:
    """Has a rank open each backend: a module that fails to import ends the run with one line."""
    for name in suite.settings.backends:
        suite.backends.check_device(name, suite.settings.device)
        if name not in registry.KNOWN:
            suite.torch_parts[name] = suite.backends.torch_parts(name)
        suite.backends.place(name)


def _check_backends_before_workers_start(suite: SuiteSession) -> None:
    unknown = tuple(name for name in suite.settings.backends if name not in registry.KNOWN)
    if not unknown:
        return
    alone = SuiteSession(replace(suite.settings, backends=unknown, world_size=min(2, suite.settings.world_size)), {})
    try:
        _check_backends(alone)
    except DcpbenchError as error:
        raise pytest.UsageError(str(error)) from error
    finally:
        alone.close()
    suite.torch_parts |= alone.torch_parts
    suite.backends.described |= alone.backends.described


def _is_xdist_controller(config: pytest.Config) -> bool:
    return bool(getattr(config.option, "numprocesses", None)) and not hasattr(config, "workerinput")


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> SuiteSession:
    """The ranks: ``pool.run(case, backend)`` runs a case, ``pool.call(target, world_size)`` a function."""
    return session_of(request.config)


@pytest.fixture(scope="session")
def check(request: pytest.FixtureRequest) -> Any:
    """``check(verdict)``: fails the test if the verdict on the case that ran last has a new finding."""
    return session_of(request.config).check


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Shows progress where output is a terminal; under xdist, opens the backends once for all workers."""
    if _is_xdist_controller(session.config):
        _check_backends_before_workers_start(session_of(session.config))
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not reporter.isatty or _is_xdist_controller(session.config):
        return
    session_of(session.config).show_progress = Progress()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    suite = session_of(item.config)
    suite.begin_test(item.nodeid.rsplit("::", 1)[-1].split("[")[0])
    given = getattr(getattr(item, "callspec", None), "params", {})
    used = {name for one in _BACKEND_PARAMETERS if given.get(one) for name in names_in(given[one])}
    names = used & set(suite.settings.backends)
    scope.absent = frozenset(name for backend in names for name in suite.backends.absent(backend))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    suite = session_of(item.config)
    if call.when == "call":
        if suite.show_progress is not None:
            suite.show_progress("")
        broken = list(_broken_rules(call.excinfo.value)) if call.excinfo else []
        texts = []
        for error in broken:
            file = suite.write_evidence(error)
            texts.append(_text(error, call, suite))
            suite.failures.append(Failure(error.finding.rule, _who(error), texts[-1], str(file)))
        if broken:
            report.longrepr = "\n\n".join(dict.fromkeys(texts))
        elif report.passed and suite.unknown:
            report.outcome = "failed"
            report.longrepr = (
                f"UNKNOWN: {len(suite.unknown)} cases could not be judged, so this is no pass; the machine, not the "
                f"backend, was in the way. First: {suite.unknown[0]}"
            )
    return report


def _broken_rules(error: BaseException) -> Iterator[RuleBrokenError]:
    if isinstance(error, RuleBrokenError):
        yield error
    elif isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _broken_rules(part)


def _who(error: RuleBrokenError) -> str:
    loader = error.evidence.get("load_backend", error.backend)
    return error.backend if loader == error.backend else f"{error.backend} to {loader}"


def _text(error: RuleBrokenError, call: pytest.CallInfo[None], suite: SuiteSession) -> str:
    if call.excinfo is not None and isinstance(call.excinfo.value, hypothesis.errors.Flaky):
        return f"UNKNOWN: not the same twice. Seen once, and not when the case was run again:\n{error}"
    part = suite.guilty_part(error)
    return f"{error}\n  part       {part}" if part else str(error)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    suite = session_of(session.config)
    suite.close()
    if suite.understated() and session.exitstatus == pytest.ExitCode.OK and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["dcpbench"] = {
            "counts": [[*key, number] for key, number in suite.counts.items()],
            "known": [[*key, number] for key, number in suite.known.items()],
            "absences": [[*key, number] for key, number in suite.absences.items()],
            "tally": [[*key, number] for key, number in suite.tally.items()],
            "failures": [codec.to_json(failure) for failure in suite.failures],
            "described": suite.backends.described,
            "rows": suite.rows,
        }


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tells an xdist worker what the controller found out about the backends."""
    suite = session_of(node.config)
    node.workerinput["dcpbench"] = {"torch_parts": suite.torch_parts, "described": suite.backends.described}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes over what an xdist worker counted and recorded."""
    suite = session_of(node.config)
    held = getattr(node, "workeroutput", {}).get("dcpbench", {})
    for *key, number in held.get("counts", ()):
        suite.counts[tuple(key)] += number
    for *key, number in held.get("known", ()):
        suite.known[tuple(key)] += number
    for *key, number in held.get("absences", ()):
        suite.absences[tuple(key)] += number
    for *key, number in held.get("tally", ()):
        suite.tally[tuple(key)] += number
    suite.failures += [codec.from_json(Failure, failure, "xdist worker") for failure in held.get("failures", ())]
    suite.rows += held.get("rows", [])
    suite.backends.described |= held.get("described", {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    suite = session_of(config)
    if not suite.counts or hasattr(config, "workerinput"):
        return
    from dcpbench.report.terminal import summary_lines, write_records

    terminalreporter.section("dcpbench")
    for failure in suite.understated():
        terminalreporter.write_line(failure.text, red=True)
    for line in summary_lines(suite):
        terminalreporter.write_line(line)
    try:
        path = write_records(suite)
    except OSError as error:
        terminalreporter.write_line(f"The records could not be written: {error}.", red=True)
    else:
        terminalreporter.write_line(f"records: {path}")
    if folder := config.getoption("--certificate"):
        _certify(terminalreporter, config, Path(folder))


def _certify(terminalreporter: pytest.TerminalReporter, config: pytest.Config, folder: Path) -> None:
    suite = session_of(config)
    is_same_each_time = suite.settings.profile == "quick"
    seed = "the same each time" if is_same_each_time else str(config.getoption("--hypothesis-seed") or "random")
    certificate = suite.certificate(seed)
    for backend in certificate.backends:
        counts = ", ".join(f"{certificate.count(backend, status)} {status}" for status in STATUSES)
        terminalreporter.write_line(f"certificate of {backend}: {counts}")
    try:
        paths = write_certificate(certificate, folder)
    except OSError as error:
        terminalreporter.write_line(f"The certificate could not be written: {error}.", red=True)
    else:
        terminalreporter.write_line(f"certificate: {', '.join(map(str, paths))}")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _SESSION in config.stash:
        session_of(config).close()

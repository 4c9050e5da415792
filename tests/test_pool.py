"""The rank pool, for real: ranks that die, hang, raise and print, and a controller that is killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import rank_targets

from dcpbench.case import Case, Layout, LeafLayout, Mesh, Part, Placement, Step, TensorLeaf
from dcpbench.errors import RanksUnavailable, UsageError
from dcpbench.messages import Call, RunStep
from dcpbench.ranks.pool import RankPool

SIZE = 4
MARK = "DCPBENCH_TEST_MARK"


@pytest.fixture(scope="module")
def ranks():
    with RankPool(SIZE, rank_timeout_s=60.0, connect_timeout_s=2.0, grace_s=1.0, grace_after_raise_s=1.5) as started:
        yield started


@pytest.fixture
def pool(ranks):
    """The pool, which must still work after the test."""
    ranks.rank_timeout_s = 60.0
    yield ranks
    ranks.rank_timeout_s = 60.0
    seen = call(ranks, "world", SIZE)
    assert [(o.outcome, o.value[0]) for o in seen] == [("ok", SIZE)] * SIZE, seen


def call(pool, target, world_size=SIZE, *, distributed=True, **arguments):
    return pool.step(Call(0, world_size, f"rank_targets:{target}", arguments, distributed))


def outcomes(seen):
    return [observation.outcome for observation in seen]


def pids(pool):
    return [observation.value[1] for observation in call(pool, "world")]


def until(is_so, deadline_s=10.0):
    """Waits for what no event announces: the state of processes that are not ours."""
    deadline = time.monotonic() + deadline_s
    while not (found := is_so()):
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)
    return found


def marked(mark):
    """Returns the pids of living processes with the mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


def test_world_sizes_in_changing_order(pool):
    for world_size in (1, 4, 2, 3, 1, 4):
        seen = call(pool, "world", world_size)
        assert [o.rank for o in seen] == list(range(world_size))
        assert [o.value[0] for o in seen] == [world_size] * world_size


def test_ranks_live_across_steps(pool):
    assert pids(pool) == pids(pool)


def test_no_group_unless_asked_for(pool):
    call(pool, "world", 2)
    (seen,) = call(pool, "alone", 1, distributed=False)
    assert (seen.outcome, seen.value, seen.phase) == ("ok", False, "call")


def test_more_ranks_than_there_are(pool):
    with pytest.raises(UsageError, match=r"world_size=5.*Give --world-size=5 or more\."):
        call(pool, "world", 5)


def test_unknown_target(pool):
    seen = call(pool, "no_such_target", 2)
    assert outcomes(seen) == ["raised"] * 2
    assert seen[0].error.type == "AttributeError"


def test_torch_stays_out_of_the_controller(pool):
    code = "import sys, dcpbench.ranks.pool; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_resources_stay_level(pool):
    before = call(pool, "resources", 2)
    ours = _num_fds()
    for _ in range(200):
        after = call(pool, "resources", 2)
    assert _num_fds() == ours
    for first, last in zip(before, after, strict=True):
        num_fds, num_threads, resident_kib, pid = (b - a for a, b in zip(first.value, last.value, strict=True))
        assert pid == 0
        assert num_fds < 40  # groups on their way out hold theirs for some milliseconds
        assert num_threads < 40
        assert resident_kib < 32 * 1024


def _num_fds():
    return len([*Path("/proc/self/fd").iterdir()])


def round_trip(world_size):
    tensor = TensorLeaf((Part("key", "weight"),), (5, 3))
    layouts = tuple(
        Layout(size, Mesh(("dp",), (size,), tuple(range(size))), (LeafLayout((Placement(0),)),))
        for size in (world_size, 2)
    )
    return Case("pool", 7, (tensor,), (), layouts, (Step("save", 0), Step("load", 1)))


def test_steps_run_on_their_own_world_sizes(pool):
    seen = pool.run(round_trip(3), "torch")
    assert [(o.step, o.rank, o.outcome) for o in seen] == [
        *((0, rank, "ok") for rank in range(3)),
        *((1, rank, "ok") for rank in range(2)),
    ]


@pytest.mark.parametrize(("layout", "prepared"), [(0, 1), (1, None)])
def test_what_comes_next_is_built_while_others_are_busy(pool, tmp_path, layout, prepared):
    case = replace(round_trip(3), steps=(Step("save", 0), Step("load", layout)))
    seen = pool.step(RunStep(0, 3, case, 0, "torch", str(tmp_path)))
    assert outcomes(seen) == ["ok"] * 3
    assert [o.value for o in call(pool, "prepared_step", 3)] == [prepared] * 3
    saved, loaded = seen, pool.step(RunStep(0, 3, case, 1, "torch", str(tmp_path))) if prepared else seen
    # the call between them has made another group: what was built for the one before is of no use
    assert [o.tensors[0].data for o in loaded] == [o.tensors[0].data for o in saved]


def test_the_folder_of_a_case_goes_with_it(pool):
    pool.run(round_trip(2), "torch")
    (folder,) = {o.value for o in call(pool, "temporary_folder", 1)}
    assert not list(Path(folder).glob("case-*"))


def test_first_failed_step_is_the_last(pool):
    seen = pool.run(round_trip(2), "rank_backends:no_such_backend")
    assert [(o.step, o.outcome) for o in seen] == [(0, "raised")] * 2


def test_other_backend_loads(pool):
    seen = pool.run(round_trip(2), "torch", load_backend="rank_backends:no_such_backend")
    assert [(o.step, o.outcome) for o in seen] == [(0, "ok")] * 2 + [(1, "raised")] * 2


def test_death_after_a_step_belongs_to_the_case(pool):
    seen = pool.run(round_trip(2), "rank_backends:crashes_later")
    assert [o.outcome for o in seen[:2]] == ["ok", "ok"]
    assert (seen[3].step, seen[3].outcome, seen[3].error.type) == (1, "died", "exit code 3")


def test_a_case_for_more_ranks_than_there_are(pool):
    with pytest.raises(UsageError, match=r"Give --world-size=5 or more\."):
        pool.run(round_trip(5), "torch")


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("raise", "KeyError", "'lost key'"),
        ("raise worse", "rank_targets.Worse", "no text: its __str__ raised ValueError"),
        ("sys.exit", "SystemExit", "7"),
        ("interrupt", "KeyboardInterrupt", ""),
    ],
)
def test_all_raise(pool, how, kind, text):
    before = pids(pool)
    seen = call(pool, "leave", how=how, ranks=[0, 1, 2, 3])
    assert outcomes(seen) == ["raised"] * SIZE
    assert {(o.error.type, o.error.text) for o in seen} == {(kind, text)}
    assert "rank_targets.py" in seen[0].error.traceback
    assert pids(pool) == before


def test_one_raises_and_leaves_the_others_waiting(pool):
    seen = call(pool, "leave", how="raise", ranks=[2])
    assert outcomes(seen) == ["hung", "hung", "raised", "hung"]
    assert seen[2].error.type == "KeyError"
    assert "did not return within 1.5 s after rank 2 raised" in seen[0].error.text
    assert "recv" in seen[0].stacks


@pytest.mark.parametrize(("kind", "text"), [("lambda", "pickle"), ("unloadable", "not in the controller")])
def test_value_that_does_not_travel(pool, kind, text):
    seen = call(pool, "value_of_kind", 2, kind=kind)
    assert outcomes(seen) == ["raised"] * 2
    assert text in seen[0].error.text


def test_argument_that_does_not_travel(pool):
    with pytest.raises(Exception, match="pickle"):
        call(pool, "take", 2, given=lambda: None)


def test_argument_that_a_rank_cannot_read(pool):
    seen = call(pool, "take", 2, given=rank_targets.OnlyInTheController())
    assert outcomes(seen) == ["raised"] * 2
    assert seen[1].error.text == "not on a rank"


@pytest.mark.parametrize(
    ("how", "kind"),
    [("kill", "SIGKILL"), ("exit 3", "exit code 3"), ("exit 0", "exit code 0"), ("segfault", "SIGSEGV")],
)
@pytest.mark.parametrize("leavers", [[1], [0, 1, 2, 3]], ids=["one", "all"])
def test_death(pool, how, kind, leavers):
    seen = call(pool, "leave", how=how, ranks=leavers)
    assert [o.outcome == "died" for o in seen] == [rank in leavers for rank in range(SIZE)]
    assert not {"hung", "ok"} & set(outcomes(seen))
    for rank in leavers:
        assert seen[rank].phase == "call"
        assert seen[rank].error.type == kind
        assert f"rank {rank} was here" in seen[rank].error.text
        assert ("string_at" in seen[rank].error.traceback) == (how == "segfault")


def test_others_that_do_not_notice(pool):
    seen = call(pool, "sleep_while_one_leaves", how="kill")
    assert outcomes(seen) == ["hung", "died", "hung", "hung"]
    assert "within 1 s after rank 1 was lost" in seen[0].error.text
    assert "sleep_while_one_leaves" in seen[0].stacks


def test_death_between_steps(pool):
    before = pids(pool)
    os.kill(before[2], signal.SIGKILL)
    after = pids(pool)
    assert not set(before) & set(after)


def test_much_output_is_bounded(pool):
    seen = call(pool, "print_much", 2, num_mib=32)
    assert outcomes(seen) == ["ok", "ok"]
    (seen,) = call(pool, "print_much", 1, num_mib=1, how="exit 3")
    assert seen.error.text.endswith("the last line")
    assert len(seen.error.text) < 5000


def test_one_sleeps_and_others_wait_for_it(pool):
    pool.rank_timeout_s = 1.5
    seen = call(pool, "leave", how="sleep", ranks=[1])
    assert outcomes(seen) == ["hung"] * SIZE
    assert "did not return within 1.5 s" in seen[0].error.text
    assert "recv" in seen[0].stacks
    assert "time.sleep" in seen[1].stacks or "<lambda>" in seen[1].stacks


def test_one_is_stopped(pool):
    pool.rank_timeout_s = 1.5
    seen = call(pool, "sleep_while_one_leaves", 2, how="stop")
    assert outcomes(seen) == ["hung", "hung"]
    assert "stopped by a signal" in seen[1].stacks


def test_finished_ranks_are_told_from_hung_ones(pool, tmp_path):
    pool.rank_timeout_s = 1.5
    seen = call(pool, "leave", 1, how="sleep", ranks=[0], distributed=False)
    assert outcomes(seen) == ["hung"]
    seen = call(pool, "hang_on_one", 2, distributed=False)
    assert [(o.outcome, o.stacks == "finished") for o in seen] == [("ok", True), ("hung", False)]


def test_a_passing_trouble_is_tried_again(pool):
    call(pool, "break_connect")
    before = pool.step(Call(0, SIZE, "os:getpid", {}, distributed=False))
    assert outcomes(call(pool, "world")) == ["ok"] * SIZE
    assert len(before) == SIZE


def test_a_lasting_trouble_is_not_the_backend(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    with RankPool(2, connect_timeout_s=2.0) as pool:
        seen = call(pool, "world", 2)
    assert [(o.outcome, o.phase) for o in seen] == [("unconnected", "connect")] * 2


def test_start_that_fails(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('a broken torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = RankPool(2)
    with pytest.raises(RanksUnavailable, match="a broken torch"), pool:
        call(pool, "world", 2)


def test_end_in_the_middle_of_the_start(monkeypatch):
    monkeypatch.setenv(MARK, mark := f"{os.getpid()}-start")
    with RankPool(8):
        semaphores = until(lambda: {path for pid in marked(mark) for path in _semaphores(pid)}, 30)
    assert not marked(mark)
    assert not [path for path in semaphores if path.exists()]


@pytest.mark.parametrize("when", ["idle", "busy"])
def test_killed_launcher(monkeypatch, tmp_path, when):
    monkeypatch.setenv(MARK, mark := f"{os.getpid()}-{when}")
    with RankPool(2, rank_timeout_s=20.0) as pool:
        assert outcomes(call(pool, "world", 2)) == ["ok", "ok"]
        # The launcher leads the session of all that carry the mark.
        (launcher,) = [pid for pid in marked(mark) if os.getsid(pid) == pid]
        family = marked(mark)
        semaphores = {path for pid in family for path in _semaphores(pid)}
        assert semaphores
        if when == "busy":
            killer = threading.Thread(target=_kill_when_busy, args=(launcher, tmp_path))
            killer.start()
            assert outcomes(call(pool, "pid_then_sleep", 2, folder=str(tmp_path))) == ["unconnected"] * 2
            killer.join()
        else:
            os.kill(launcher, signal.SIGKILL)
            until(lambda: not set(marked(mark)) & set(family) - {launcher})
        assert outcomes(call(pool, "world", 2)) == ["ok", "ok"]
        assert not set(marked(mark)) & set(family)
        assert not [path for path in semaphores if path.exists()]
    assert not marked(mark)


def _kill_when_busy(pid, folder):
    until(lambda: len(list(folder.glob("*.pid"))) == 2)
    os.kill(pid, signal.SIGKILL)


_CONTROLLER = """
import os, sys
sys.path[:0] = {path!r}
from dcpbench.messages import Call, RunStep
from dcpbench.oracle.judge import judge
from dcpbench.ranks.pool import RankPool
with RankPool(3) as pool:
    pool.step(Call(0, 3, "rank_targets:world", {{}}))
    assert "torch" not in sys.modules
    pool.step(Call(0, 3, "rank_targets:{target}", {{"folder": {folder!r}}}))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_end_leaves_nothing(tmp_path, number):
    mark = f"{os.getpid()}-{number.name}"
    busy = tmp_path / "busy"
    busy.mkdir()
    script = _CONTROLLER.format(path=sys.path, target="pid_then_sleep", folder=str(busy))
    controller = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {MARK: mark}, stderr=subprocess.PIPE, text=True
    )
    until(lambda: len(list(busy.glob("*.pid"))) == 3, 30)
    homes = {_home(pid) for pid in marked(mark)} - {None}
    semaphores = {path for pid in marked(mark) for path in _semaphores(pid)}
    assert semaphores
    assert len(homes) == 1
    assert len(marked(mark)) >= 7  # controller, launcher, resource tracker, fork server, three ranks
    controller.send_signal(number)
    _, said = controller.communicate(timeout=120)
    assert controller.returncode == -number
    assert said.count("Traceback") == (number == signal.SIGINT)
    assert "elastic" not in said
    assert "tracker" not in said
    until(lambda: not marked(mark))
    until(lambda: not any(Path(home).exists() for home in homes))
    until(lambda: not any(path.exists() for path in semaphores))


def _home(pid):
    environment = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
    found = [entry for entry in environment if entry.startswith(b"TMPDIR=") and b"dcpbench-" in entry]
    return found[0].partition(b"=")[2].decode() if found else None


def _semaphores(pid):
    try:
        maps = (Path("/proc") / str(pid) / "maps").read_text().splitlines()
    except OSError:
        return set()
    return {Path(line.split()[-1]) for line in maps if "/dev/shm/sem." in line}

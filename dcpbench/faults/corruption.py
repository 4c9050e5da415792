"""The corruption score: a checkpoint damaged in thousands of ways, and what loads make of each.

save on 2 ranks --> tree --> damages --> loads in one warm rank --> detected, harmless, wrong, no answer
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dcpbench import objects
from dcpbench.case import Case, Layout, LeafLayout, Mesh, ObjectLeaf, Part, Placement, Step, TensorLeaf
from dcpbench.faults.crash import run_step, scratch_folder
from dcpbench.faults.damage import KINDS, Damage, Target, damaged, damages
from dcpbench.faults.law import LoadSeen, version_of, what_it_holds
from dcpbench.faults.score import Outcome, Row, rows_of
from dcpbench.faults.storage_model import Tree
from dcpbench.faults.trees import read_tree
from dcpbench.faults.trials import Loader
from dcpbench.oracle.verdict import Finding
from dcpbench.ranks.pool import RankPool

__all__ = ["CorruptionReport", "corrupt"]

_SAVE, _LOAD = 0, 1


@dataclass(frozen=True)
class CorruptionReport:
    """What damage did to loads of one backend.

    Attributes:
        case: the first of those that were saved.
        rows: trials by target and kind; the last row is of all.
        findings: one for each target and kind that was not always seen, with a case and a storage that show it.
    """

    backend: str
    case: Case
    rows: list[Row]
    findings: list[tuple[Case, Tree, Finding]]


def _key(*parts: str) -> tuple[Part, ...]:
    return tuple(Part("key", part) for part in parts)


def cases_of_damage() -> tuple[Case, Case]:
    """Returns the cases: leaves of every kind; and shards of one shape only, which can be mistaken for each other."""
    cut, whole = LeafLayout((Placement(0),)), LeafLayout((Placement(),))
    mixed = (
        TensorLeaf(_key("model", "w"), (8, 32)),
        TensorLeaf(_key("model", "b"), (6,), "int64"),
        TensorLeaf(_key("half"), (5, 3), "bfloat16"),
        TensorLeaf(_key("count"), ()),
    )
    values = (
        ObjectLeaf(_key("step"), objects.encode(1234)),
        ObjectLeaf(_key("name"), objects.encode("a run with a name")),
        ObjectLeaf(_key("rates"), objects.encode([0.1, 0.01, 0.5])),
    )
    twins = tuple(TensorLeaf(_key("w", str(number)), (4, 8), "float64") for number in range(6))
    return (
        _case("mixed", mixed, values, (cut, cut, whole, whole)),
        _case("twins", twins, (), (cut,) * len(twins)),
    )


def _case(
    name: str, tensors: tuple[TensorLeaf, ...], values: tuple[ObjectLeaf, ...], saved: tuple[LeafLayout, ...]
) -> Case:
    pair = Layout(2, Mesh(("dp",), (2,), (0, 1)), saved)
    alone = Layout(1, Mesh(("dp",), (1,), (0,)), tuple(LeafLayout() for _ in tensors), distributed=False)
    steps = (Step("save", 0, "ckpt"), Step("load", 1, "ckpt"))
    return Case(f"corruption-{name}", 2, tensors, values, (pair, alone), steps)


@dataclass(frozen=True)
class _Trial:
    case: Case
    tree: Tree
    target: Target
    damage: Damage
    seen: LoadSeen

    @property
    def outcome(self) -> Outcome:
        if self.seen.outcome == "refused":
            return "detected"
        if self.seen.outcome != "loaded":
            return "no answer"
        return "harmless" if version_of(self.case, _LOAD, self.seen, [0]) == 0 else "wrong"


def corrupt(pool: RankPool, backend: str, num_trials: int, *, seed: int = 0) -> CorruptionReport:
    """Returns the corruption score of a backend.

    Args:
        pool: of at least two ranks.
        backend: its specification.
        num_trials: how often its checkpoints are damaged.
        seed: of the damage.

    Raises:
        SaveFailed: the save or the load fails without any damage.
    """
    cases = cases_of_damage()
    trials = [trial for case in cases for trial in _trials(pool, backend, case, num_trials // len(cases), seed)]
    rows = rows_of([(trial.target, trial.damage.kind, trial.outcome) for trial in trials], KINDS)
    return CorruptionReport(backend, cases[0], rows, _findings(trials))


def _trials(pool: RankPool, backend: str, case: Case, count: int, seed: int) -> list[_Trial]:
    with scratch_folder() as root:
        run_step(pool, case, _SAVE, backend, root)
        run_step(pool, case, _LOAD, backend, root)
        tree = read_tree(root)
        is_metadata = {path: "metadata" in path.lower() or path.endswith((".json", ".index")) for path in tree}
        planned = damages(tree, is_metadata, count, seed)
        loader = Loader(pool, backend, case, {"ckpt": _LOAD}, str(root))
        loads = loader.load([damaged(tree, damage) for _, damage in planned])
    return [_Trial(case, tree, *plan, seen["ckpt"]) for plan, seen in zip(planned, loads, strict=True)]


_BAD: dict[str, tuple[str, str]] = {
    "wrong": ("R808", "is loaded as if it were good"),
    "no answer": ("R805", "leaves a load without an answer"),
}


def _findings(trials: Sequence[_Trial]) -> list[tuple[Case, Tree, Finding]]:
    groups: dict[tuple[Target, str, str], list[_Trial]] = {}
    totals = Counter((trial.target, trial.damage.kind) for trial in trials)
    for trial in trials:
        if trial.outcome in _BAD:
            groups.setdefault((trial.target, trial.damage.kind, trial.outcome), []).append(trial)
    return [_finding(members, totals[key[:2]], *_BAD[key[2]]) for key, members in groups.items()]


def _finding(members: Sequence[_Trial], total: int, rule: str, what: str) -> tuple[Case, Tree, Finding]:
    first = members[0]
    damage, seen = first.damage, first.seen
    held = what_it_holds(first.case, _LOAD, seen, [0]) if seen.outcome == "loaded" else seen.error
    facts = (
        ("damage", f"{damage.kind}: {damage.path} at={damage.at} value={damage.value} {damage.other}".rstrip()),
        ("got", held[:200]),
        ("trials", f"{len(members)} of {total}"),
    )
    finding = Finding(rule, f"damage of {first.target} {what}: {damage.kind}", facts, step=_LOAD)
    return first.case, damaged(first.tree, damage), finding

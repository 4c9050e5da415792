"""What is done with the state dict of a case: its steps, and the switches that hold for all of them. Part of a case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Action", "Disturbance", "IdForm", "Misuse", "Options", "Step"]

Action = Literal["save", "load", "async_save", "wait", "delete", "copy", "rename", "convert", "import"]
"""What a step does. Of these, copy, rename and delete are ours, on a checkpoint that is a folder; import makes a
checkpoint of a torch.save file, convert goes through such a file to another checkpoint."""

Misuse = Literal[
    "none",
    "unknown-key",
    "larger",
    "smaller",
    "extra-dim",
    "other-kind",
    "no-checkpoint",
    "unsavable",
    "failing-stateful",
]
"""What is wrong on purpose with a load: it asks for a key that was never saved, or for a larger or smaller tensor than
was saved, or for one with a further dim, or for a tensor where a value was saved, or for a checkpoint that does not
exist. Or with a save: a value raises when
it is pickled, or a Stateful raises when it is asked for its state."""

Disturbance = Literal["overwrite", "free", "clear"]
"""What training does right after ``async_save`` has returned, besides changing each value that can be changed: it
writes other bytes into every tensor; and then gives their memory back; or empties the state dict."""

IdForm = Literal["text", "path", "relative", "slash"]
"""How a checkpoint_id is given: absolute, as text or as a Path; relative to the current folder; with a slash behind."""


@dataclass(frozen=True)
class Step:
    """One action of a case.

    Attributes:
        action: ``save`` writes, ``load`` reads into a destination prepared with other bytes, ``async_save`` writes in
            the background, ``wait`` waits until it is done.
        layout: which of the case's layouts.
        checkpoint: name of the checkpoint, one path component.
        version: which content a save writes; a load expects that of the last save under the same name.
        may_refuse: all ranks may refuse the step; what follows is then not judged.
        without: numbers of leaves (:attr:`Case.leaves`) that the state dict of the step does not hold.
        misuse: what is wrong on purpose, so that all ranks must refuse the step.
        misused: number of the leaf that the misuse is about.
        misused_on: the one rank that asks for the wrong thing; None means all ranks do.
        target: where copy, rename and convert put the checkpoint.
        resaves: a save takes the state dict of the step before, a load on the same layout, as it is.
        lenient: a load leaves leaves that the checkpoint lacks as they are, rather than refuse.
        disturbance: what follows an ``async_save`` at once.
        is_left_open: an ``async_save`` is not waited for within its step; a ``wait`` follows.
    """

    action: Action
    layout: int
    checkpoint: str = "ckpt"
    version: int = 0
    may_refuse: bool = False
    without: tuple[int, ...] = ()
    misuse: Misuse = "none"
    misused: int = 0
    misused_on: int | None = None
    target: str = ""
    resaves: bool = False
    lenient: bool = False
    disturbance: Disturbance = "overwrite"
    is_left_open: bool = False

    @property
    def saves(self) -> bool:
        """Reads as: this step writes a checkpoint of its own state dict."""
        return self.action in ("save", "async_save", "import")


@dataclass(frozen=True)
class Options:
    """Switches of a case. A backend that has no such switch is called without it.

    Attributes:
        reuse: the steps share one writer and one reader object, as a training loop does that keeps them.
        id_form: how a checkpoint_id is given.
        no_dist: a layout of one rank saves and loads with ``no_dist=True`` although there is a process group.
        is_flattened: ``flatten_state_dict`` of both planners.
        is_deduplicated_low: ``dedup_save_to_lowest_rank`` of the save planner.
        caches_plans: ``enable_plan_caching`` of the save planner.
        has_file_per_item: the writer is made with ``single_file_per_rank=False``.
        num_threads: the writer's ``thread_count``.
        statefuls: top-level keys whose dict is held by a ``Stateful`` object.
    """

    reuse: bool = False
    id_form: IdForm = "text"
    no_dist: bool = False
    is_flattened: bool = True
    is_deduplicated_low: bool = False
    caches_plans: bool = False
    has_file_per_item: bool = False
    num_threads: int = 1
    statefuls: tuple[str, ...] = ()

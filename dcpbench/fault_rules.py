"""The rules about faults and hostile checkpoints, R8xx and R9xx: a part of the catalogue (:mod:`dcpbench.rules`)."""

from __future__ import annotations

from typing import Final

from dcpbench.rule import Rule

__all__ = ["FAULT_RULES"]

_SAVE = "torch.distributed.checkpoint.save (documentation)"
_SYNC_FILES = "torch.distributed.checkpoint.FileSystemWriter (documentation): sync_files, overwrite"
_FORMAT = "torch.distributed.checkpoint.filesystem (source): a pickle of Metadata beside zips that carry CRCs"
_METADATA = "torch.distributed.checkpoint.metadata (source), DefaultSavePlanner's validation of the global plan"

FAULT_RULES: Final = (
    Rule(
        "R801",
        "mixed-checkpoint",
        "durability",
        "A load after a crash must bring one save whole: never parts of two, never bytes that no save wrote.",
        _SYNC_FILES,
        "overwrites_in_place",
    ),
    Rule(
        "R802",
        "destroyed-checkpoint",
        "durability",
        "A checkpoint must stay loadable, bit for bit, until the save that replaces it is committed.",
        _SYNC_FILES,
        "removes_before_it_writes",
    ),
    Rule(
        "R803",
        "touched-neighbour",
        "durability",
        "A save must leave checkpoints under other ids loadable, bit for bit, whatever becomes of it.",
        f"{_SAVE}: checkpoint_id names this checkpoint instance",
        "keeps_only_the_latest",
    ),
    Rule(
        "R804",
        "lost-commit",
        "durability",
        "What a save has written must survive a loss of power once it has returned.",
        f"{_SYNC_FILES}; fsync(2): names need an fsync of their folder",
        "forgets_to_sync_names",
    ),
    Rule(
        "R805",
        "no-answer",
        "durability",
        "A load of a checkpoint that a fault has left must end in time: with it, or with an error that says something.",
        _SYNC_FILES,
        "waits_for_the_rest",
    ),
    Rule(
        "R806",
        "swallowed-fault",
        "durability",
        "A save in which a system call fails must raise on all ranks, unless what it wrote is whole all the same.",
        "torch.distributed.checkpoint.CheckpointException: failures of any rank reach all ranks",
        "swallows_write_errors",
    ),
    Rule(
        "R807",
        "unnamed-cause",
        "durability",
        "The error of a save in which a system call failed must name its cause, as the system words it.",
        "write(2), errno(3)",
        "hides_the_cause",
    ),
    Rule(
        "R808",
        "unseen-damage",
        "durability",
        "Bytes that were damaged on storage must be refused, not loaded as if they were good.",
        _FORMAT,
        "checks_nothing",
    ),
    Rule(
        "R901",
        "runs-code",
        "security",
        "A load must not run what a checkpoint names.",
        "pickle (documentation): never unpickle data from an untrusted source; torch.load: weights_only",
        "trusts_pickles",
    ),
    Rule(
        "R902",
        "leaves-folder",
        "security",
        "A load must read nothing outside the checkpoint's folder, whatever paths the checkpoint names.",
        _FORMAT,
        "follows_paths",
    ),
    Rule(
        "R903",
        "unbounded-load",
        "security",
        "A load must refuse what a checkpoint claims before it takes the memory or the time that the claim asks for.",
        _FORMAT,
        "walks_every_branch",
    ),
    Rule(
        "R904",
        "accepted-nonsense",
        "security",
        "Metadata of the wrong types, or that contradicts itself, must be refused with an error that says why.",
        _METADATA,
        "leaves_gaps",
    ),
)

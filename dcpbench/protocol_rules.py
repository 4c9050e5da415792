"""The rules about storages and planners themselves, R0xx: a part of the catalogue (:mod:`dcpbench.rules`)."""

from __future__ import annotations

from typing import Final

from dcpbench.rule import Rule

__all__ = ["PROTOCOL_RULES"]

_WRITER = "torch.distributed.checkpoint.StorageWriter (documentation)"
_READER = "torch.distributed.checkpoint.StorageReader (documentation)"
_SAVE_PLANNER = "torch.distributed.checkpoint.SavePlanner (documentation)"
_LOAD_PLANNER = "torch.distributed.checkpoint.LoadPlanner (documentation)"
_ITEMS = "torch.distributed.checkpoint.planner (source): WriteItem, ReadItem; MetadataIndex has an optional hint"
_FAILURES = "torch.distributed.checkpoint.CheckpointException: failures of any rank reach all ranks"

PROTOCOL_RULES: Final = (
    Rule(
        "R001",
        "refused-plan",
        "protocol",
        "A storage or planner must take each plan that the interface allows: any split, order, rank; hints or none.",
        _ITEMS,
        "needs_items_on_each_rank",
    ),
    Rule(
        "R002",
        "wrong-item",
        "protocol",
        "A storage must give for each read item the bytes that were written at its place, in whichever plan they were.",
        f"{_READER}: read_data; {_ITEMS}",
        "reads_from_the_start",
    ),
    Rule(
        "R003",
        "uncommitted-tensor",
        "protocol",
        "A reader must hand each tensor that it has filled, the very one that it was given, to commit_tensor.",
        f"{_LOAD_PLANNER}: commit_tensor, once the reader has finished loading data into it",
        "never_commits",
    ),
    Rule(
        "R004",
        "wrong-results",
        "protocol",
        "A writer must report one WriteResult for each item that it was given, and no other.",
        f"{_WRITER}: write_data returns a future of a list of WriteResult",
        "reports_tensors_only",
    ),
    Rule(
        "R005",
        "stray-request",
        "protocol",
        "A storage must ask the planner only for items of the plan that it was given.",
        f"{_WRITER}: it calls resolve_data on each item from the plan",
        "asks_for_what_it_likes",
    ),
    Rule(
        "R006",
        "spoiled-by-use",
        "protocol",
        "A writer, reader or planner that was used must do as a new one once it is reset or set up again.",
        f"{_WRITER}: reset, a brand new checkpoint is going to happen",
        "remembers_first_id",
    ),
    Rule(
        "R007",
        "order-of-ranks",
        "protocol",
        "What comes of a step must not depend on the order in which ranks make their calls.",
        f"{_WRITER}: the sequence of calls, on all ranks or on the coordinator",
        "last_rank_clears",
    ),
    Rule(
        "R008",
        "swallowed-error",
        "protocol",
        "An error in any call, a storage's calls of the planner too, must end the step on all ranks and name the rank.",
        _FAILURES,
        "skips_what_fails",
    ),
    Rule(
        "R009",
        "harmed-checkpoint",
        "protocol",
        "A save that fails or stops must leave the checkpoints that were there loadable, bit for bit.",
        f"{_WRITER}: finish writes the metadata and marks the current checkpoint as successful",
        "clears_on_set_up",
    ),
    Rule(
        "R010",
        "half-a-checkpoint",
        "protocol",
        "A save that ended before finish must not leave what loads as a checkpoint.",
        f"{_WRITER}: finish writes the metadata and marks the current checkpoint as successful",
        "commits_while_writing",
    ),
    Rule(
        "R011",
        "planned-not-once",
        "protocol",
        "The final plans of all ranks must write each element of each tensor, and each object, exactly once.",
        f"{_SAVE_PLANNER}: create_global_plan; DefaultSavePlanner's validation of the global plan",
        "keeps_all_replicas",
    ),
    Rule(
        "R012",
        "unlike-metadata",
        "protocol",
        "The metadata must list what the final plans write of each leaf, chunk by chunk.",
        f"{_SAVE_PLANNER}: create_global_plan computes the global plan and the metadata",
        "lists_whole_tensors",
    ),
    Rule(
        "R013",
        "wrong-data",
        "protocol",
        "A planner must give for each item what its chunk says, by dtype, shape and bytes, however often it is asked.",
        f"{_SAVE_PLANNER}: resolve_data is idempotent",
        "gives_data_once",
    ),
    Rule(
        "R014",
        "read-not-once",
        "protocol",
        "The read items of a rank must fill each element that it holds exactly once.",
        f"{_LOAD_PLANNER}: create_local_plan, based on state_dict and metadata",
        "reads_replicas_too",
    ),
    Rule(
        "R015",
        "wrong-destination",
        "protocol",
        "What a planner's tensors are filled with must end in the state dict, each element where it belongs.",
        f"{_LOAD_PLANNER}: resolve_tensor, commit_tensor",
        "loads_into_copies",
    ),
)

"""The catalogue of rules: what a checkpoint backend must do, each rule with a code, a sentence and its source.

`docs/rules.md` is made from this module by ``dcpbench rules --markdown``; a test holds the two together, and another
shows for each rule a wrong backend that the rule catches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from dcpbench import capabilities
from dcpbench.fault_rules import FAULT_RULES
from dcpbench.protocol_rules import PROTOCOL_RULES
from dcpbench.rule import Rule
from dcpbench.training_rules import TRAINING_RULES

__all__ = ["FAMILIES", "RULES", "Rule", "as_markdown"]

FAMILIES: Final = {
    "capabilities": "What a backend declares absent, it refuses; the rest is held against it.",
    "protocol": "Storages and planners keep to what their interfaces say, whatever plugs in on the other side.",
    "values": "What was saved is what is loaded, bit for bit.",
    "identity": "A load writes into the memory that it was given, and nowhere else; a save writes to none.",
    "tiling": "The metadata describes each element of each tensor once.",
    "objects": "Values that are not tensors come back as they were.",
    "outcome": "All ranks end the same way, in time, and bad input is refused with its reason.",
    "training": "Training goes on from a checkpoint as if it had never stopped, and after a look as if there was none.",
    "durability": "After a fault a load brings the old checkpoint whole, or the new one whole, or a clear error.",
    "security": "A checkpoint is data: whatever it holds, loading it harms nothing.",
    "async": "A save in the background saves the state at the call.",
}

_LOAD = "torch.distributed.checkpoint.load (documentation)"
_SAVE = "torch.distributed.checkpoint.save (documentation)"
_METADATA = "torch.distributed.checkpoint.metadata (source), DefaultSavePlanner's validation of the global plan"


_NEEDS: Final = {
    "R108": "lenient-loads",
    "R301": "metadata",
    "R302": "metadata",
    "R303": "metadata",
    "R304": "metadata",
    "R401": "objects",
    "R402": "objects",
    "R601": "objects",
    "R602": "objects",
    "R603": "objects",
    "R604": "objects",
    "R605": "objects",
    "R606": "resharding",
    "R607": "objects",
    "R608": "objects",
    "R609": "objects",
    "R701": "async",
    "R801": "atomic-commit",
    "R802": "atomic-commit",
    "R803": "several-checkpoints",
    "R804": "durability",
}
"""The capability without which a rule is not held against a backend."""


_IMPLIES: Final = {
    "C002": ("R101", "R107", "R401"),
    "R002": ("R101",),
    "R011": ("R301", "R302"),
    "R014": ("R107",),
    "R015": ("R101",),
    "R102": ("R101",),
    "R103": ("R101", "R107"),
    "R104": ("R402",),
    "R201": ("R202",),
    "R301": ("R107",),
    "R302": ("R101",),
    "R303": ("R101", "R107"),
    "R304": ("R102", "R103", "R501"),
    "R503": ("R502",),
    "R504": ("R502", "R503"),
    "R601": ("R604", "R605", "R606", "R607"),
    "R602": ("R604",),
    "R604": ("R605", "R606"),
    "R802": ("R801",),
    "R806": ("R801",),
    "R902": ("R904",),
}
"""What breaks the one may break the others as well."""


_ALL = (
    Rule(
        "C001",
        "unclean-refusal",
        "capabilities",
        "What a backend declares absent must be refused on all ranks, in time, with the destination left as it was.",
        "dcpbench.capabilities: an absent capability is one that is refused",
        "refuses_on_one_rank",
    ),
    Rule(
        "C002",
        "accepted-absent",
        "capabilities",
        "What a backend declares absent must not be accepted and then done wrong.",
        "dcpbench.capabilities: an absent capability is one that is refused",
        "drops_values",
    ),
    Rule(
        "C003",
        "works-though-absent",
        "capabilities",
        "What works must not be declared absent.",
        "dcpbench.capabilities: an absent capability is one that is refused",
        "understates_itself",
    ),
    *PROTOCOL_RULES,
    Rule(
        "R101",
        "wrong-bytes",
        "values",
        "Each element of a loaded tensor must hold the bytes that were saved at its global index.",
        f"{_LOAD}: each rank reads what is needed to fulfil the requested state_dict",
        "shifted_reader",
    ),
    Rule(
        "R102",
        "wrong-dtype",
        "values",
        "A tensor must keep its dtype through save and load.",
        f"{_LOAD}: tensors are allocated by the caller before the call",
        "widening_loader",
    ),
    Rule(
        "R103",
        "wrong-shape",
        "values",
        "A tensor must keep its shape through save and load, 0-d and empty ones too.",
        f"{_LOAD}: tensors are allocated by the caller before the call",
        "scalar_as_vector",
    ),
    Rule(
        "R104",
        "lost-leaf",
        "values",
        "After a load each key of the state dict must still hold what it is for: a tensor, or a value.",
        f"{_LOAD}: non-tensor data is modified in place on state_dict",
        "forgetful_loader",
    ),
    Rule(
        "R105",
        "added-key",
        "values",
        "A load must not add keys to the state dict.",
        f"{_LOAD}: only what the state_dict asks for is read",
        "generous_loader",
    ),
    Rule(
        "R106",
        "stale-bytes",
        "values",
        "A load must bring the checkpoint that was asked for, not what another save or an earlier load left.",
        f"{_LOAD}: checkpoint_id names this checkpoint instance",
        "caching_reader",
    ),
    Rule(
        "R107",
        "unwritten-elements",
        "values",
        "A load that succeeds must have written each element of each tensor that it was asked for.",
        f"{_LOAD}: each rank reads what is needed to fulfil the requested state_dict",
        "lazy_reader",
    ),
    Rule(
        "R108",
        "touched-missing",
        "values",
        "A load that may be partial must leave what the checkpoint lacks as it is.",
        "DefaultLoadPlanner: allow_partial_load; keys that are not in the checkpoint are passed over",
        "zeroes_missing",
    ),
    Rule(
        "R201",
        "replaced-tensor",
        "identity",
        "A load must fill the tensor objects of the state dict, not put others in their place.",
        f"{_LOAD}: all tensors must be allocated on their destination device prior to the call",
        "replacing_loader",
    ),
    Rule(
        "R202",
        "moved-storage",
        "identity",
        "A loaded tensor must keep the memory that it had.",
        f"{_LOAD}: all tensors must be allocated on their destination device prior to the call",
        "moving_loader",
    ),
    Rule(
        "R203",
        "stray-write",
        "identity",
        "A load must not write to bytes beside the tensors of the state dict.",
        f"{_LOAD}: in-place load",
        "overrunning_reader",
    ),
    Rule(
        "R204",
        "changed-source",
        "identity",
        "A save must leave the state dict that it saves as it is: its tensors, values and keys.",
        f"{_SAVE}: each rank saves its local shards",
        "alters_sources",
    ),
    Rule(
        "R205",
        "changed-on-refusal",
        "identity",
        "A load that is refused for what it asks must leave its destination as it was.",
        "torch.distributed.checkpoint.LoadPlanner (documentation): plans are made, on all ranks, before data is read",
        "fills_before_checking",
    ),
    Rule(
        "R301",
        "chunk-gap",
        "tiling",
        "The chunks of a tensor must cover each of its elements.",
        _METADATA,
        "gap_in_metadata",
    ),
    Rule(
        "R302",
        "chunk-overlap",
        "tiling",
        "No element of a tensor may lie in two chunks.",
        _METADATA,
        "overlap_in_metadata",
    ),
    Rule(
        "R303",
        "chunk-out-of-bounds",
        "tiling",
        "Each chunk must lie within its tensor.",
        _METADATA,
        "chunk_out_of_bounds",
    ),
    Rule(
        "R304",
        "wrong-metadata",
        "tiling",
        "The metadata must list each saved tensor with its global shape and dtype.",
        _METADATA,
        "forgetful_metadata",
    ),
    Rule(
        "R401",
        "wrong-object",
        "objects",
        "A value that is no tensor must come back equal, and of the same type.",
        f"{_LOAD}: non-tensor data is deserialised and put back",
        "tuples_become_lists",
    ),
    Rule(
        "R402",
        "stale-object",
        "objects",
        "A load that succeeds must have replaced each value that it was asked for.",
        f"{_LOAD}: load will deserialize the object, and then replace it in the state_dict",
        "objects_on_coordinator_only",
    ),
    Rule(
        "R501",
        "refused-good-input",
        "outcome",
        "A save or load of a valid state dict must succeed.",
        f"{_SAVE}; {_LOAD}",
        "refuses_empty_tensors",
    ),
    Rule(
        "R502",
        "split-outcome",
        "outcome",
        "All ranks must end the same way: if one cannot go on, all raise.",
        "torch.distributed.checkpoint.CheckpointException: failures of any rank reach all ranks",
        "silent_coordinator",
    ),
    Rule(
        "R503",
        "hung-rank",
        "outcome",
        "No rank may wait for ever.",
        "torch.distributed.checkpoint.CheckpointException: failures of any rank reach all ranks",
        "waits_for_ever",
    ),
    Rule(
        "R504",
        "lost-rank",
        "outcome",
        "A save or load must not end the process that calls it.",
        f"{_SAVE}; {_LOAD}",
        "exits_on_scalar",
    ),
    Rule(
        "R505",
        "accepted-bad-input",
        "outcome",
        "What cannot be loaded as asked, or not be saved, must be refused on all ranks.",
        "DefaultLoadPlanner: missing keys and size mismatches raise unless partial load is allowed",
        "lenient_loader",
    ),
    Rule(
        "R506",
        "unnamed-key",
        "outcome",
        "A refusal must name the key that is refused.",
        "create_default_local_load_plan (source): the error names the fqn",
        "mumbling_loader",
    ),
    *TRAINING_RULES,
    Rule(
        "R701",
        "changed-after-call",
        "async",
        "What async_save saves must be the state at the moment when it returns, whatever becomes of it afterwards.",
        "torch.distributed.checkpoint.staging.AsyncStager (documentation): updates after staging must not be reflected",
        "stages_by_reference",
    ),
    *FAULT_RULES,
)

RULES: Final[dict[str, Rule]] = {
    rule.code: replace(rule, implies=_IMPLIES.get(rule.code, ()), capability=_NEEDS.get(rule.code, "")) for rule in _ALL
}
"""The catalogue, by code."""


def as_markdown() -> str:
    """Returns the catalogue as the page ``docs/rules.md``."""
    lines = [
        "# The rules",
        "",
        "What a distributed checkpoint backend must do. Each rule has a wrong backend in `tests/mutants` that breaks",
        "it, and a test shows that the rule catches it. Made from `dcpbench/rules.py` by `dcpbench rules --markdown`.",
    ]
    for family, sentence in FAMILIES.items():
        lines += ["", f"## {family.capitalize()}", "", sentence]
        for rule in _ALL:
            if rule.family == family:
                lines += ["", f'### <a id="{rule.code.lower()}"></a>{rule.code} {rule.name}', "", rule.sentence, ""]
                lines += [f"- source: {rule.source}", f"- mutant: `{rule.mutant}`"]
                if rule.code in _NEEDS:
                    lines.append(f"- needs: `{_NEEDS[rule.code]}`")
                if implied := _IMPLIES.get(rule.code):
                    lines += [f"- may break as well: {', '.join(implied)}"]
    lines += ["", *capabilities.as_markdown()]
    return "\n".join(lines) + "\n"

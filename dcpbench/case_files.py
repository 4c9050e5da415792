"""Case files of each kind: of plain state dicts (`Case`), of training (`TrainingCase`), of parts (`ProtocolCase`)."""

from __future__ import annotations

import json
from pathlib import Path

from dcpbench import codec
from dcpbench.case import Case
from dcpbench.errors import MalformedFile, UsageError
from dcpbench.models.case import TrainingCase
from dcpbench.protocol_case import ProtocolCase

__all__ = ["AnyCase", "load_case", "loads_case"]

AnyCase = Case | TrainingCase | ProtocolCase


def loads_case(text: str, where: str = "case") -> AnyCase:
    """Returns the case that ``text`` describes: one of training if it has a model, one of the protocol if it says which
    part is under test.

    Raises:
        MalformedFile: it is not JSON, or a field is missing, unknown or out of range.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise MalformedFile(where, f"expected JSON but {error}.") from error
    held = data.get("case", data) if isinstance(data, dict) else data
    if isinstance(held, dict) and "model" in held:
        return codec.from_json(TrainingCase, held, where)
    if isinstance(held, dict) and "part" in held:
        return codec.from_json(ProtocolCase, held, where)
    return codec.from_json(Case, held, where)


def load_case(path: Path) -> AnyCase:
    """Returns the case in a file that a failing run wrote, or that its ``dumps()`` gave.

    Raises:
        UsageError: the file cannot be read or is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Expected a case file but {path} cannot be read: {error}. Give the path of one.") from error
    return loads_case(text, str(path))

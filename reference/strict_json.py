"""JSON from files that may be damaged or hostile."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from .metadata_codec import MetadataError

__all__ = ["SafetensorsError", "fault", "parse_json", "shorten"]


class SafetensorsError(MetadataError):
    """A safetensors file, or an index of such files, that is damaged, hostile, or that contradicts itself."""


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """Return the object that `raw` holds, with no key given twice.

    Raises:
        SafetensorsError: it holds no such thing.
    """
    try:
        content = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if b"\\u" in raw:
            json.dumps(content, ensure_ascii=False).encode()  # fails if an escape made half a character
    except SafetensorsError as error:
        raise fault(what, "a JSON object", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise fault(what, "a JSON object", shorten(str(error) or type(error).__name__)) from None
    if not isinstance(content, dict):
        raise fault(what, "a JSON object", shorten(content))
    return content


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise SafetensorsError(f"the key {key!r} twice")
        content[key] = value
    return content


def _refuse_constant(text: str) -> Any:
    raise SafetensorsError(f"the number {text}")


def shorten(value: Any) -> str:
    """Return `value` as it is written in an error message."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def fault(what: str, expected: str, got: str) -> SafetensorsError:
    """Return the error for a file, named by `what`, in which something else was found than `expected`."""
    return SafetensorsError(f"Expected {expected} in {what!r} but got {got}.")

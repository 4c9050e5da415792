"""A process of its own that enters a backend's location, says where it is, and leaves it when its input ends.

So a server that the location starts outlives any rank, and ends with the controller, however that ends. What the
location puts into ``os.environ`` is told as well, for the ranks.
"""

from __future__ import annotations

import json
import os
import sys
import uuid

from dcpbench import codec
from dcpbench.messages import Place

__all__ = ["main"]


def main(specification: str) -> int:
    """Enters the location of a backend, prints its :class:`Place` as JSON, and waits for the end of input.

    Where it cannot be entered, the line that is printed has the reason.
    """
    from dcpbench.backends.registry import resolve

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the location prints is no answer
    before = dict(os.environ)
    try:
        location = resolve(specification).location  # type: ignore[attr-defined]
        with location() as prefix:
            environ = tuple((name, value) for name, value in os.environ.items() if before.get(name) != value)
            place = Place(f"{prefix.rstrip('/')}/dcpbench-{uuid.uuid4().hex[:12]}", environ)
            print(json.dumps(codec.to_json(place)), file=answers, flush=True)
            sys.stdin.read()
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        print(json.dumps({"problem": f"{type(error).__name__}: {text}"}), file=answers, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))

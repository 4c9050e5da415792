"""How messages travel: each is framed with the number of the command that it belongs to.

Used by the controller and by the ranks. The number stands outside the pickled message, so that a message which cannot
be unpickled (a class that the other side cannot import) is still answered, or blamed, for the right command.
"""

from __future__ import annotations

import pickle
import struct
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final

__all__ = ["pack", "receive", "unpack"]

_NUMBER: Final = struct.Struct(">q")


def pack(number: int, message: Any) -> bytes:
    """Returns ``message`` as bytes for ``Connection.send_bytes``.

    Raises:
        Exception: whatever pickling raises; nothing has been sent by then.
    """
    return _NUMBER.pack(number) + bytes(ForkingPickler.dumps(message))


def receive(connection: Connection) -> tuple[int, bytes]:
    """Returns the command's number and the message, still pickled.

    Raises:
        EOFError, OSError: the other side is gone, or stopped in the middle of a message.
    """
    data = connection.recv_bytes()
    return _NUMBER.unpack_from(data)[0], data[_NUMBER.size :]


def unpack(payload: bytes) -> Any:
    """Returns the message; raises whatever unpickling raises."""
    return pickle.loads(payload)

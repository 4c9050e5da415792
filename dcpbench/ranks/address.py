"""Where controller and ranks meet: a listening socket, a random key and the handshake.

Used by the controller (`Door`) and by the ranks (`connect`). The address is the path of a Unix socket. A
rank makes two connections: one for messages, and one that becomes its standard output and error.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, Final

__all__ = ["KEY_VARIABLE", "Door", "OutputOf", "connect"]

KEY_VARIABLE: Final = "DCPBENCH_KEY"
"""Environment variable that carries the key, in hex, to the ranks."""

_STALL_S: Final = 20
"""A peer that stops in the middle of a message for this long is given up; a whole message takes milliseconds."""


@dataclass(frozen=True, slots=True)
class OutputOf:
    """First message on a rank's second connection; what follows is what it prints."""

    rank: int
    generation: int


class Door:
    """The controller's listening socket."""

    def __init__(self, path: str, key: bytes, num_ranks: int) -> None:
        self.address = path
        self._key = key
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.bind(path)
            self._socket.listen(2 * num_ranks)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> tuple[Connection, Any] | None:
        """Returns a connection with its first message; None if whoever knocked is gone or does not hold the key."""
        accepted, _ = self._socket.accept()
        connection = _connection(accepted)
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            return connection, connection.recv()
        except (EOFError, OSError, AuthenticationError):
            connection.close()
            return None

    def close(self) -> None:
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            Path(self.address).unlink()


def connect(address: str, key: bytes) -> Connection:
    """Returns a connection to the controller at ``address``.

    Raises:
        OSError, EOFError, AuthenticationError: the controller is gone, or holds another key.
    """
    made = socket.socket(socket.AF_UNIX)
    made.connect(address)
    connection = Connection(made.detach())
    answer_challenge(connection, key)
    deliver_challenge(connection, key)
    return connection


def _connection(accepted: socket.socket) -> Connection:
    limit = struct.pack("ll", _STALL_S, 0)
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    return Connection(accepted.detach())

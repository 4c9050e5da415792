"""Runs in the controller: which of several ranks have something to say, or have ended.

``multiprocessing.connection.wait`` registers all it waits for anew in each call, with the ranks kept from the cores
meanwhile; here that is done once for a command.
"""

from __future__ import annotations

import select
from collections.abc import Iterable

from dcpbench.ranks.link import RankLink

__all__ = ["Watch"]


class Watch:
    """The sources of several links."""

    def __init__(self, links: Iterable[RankLink]) -> None:
        self._poll = select.poll()
        self._links: dict[int, RankLink] = {}
        for link in links:
            self.update(link, is_over=False)

    def update(self, link: RankLink, *, is_over: bool) -> None:
        """Goes by the sources that ``link`` has now; by none of them if it ``is_over``."""
        sources = set() if is_over else {one if isinstance(one, int) else one.fileno() for one in link.sources}
        watched = {number for number, other in self._links.items() if other is link}
        for number in watched - sources:
            self._poll.unregister(number)
            del self._links[number]
        for number in sources - watched:
            self._poll.register(number, select.POLLIN)
            self._links[number] = link

    def ready(self, timeout_s: float) -> list[tuple[RankLink, bool]]:
        """Returns the links that have something to read, and whether their processes have ended, within a time."""
        found = {number for number, _ in self._poll.poll(timeout_s * 1000)}
        links = dict.fromkeys(link for number, link in self._links.items() if number in found)
        return [(link, link.life in found) for link in links]

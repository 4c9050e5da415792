"""Virtual ranks in one process: the reference's engine, driven in any legal order, with any storage or planners.

ProtocolCase --> run: one generator per rank --> schedule: who goes on next --> ProtocolSeen --> oracle.protocol
                   |                               |
                   watch: stops a rank at a call   fibres: turns at each call
"""

from dcpbench.simulate.fibres import Killed, pause
from dcpbench.simulate.schedule import Choose, End, Run, drive, every_order, follow, in_order

__all__ = ["Choose", "End", "Killed", "Run", "drive", "every_order", "follow", "in_order", "pause"]

"""After a crash in the middle of a save: the old checkpoint whole, the new one whole, or a clear error."""

from __future__ import annotations

import pytest

from dcpbench.faults.crash import SCENARIOS, NotOffered, explore
from dcpbench.faults.tracer import StraceMissing
from dcpbench.faults.verdicts import FaultRun, check_run

MAX_IMAGES = {"quick": 60, "standard": 1500, "nightly": None}
QUICK = ("overwrite",)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_crash_leaves_old_or_new(scenario, pool, backend):
    if why := pool.lacks(backend, "local-folders", "objects", "resharding", "overwrite"):
        pytest.skip(why)
    profile = pool.settings.profile
    if profile == "quick" and scenario not in QUICK:
        pytest.skip("in the quick profile only a save over an older one is looked at")
    needed = SCENARIOS[scenario].case().max_world_size
    if needed > pool.settings.world_size:
        pytest.skip(f"needs {needed} ranks: give --world-size={needed} or more")
    try:
        report = explore(pool.pool, backend, scenario, max_images=MAX_IMAGES[profile])
    except (StraceMissing, NotOffered) as missing:
        pytest.skip(str(missing))
    found = [(image.tree, finding) for image, finding in report.findings]
    check_run(pool, FaultRun(f"crash/{scenario}", backend, report.case, found, report.is_complete, report.unknown))

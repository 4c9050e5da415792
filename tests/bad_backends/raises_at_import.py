"""A backend module that cannot be imported."""

raise RuntimeError("no licence\nwas found")

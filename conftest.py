"""Loads the dcpbench plugin for the suites and for the project's own tests."""

pytest_plugins = ["dcpbench.plugin"]

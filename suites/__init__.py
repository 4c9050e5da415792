"""What users run on a backend: one file per family of rules. From a wheel: ``pytest --pyargs dcpbench.suites``."""

"""Real models and training loops that the suites save and resume. They run on ranks."""

"""Faults: what a backend does when processes die, power fails, calls fail, bytes rot, or a checkpoint is hostile.

    ranks under strace --> strace_log --> operations --> storage_model --> crash_images --> loads --> law --> Finding
                                                                            damage, hostile --^

`operations`, `strace_log`, `storage_model`, `crash_images`, `law`, `damage` and `score` are pure; the others run ranks.
"""

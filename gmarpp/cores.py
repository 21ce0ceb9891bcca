"""Processor cores that this process may use."""

import os


def usable_cores(ranks: int) -> int:
    """Return each rank's share of the cores that the system leaves to this process; at least 1.

    Args:
        ranks: processes on this machine that share them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)

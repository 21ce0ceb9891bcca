"""Processes that load or draw for another one: their share of the cores, and how they leave signals to it."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from functools import cache, partial
from typing import Any

_POLL_SECONDS = 0.2
_ERROR_SECONDS = 1.0
_SETTLING_SECONDS = 0.01


def usable_cores(ranks: int) -> int:
    """Return each rank's share of the cores that the system leaves to this process; at least 1.

    Args:
        ranks: processes on this machine that share them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)


def follow_parent() -> None:
    """Have this process leave signals to the process that it works for, and end with it, also if that is killed.

    Schedulers and terminals signal all processes of a run: a loader that ended at once would be missed where the run
    still stops in order. Signals that the parent handles are ignored here. SIGTERM ends this process when the parent
    itself sends it: so a pool ends its processes when one of them was killed, and waits for them. Where the system does
    not tell the sender (macOS, Windows), SIGTERM always does.

    Errors are reported a moment late, when this process has not ended meanwhile: those that the parent's death causes
    say nothing.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("expected a process that multiprocessing started")
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            # Ignoring SIGCHLD would have the system forget how this process's own children ended.
            signal.signal(number, signal.SIG_DFL if number == getattr(signal, "SIGCHLD", None) else signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigtimedwait"):
        # Threads begin with this mask, so that the one that waits is the only one to receive it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_by_parent, args=(parent, os.getppid()), daemon=True).start()
    report = sys.excepthook

    def report_late(*error: Any) -> None:
        time.sleep(_ERROR_SECONDS)
        report(*error)

    sys.excepthook = report_late


def _end_by_parent(parent: Any, starter: int) -> None:
    """End this process when its parent, or the server that forked it, is gone, or when the parent says so."""
    # A parent may be gone and seem alive where this process's siblings have inherited what tells of its end.
    while os.getppid() == starter and parent.is_alive():
        if not hasattr(signal, "sigtimedwait"):
            time.sleep(_POLL_SECONDS)
            continue
        received = signal.sigtimedwait({signal.SIGTERM}, _POLL_SECONDS)
        if received is not None and received.si_pid == parent.pid:
            break
    # Torch would report any other status as the failure of a loader.
    os._exit(0)


@cache
def settle_before_forks() -> None:
    """Give the threads of libraries time to come to rest before this process forks, here and in all later forks.

    A thread that registers with the interpreter at that moment, as those of gloo do when a collective ends, holds a
    lock that the child of CPython 3.11 waits for without end (`_PyThreadState_DeleteExcept` in `PyOS_AfterFork_Child`).
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=partial(time.sleep, _SETTLING_SECONDS))

"""The processes of one run on one machine: rank 0 starts the others, and none outlives the rest or waits for the dead.

A rank that is killed leaves the others in a collective operation that gloo ends with an error, and NCCL only after
many minutes. Rank 0 therefore watches the ranks that it started, and they watch it.
"""

import atexit
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from typing_extensions import override

from gmarpp.training.lightning_private import ScriptLauncher

_LAUNCHER = "GMARPP_LAUNCHER"
_POLL_SECONDS = 0.5
# How long a rank may take to end by itself: after an error, and where rank 0 may still be saving.
_ERROR_SECONDS = 5.0
_SAVING_SECONDS = 300.0
_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)

# Set where this process stops together with the other ranks, which may end before it has saved.
stopping = threading.Event()

_launched: list[subprocess.Popen[bytes]] = []


class RankLauncher(ScriptLauncher):
    """Lightning's launcher of `python script.py` for each further device, which ends with its ranks and they with it.

    Lightning's own kills all processes, this one included, as soon as one has ended with a status other than 0, as all
    do that are stopped by a signal.
    """

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other ranks, and call the function."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[_LAUNCHER] = str(os.getpid())
            self.start_other_ranks()
            _launched[:] = self.procs
            atexit.register(_wait_for_launched_ranks)
            threading.Thread(target=_watch_launched_ranks, daemon=True).start()
        self.share_threads()
        return function(*args, **kwargs)


def launched_by_rank_zero() -> bool:
    """Return whether a `RankLauncher` started this process, and still runs."""
    return os.environ.get(_LAUNCHER) == str(os.getppid())


def watch_rank_zero() -> None:
    """End this process soon after the rank 0 that started it."""
    if launched_by_rank_zero():
        threading.Thread(target=_watch_rank_zero, daemon=True).start()


def lost_rank() -> str | None:
    """Return what ended another rank of this machine, or None if all still run."""
    deadline = time.monotonic() + 2 * _POLL_SECONDS
    while time.monotonic() < deadline:
        for rank, process in enumerate(_launched, start=1):
            if process.poll():
                return _ended(f"rank {rank}", process)
        if os.environ.get(_LAUNCHER) and not _launched and not launched_by_rank_zero():
            return "rank 0 was ended from outside"
        time.sleep(_POLL_SECONDS / 10)
    return None


def leave_lost_run(reason: str) -> NoReturn:
    """End this process and the ranks that it started, without what waits for the lost one when a process ends."""
    os.write(2, f"error: {reason}: the run cannot go on without it\n".encode())
    stopped = [process.returncode for process in _launched if process.returncode in _STOPPED]
    end_launched_ranks()
    os._exit(stopped[0] if stopped else 1)


def end_launched_ranks() -> None:
    """Kill the ranks that this process started."""
    for process in _launched:
        process.kill()


def _ended(rank: str, process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code < 0:
        return f"{rank} (process {process.pid}) was ended from outside by {signal.Signals(-code).name}"
    if code in _STOPPED:
        return f"{rank} (process {process.pid}) was stopped by {signal.Signals(code - 128).name}"
    return f"{rank} (process {process.pid}) ended with status {code}, after its own message"


def _watch_launched_ranks() -> None:
    while True:
        time.sleep(_POLL_SECONDS)
        codes = [process.poll() for process in _launched]
        if any(codes) or None not in codes:
            break
    if not any(codes):
        return
    time.sleep(_ERROR_SECONDS)
    if stopping.is_set():
        time.sleep(_SAVING_SECONDS)
    # This process would have ended by now, were it not waiting for the rank.
    leave_lost_run(lost_rank() or "a rank was lost")


def _wait_for_launched_ranks() -> None:
    deadline = time.monotonic() + 2 * _ERROR_SECONDS
    while any(process.poll() is None for process in _launched) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS / 10)
    end_launched_ranks()


def _watch_rank_zero() -> None:
    while launched_by_rank_zero():
        time.sleep(_POLL_SECONDS)
    time.sleep(_ERROR_SECONDS)
    leave_lost_run("rank 0 was ended from outside")

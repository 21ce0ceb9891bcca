"""Work that need not hold up the network."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class BackgroundTasks:
    """Runs tasks in threads; few may wait, and an error in one reaches the caller.

    Args:
        limit: tasks that may be waiting or running; `submit` blocks while there are as many.
    """

    def __init__(self, limit: int) -> None:
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="gmarpp")
        self._slots = threading.BoundedSemaphore(limit)
        self._futures: list[Future[None]] = []

    def submit(self, task: Callable[..., None], *arguments: Any) -> None:
        """Queue a task.

        Raises:
            Exception: what an earlier task raised.
        """
        self._raise_errors([future for future in self._futures if future.done()])
        self._slots.acquire()
        future = self._pool.submit(task, *arguments)
        future.add_done_callback(lambda _: self._slots.release())
        self._futures.append(future)

    def wait(self) -> None:
        """Wait until all tasks are done.

        Raises:
            Exception: what a task raised.
        """
        self._raise_errors(self._futures)

    def _raise_errors(self, finished: list[Future[None]]) -> None:
        self._futures = [future for future in self._futures if future not in finished]
        for future in finished:
            future.result()

    def close(self) -> None:
        """Drop what has not begun and end the threads."""
        self._pool.shutdown(cancel_futures=True)

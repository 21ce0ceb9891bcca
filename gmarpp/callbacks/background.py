"""Work that need not hold up the network."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class BackgroundTasks:
    """Runs tasks in threads; few may wait, and the error of one is raised by every later `submit` and `wait`.

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

    def submit_last(self, task: Callable[..., None], *arguments: Any) -> None:
        """Queue a task that runs when all earlier ones are done, and only if none of them failed.

        Raises:
            Exception: what an earlier task raised.
        """
        # Tasks begin in order: when this one does, no earlier one still needs a thread to begin in.
        self.submit(_after, list(self._futures), task, arguments)

    @property
    def failed(self) -> bool:
        """Whether a task has raised an error."""
        return any(future.done() and future.exception() is not None for future in self._futures)

    def wait(self) -> None:
        """Wait until all tasks are done.

        Raises:
            Exception: what a task raised.
        """
        self._raise_errors(self._futures)

    def _raise_errors(self, finished: list[Future[None]]) -> None:
        for future in finished:
            future.result()
        self._futures = [future for future in self._futures if future not in finished]

    def close(self) -> None:
        """Drop what has not begun and end the threads."""
        self._pool.shutdown(cancel_futures=True)


def _after(earlier: list[Future[None]], task: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    for future in earlier:
        future.result()
    task(*arguments)

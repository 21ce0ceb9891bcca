"""Work that need not hold up the network."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from gmarpp.processes import follow_parent


class BackgroundTasks:
    """Runs tasks in processes of their own: threads would keep the interpreter's lock from the network.

    Few tasks may wait, and the error of one is raised by every later `submit` and `wait`. The processes start with the
    first task, leave signals to this process, and end when it does, also if it is killed.

    Args:
        processes: tasks that run side by side.
        limit: tasks that may be waiting or running; `submit` blocks while there are as many.
        context: what each process is handed once, and hands to every task as its first argument; None for nothing.
    """

    def __init__(self, processes: int, limit: int, context: Any = None) -> None:
        self.processes = processes
        self._pool = ProcessPoolExecutor(processes, initializer=_begin, initargs=(context,))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gmarpp")
        self._slots = threading.BoundedSemaphore(limit)
        self._futures: list[Future[None]] = []

    def submit(self, task: Callable[..., None], *arguments: Any) -> None:
        """Queue a task; it and its arguments are pickled.

        Raises:
            Exception: what an earlier task raised.
            ChildProcessError: if one of the processes was killed.
        """
        self._queue(self._pool, _run, task, *arguments)

    def submit_last(self, task: Callable[..., None], *arguments: Any) -> None:
        """Queue a task for a thread of this process, when all earlier tasks are done and only if none of them failed.

        Raises:
            Exception: what an earlier task raised.
        """
        self._queue(self._thread, _after, list(self._futures), task, arguments)

    def _queue(self, executor: Executor, task: Callable[..., None], *arguments: Any) -> None:
        self._raise_errors([future for future in self._futures if future.done()])
        self._slots.acquire()
        with _killed_process_named():
            future = executor.submit(task, *arguments)
        future.add_done_callback(lambda _: self._slots.release())
        self._futures.append(future)

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
        with _killed_process_named():
            for future in finished:
                future.result()
        self._futures = [future for future in self._futures if future not in finished]

    def close(self) -> None:
        """Drop what no process has taken yet, and end the processes."""
        self._pool.shutdown(cancel_futures=True)
        self._thread.shutdown(cancel_futures=True)


def _after(earlier: list[Future[None]], task: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    for future in earlier:
        future.result()
    task(*arguments)


@contextmanager
def _killed_process_named() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process that draws pictures was killed, by hand or because the machine ran out of memory: continue the "
            "run with --resume"
        ) from error


# Of a process of the pool, which has no other place that its tasks can reach.
_context: Any = None


def _begin(context: Any) -> None:
    """Prepare a process for tasks."""
    global _context
    _context = context
    follow_parent()
    # A forked process has none of the threads that its parent's torch counts on.
    torch.set_num_threads(1)


def _run(task: Callable[..., None], *arguments: Any) -> None:
    task(*arguments) if _context is None else task(_context, *arguments)

"""How every command line ends: with a status, and with one line where something went wrong."""

import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import lightning as L
import torch.distributed as dist
from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

import gmarpp.data
from gmarpp.callbacks.termination import SIGNALS
from gmarpp.configuration import limit_yaml
from gmarpp.processes import settle_before_forks
from gmarpp.training.ranks import launched_by_rank_zero, leave_lost_run, lost_rank, watch_rank_zero

USER_ERRORS = (ValueError, OSError, FloatingPointError, MisconfigurationException, ModuleNotFoundError)
_OUT_OF_MEMORY = (
    "a process that loads data was ended from outside; where the system ran out of memory, lower --data.num_workers or "
    "--data.batch_size"
)
_LONGEST_LINE = 1000
_LOST_CONNECTION = r"(?i)connection (closed|reset|refused)|broken pipe|connectFullMesh|(recv|send).* timed out|socket"

T = TypeVar("T")


class Stopped(SystemExit):
    """A signal that arrived outside the loops over batches, where there is nothing to save."""


def run_command(command: Callable[[list[str] | None], T], args: list[str] | None) -> T:
    """Run a command line; what a user can mend ends with one line on stderr and a status other than 0.

    The status is 2 for a command line that cannot be parsed, 143 and 130 after SIGTERM and SIGINT, and else 1. With
    `GMARPP_TRACEBACK=1` in the environment, errors are raised as they are.

    Args:
        command: takes the command line without the program's name.
        args: that command line; `sys.argv`'s when `None`.
    """
    _silence_lightning()
    _import_from_working_directory()
    watch_rank_zero()
    settle_before_forks()
    try:
        with _stopping_by_signal():
            return command(args)
    except (SIGTERMException, Stopped) as stop:
        status = int(stop.code or 0)
        if not launched_by_rank_zero():
            sys.stderr.write(f"stopped by {signal.Signals(status - 128).name}\n")
        raise SystemExit(status) from None
    except (*USER_ERRORS, ArgumentError, RuntimeError, EOFError) as error:
        if os.environ.get("GMARPP_TRACEBACK"):
            raise
        if _lost_connection(error):
            _leave_lost_run(error)
        line = one_line(error)
        if line is None:
            raise
        sys.stderr.write(f"error: {line} (GMARPP_TRACEBACK=1 shows where)\n")
        raise SystemExit(2 if isinstance(error, ArgumentError) else 1) from None


def run_function(function: Callable[..., None], args: list[str] | None, program: str | None = None) -> None:
    """Run a function as a command line whose options are its arguments, as `run_command` does.

    Args:
        function: its docstring is the help.
        args: the command line without the program's name; `sys.argv`'s when `None`.
        program: the name that the help uses; the script's when `None`.
    """
    limit_yaml()
    options: dict[str, Any] = {"as_positional": False, "exit_on_error": False, "prog": program}
    run_command(lambda args: auto_cli(function, args=args, **options), args)


def one_line(error: Exception) -> str | None:
    """Return what to tell the user; None if the error is not the user's."""
    message = str(error).strip() or type(error).__name__
    if "Original Traceback" in message:
        # An error in a data loader's worker arrives with its whole traceback as the message.
        message = message.splitlines()[-1].partition(": ")[2]
    elif _lost_process(error):
        message = f"{' '.join(message.split())}: {_OUT_OF_MEMORY}"
    elif isinstance(error, RuntimeError | EOFError) and not isinstance(error, USER_ERRORS):
        return message if message.startswith("Early stopping conditioned on metric") else None
    if message.startswith('Parser key "data"'):
        message += f"; this project's data modules are {', '.join(_data_modules())}"
    message = re.sub(r"<class '(.*?)'>", r"\1", " ".join(_without_union(message).split()))
    message = re.sub(r"Expected a \S*Sequence\. Got value: (\w+)", r"Expected a list, '[\1]', got \1", message)
    return message if len(message) <= _LONGEST_LINE else f"{message[:-200][:_LONGEST_LINE]} … {message[-200:]}"


def _without_union(message: str) -> str:
    """Return a message without jsonargparse's list of all types that an option could be and the value in full."""
    union = r"Does not validate against any of the Union subtypes.*?Errors:(.*)Given value type:.*"
    found = re.search(union, message, re.DOTALL)
    if found is None:
        return message
    errors = re.split(r"\n\s*- ", found[1])[1:]
    told = [
        re.sub(
            r"Type \S*Callable.*? expects a function or a callable class: |Not of type NetworkName: ", "", error
        ).strip()
        for error in errors
        if not re.match(
            r"Expected a .*NoneType|Not of type Name:|.*(NetworkName: expected a name|import path string)", error
        )
    ]
    return message[: found.start()] + "; ".join(told or errors)


def _lost_process(error: Exception) -> bool:
    """Return whether a process that loads data was killed: torch says so, unless it was just handing over a batch."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    frames = traceback.walk_tb(error.__traceback__)
    files = {frame.f_code.co_filename for frame, _ in frames}
    return isinstance(error, ConnectionResetError | EOFError) and any("multiprocessing" in file for file in files)


def _lost_connection(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    in_group = dist.is_available() and dist.is_initialized()
    return in_group and isinstance(error, RuntimeError) and re.search(_LOST_CONNECTION, str(error)) is not None


def _leave_lost_run(error: Exception) -> NoReturn:
    lost = lost_rank()
    if lost is None and launched_by_rank_zero():
        # Rank 0 has lost the same rank, and tells it.
        os._exit(1)
    leave_lost_run(lost or f"another rank was lost ({' '.join(str(error).split())[-300:]})")


def _data_modules() -> list[str]:
    return [
        name
        for name, value in vars(gmarpp.data).items()
        if isinstance(value, type) and issubclass(value, L.LightningDataModule)
    ]


def _import_from_working_directory() -> None:
    """Have `class_path` find modules where the command runs, last of all places: a file there hides no package."""
    folder = str(Path.cwd())
    if not {"", folder} & {*sys.path}:
        sys.path.append(folder)


@contextmanager
def _stopping_by_signal() -> Iterator[None]:
    """Have signals end the process by an exception, unless a loop over batches takes them over."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _silence_lightning() -> None:
    # These come from inside Lightning, and nothing that a user does makes them go away.
    warnings.filterwarnings("ignore", r"(?is).*(deprecated in v4|JsonargparseDeprecation)", module="lightning")
    warnings.filterwarnings("ignore", ".*LeafSpec", category=FutureWarning)
    warnings.filterwarnings("ignore", ".*not supported by the model summary")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()

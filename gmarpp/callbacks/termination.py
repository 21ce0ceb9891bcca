"""Stopping by SIGTERM and SIGINT: all ranks together, at the end of a batch, with everything saved."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gmarpp.training.lightning_private import SignalHandlers
from gmarpp.training.ranks import end_launched_ranks, stopping

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Schedulers and launchers may send a signal to the process and to its group: the echo is not a second request.
_ECHO_SECONDS = 1.0
_FINISHED = "finished"


class Termination(Callback):
    """Stops fit, validate, test and predict when any rank receives SIGTERM or SIGINT, on all ranks together.

    The signal takes effect at the end of a batch, where `SIGTERMException` is raised; its code is 143 or 130. Training
    stops at the same step everywhere: callbacks may save in `on_exception`, also where that needs all ranks. An
    interrupted validation is run again, whole, by the run that resumes. A second signal ends the process at once.

    Training costs one sum of an integer over the ranks per batch, in place of Lightning's broadcast; evaluation and
    prediction, whose ranks may have different numbers of batches, one look into the process group's store.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the place of Lightning's signal handlers, of which SIGTERM's waits for other ranks where it interrupts.

        Lightning registers and restores them, so that the process is left as it was.
        """
        stopping.clear()
        self._signals = _Signals(trainer)
        self._signals.take_place(trainer)
        self._loops = 0
        self._group: Any = None
        self._ranks = trainer.world_size if dist.is_available() and dist.is_initialized() else 1
        if self._ranks > 1 and dist.get_backend() != "gloo":
            # On the CPU: the sum neither waits for the accelerator nor makes it wait.
            self._group = dist.new_group(backend="gloo")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Agree; Lightning stops when it has logged the step, and before that `on_validation_start` does."""
        number = self._signals.number
        if self._ranks > 1:
            numbers = torch.tensor([number])
            dist.all_reduce(numbers, dist.ReduceOp.MAX, self._group)
            number = int(numbers)
        if number:
            self._signals.number = number
            # From the last batch of an epoch that no validation follows, Lightning 2.6 resumes in the middle of the
            # next one where steps limit the run. The first batch of the validation or of the next epoch stops instead.
            self._signals.received_sigterm = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            stopping.set()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop before a validation that would be interrupted."""
        if self._signals.received_sigterm:
            raise SIGTERMException
        self._loops += 1

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a loop in which to agree."""
        self._loops += 1

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a loop in which to agree."""
        self._loops += 1

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop if a rank received a signal before any rank was done."""
        fit = trainer.state.fn == TrainerFn.FITTING
        self._stop_loop(trainer.fit_loop.epoch_loop.val_loop if fit else trainer.validate_loop)

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop if a rank received a signal before any rank was done."""
        self._stop_loop(trainer.test_loop)

    def on_predict_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop if a rank received a signal before any rank was done."""
        self._stop_loop(trainer.predict_loop)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Set the exit status of the process, and have a resumed run repeat the validation that was interrupted.

        As the first callback, also see to it that the others can save undisturbed.
        """
        _let_children_end()
        if not isinstance(exception, SIGTERMException):
            return
        exception.code = 128 + self._signals.number
        if trainer.state.fn == TrainerFn.FITTING and trainer.validating:
            # This is how Lightning tells that a validation was interrupted by an error in its first step.
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()

    def _stop_loop(self, loop: Any) -> None:
        last = loop.batch_progress.is_last_batch
        if self._ranks == 1:
            if self._signals.number and not last:
                raise SIGTERMException
            return
        # What is written first counts for all ranks, so that none waits at the loop's end for one that has stopped.
        store, key = dist.distributed_c10d._get_default_store(), f"gmarpp/end of loop {self._loops}"
        found = b""
        if last or self._signals.number:
            found = store.compare_set(key, "", _FINISHED if last else str(int(self._signals.number)))
        elif store.check([key]):
            found = store.get(key)
        if found and found.decode() != _FINISHED:
            self._signals.number = int(found)
            stopping.set()
            raise SIGTERMException


class _Signals(SignalHandlers):
    """Lightning's signal handlers, but for those of SIGTERM and SIGINT, which only take note."""

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__(trainer)
        self.number = 0
        self._received = 0.0

    def register_signal_handlers(self) -> None:
        super().register_signal_handlers()
        for number in SIGNALS:
            self.register(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.number:
            self.number, self._received = number, time.monotonic()
            _say(f"{signal.Signals(number).name} received: stopping after this batch; once more to stop at once")
        elif time.monotonic() - self._received > _ECHO_SECONDS:
            _say(f"{signal.Signals(number).name} received again: stopped at once")
            end_launched_ranks()
            os._exit(128 + number)


def _let_children_end() -> None:
    """Keep torch from reporting ended loader processes, which it does by exceptions wherever the program is.

    Lightning restores the handler that was there before the run.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _say(message: str) -> None:
    # The interrupted code may itself hold the lock of a stream or a logger.
    os.write(2, f"{message}\n".encode())

"""All that is used of Lightning though its names are private, each with the reason, and under a name of our own.

Lightning may rename any of it in a minor version: then this file has to change, and no other.
"""

from typing import Any

import lightning as L
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from typing_extensions import override


class ScriptLauncher(_SubprocessScriptLauncher):
    """The launcher of `python script.py` for each further device, whose own `launch` kills all ranks with the first."""

    def start_other_ranks(self) -> None:
        """Start a process for each further device."""
        self._call_children_scripts()

    def share_threads(self) -> None:
        """Set this rank's share of the machine's threads, as Lightning's own launcher does."""
        _set_num_threads_if_needed(num_processes=self.num_processes)


def replace_launcher(strategy: Any, launcher: type[ScriptLauncher]) -> None:
    """Have a strategy start its ranks by another launcher; Lightning takes none from outside."""
    if type(own := strategy.launcher) is _SubprocessScriptLauncher:
        strategy._launcher = launcher(own.cluster_environment, own.num_processes, own.num_nodes)


def replace_checkpoint_io(strategy: Any, plugin: CheckpointIO) -> None:
    """Have a strategy write by a plugin in place of Lightning's own, also where a wrapper has been put around that."""
    own = strategy.checkpoint_io
    if type(own) is TorchCheckpointIO:
        strategy.checkpoint_io = plugin
    elif isinstance(own, _WrappingCheckpointIO) and type(own.checkpoint_io) is TorchCheckpointIO:
        own._checkpoint_io = plugin


class SignalHandlers(_SignalConnector):
    """Lightning's signal handlers; its SIGTERM handler waits for other ranks wherever it interrupts the program."""

    def take_place(self, trainer: L.Trainer) -> None:
        """Have the trainer register and restore these, and not broadcast once per batch whether SIGTERM came."""
        trainer._signal_connector = self
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]

    def register(self, number: Any, handler: Any) -> None:
        """Register a handler, which Lightning restores."""
        self._register_signal(number, handler)


def _nothing() -> None:
    """Stand for Lightning's broadcast."""


def attached_trainer(module: L.LightningModule) -> L.Trainer | None:
    """Return a module's trainer, or None where the public property raises an error."""
    return module._trainer


def batch_for_step(trainer: L.Trainer, batch: Any) -> Any:
    """Return a batch as a step would get it: converted, moved to the device, and through the hooks of both."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def logged_step(trainer: L.Trainer) -> int:
    """Return the step at which the trainer logs what its module logs now; `global_step` counts otherwise."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def restore_place_in_epoch(trainer: L.Trainer) -> None:
    """Restore the loaders' places; Lightning does so when it sets up the data, before the checkpoint is read."""
    loop = trainer.fit_loop
    restored = loop.restarting and bool(loop._combined_loader_states_to_load)
    loop._load_combined_loader_states()
    if restored and loop._data_fetcher is not None:
        # Of data without a length it has fetched a batch already, of the old place.
        iter(loop._data_fetcher)
    batches = loop.epoch_loop
    unknown = trainer.num_training_batches == float("inf")
    if unknown and batches.restarted_on_train_batch_end and batches.batch_progress.is_last_batch:
        _begin_epoch(batches)


def _begin_epoch(batches: Any) -> None:
    """Count the batches of the next epoch from 0, as Lightning does after an epoch whose length was known."""
    batches.batch_progress.increment_completed()
    for progress in (
        batches.batch_progress,
        batches.scheduler_progress,
        batches.automatic_optimization.optim_progress,
    ):
        progress.reset_on_run()
    batches.val_loop.batch_progress.total.reset()
    batches.reset_restart_stage()


class ObservedCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that tells of each file, and that can be told to save."""

    def before_save(self, trainer: L.Trainer) -> None:
        """Act before a checkpoint is saved, on all ranks."""

    def on_file_saved(self, trainer: L.Trainer, filepath: str) -> None:
        """Act when a checkpoint has been saved, on all ranks."""

    def on_file_removed(self, trainer: L.Trainer, filepath: str) -> None:
        """Act when a checkpoint has been removed, on all ranks."""

    def save(self, trainer: L.Trainer, filepath: str) -> None:
        """Save now."""
        self._save_checkpoint(trainer, filepath)

    def is_saved(self, trainer: L.Trainer) -> bool:
        """Return whether there is nothing to save: this step is saved, or the trainer is not training."""
        return self._should_skip_saving_checkpoint(trainer)

    def forget_step(self) -> None:
        """Have a step count as not saved though there is a checkpoint of it."""
        self._last_global_step_saved = -1

    def wants_error_saved(self, trainer: L.Trainer) -> bool:
        """Return whether to save when a run ends with an error."""
        return self._should_save_on_exception(trainer)

    def metrics_for_name(self, trainer: L.Trainer) -> dict[str, Any]:
        """Return the metrics of which a checkpoint's name may be made, step and epoch among them."""
        return self._monitor_candidates(trainer)

    @override
    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self.before_save(trainer)
        super()._save_checkpoint(trainer, filepath)
        self.on_file_saved(trainer, filepath)

    @override
    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        self.on_file_removed(trainer, filepath)


class ObservedAveraging(EMAWeightAveraging):
    """Averaged weights that tell when they take the network's place, which no public hook does."""

    def on_swap(self) -> None:
        """Act when the average and the trained weights have changed places."""

    @override
    def _swap_models(self, pl_module: L.LightningModule) -> None:
        super()._swap_models(pl_module)
        self.on_swap()


def state_key(callback: Callback, **options: Any) -> str:
    """Return the key for a callback's state by its class and options, so that several of a kind keep theirs apart."""
    return callback._generate_state_key(**options)


class ParsedCommandLine(LightningCLI):
    """A LightningCLI whose subcommands' options, parsers and checkpoint can be reached by subclasses."""

    def option(self, config: Any, name: str) -> Any:
        """Return the subcommand's entry of a configuration, or None."""
        return self._get(config, name)

    def parser_of(self, subcommand: str | None) -> Any:
        """Return the parser of a subcommand."""
        return self._parser(subcommand)

    def take_options_of_checkpoint(self) -> None:
        """Complete the options by those of the checkpoint that is asked for, before anything is built."""
        super()._parse_ckpt_path()

    @property
    def data_class(self) -> Any:
        """The class of data modules that are accepted."""
        return self._datamodule_class

    @override
    def _parse_ckpt_path(self) -> None:
        self.take_options_of_checkpoint()

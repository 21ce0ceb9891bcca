"""The command lines: `train.py fit|validate|test` and `explain.py predict`."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gmarpp.attribution.target import class_index
from gmarpp.callbacks.model_card import ModelCardCheckpoint
from gmarpp.callbacks.progress import ProgressLines
from gmarpp.callbacks.termination import Termination
from gmarpp.callbacks.writer import ExplanationWriter
from gmarpp.checkpoint_io import AtomicCheckpointIO
from gmarpp.command import run_command
from gmarpp.configuration import limit_yaml, require_readable_configurations
from gmarpp.explainer import FAITHFULNESS_METRICS, Explainer
from gmarpp.module import ViTClassifier, classifier_options, load_classifier
from gmarpp.monitored import require_monitored_metrics
from gmarpp.options import Range, require_ranges
from gmarpp.ranks import RankLauncher
from gmarpp.resume import find_checkpoint
from gmarpp.safe_reading import find_path

# the trainer's numbers that Lightning takes unchecked, or refuses without naming them
TRAINER_RANGES = {
    "gradient_clip_val": Range(0),
    "accumulate_grad_batches": Range(1),
    "check_val_every_n_epoch": Range(1),
    "log_every_n_steps": Range(0),
    "num_sanity_val_steps": Range(-1),
    "min_epochs": Range(0),
    "min_steps": Range(0),
}
# what a checkpoint fixes about how the network sees images; it differs from the command line only by being resolved
RESOLVED = ("image_size", "model_args", "preprocessing")
# options of the machine, not of the network: a run may be resumed on another one
MACHINE = ("gradient_checkpointing", "compile", "channels_last")
# what segmentation masks add to the metrics that need none
MASK_METRICS = ("pixel_accuracy", "iou", "average_precision")


class Trainer(L.Trainer):
    """A Trainer that reads checkpoints without running code, writes them atomically, and ends with its ranks.

    For it `--trainer.limit_train_batches 1` means one batch: Lightning's own annotation makes the parser read 1 as 1.0,
    all batches; so for the other three limits.
    """

    def __init__(
        self,
        *args: Any,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        **kwargs: Any,
    ) -> None:
        require_ranges(kwargs, TRAINER_RANGES, "--trainer.")
        if kwargs.get("val_check_interval") == 0:
            raise ValueError("--trainer.val_check_interval: expected batches, a share of an epoch or a time, got 0")
        if kwargs.get("enable_progress_bar") is None and not sys.stdout.isatty():
            kwargs["enable_progress_bar"] = False
        try:
            super().__init__(
                *args,
                limit_train_batches=limit_train_batches,
                limit_val_batches=limit_val_batches,
                limit_test_batches=limit_test_batches,
                limit_predict_batches=limit_predict_batches,
                **kwargs,
            )
        except TypeError as error:
            devices, time = kwargs.get("devices"), kwargs.get("max_time")
            raise ValueError(f"--trainer.devices {devices}, --trainer.max_time {time}: {error}") from error
        plugin: Any = self.strategy.checkpoint_io
        if type(plugin) is TorchCheckpointIO:
            self.strategy.checkpoint_io = AtomicCheckpointIO()
        elif isinstance(plugin, _WrappingCheckpointIO) and type(plugin.checkpoint_io) is TorchCheckpointIO:
            plugin._checkpoint_io = AtomicCheckpointIO()
        launcher = self.strategy.launcher
        if type(launcher) is _SubprocessScriptLauncher:
            self.strategy._launcher = RankLauncher(
                launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
            )


class LatestCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that saves the end of a run too, and on an error only where no rank has to wait for others."""

    _in_training = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that there is something to save."""
        super().on_train_start(trainer, pl_module)
        self._in_training = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what was learned since the last checkpoint, when they are made every so many steps."""
        super().on_train_end(trainer, pl_module)
        self._in_training = False
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_checkpoint(trainer, self.format_checkpoint_name(trainer.callback_metrics))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save if all ranks got here, as they do when they are stopped by a signal."""
        stopped = isinstance(exception, SIGTERMException)
        if not self._in_training or not (stopped or trainer.world_size == 1):
            return
        if stopped:
            # A checkpoint of this step may be older than the validation that was interrupted.
            self._last_global_step_saved = -1
        if self._should_save_on_exception(trainer):
            path = self.format_checkpoint_name(self._monitor_candidates(trainer))
            with _undisturbed():
                self._save_checkpoint(trainer, path)
            rank_zero_info(f"Saved step {trainer.global_step}: continue with --ckpt_path {path}")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep torch from reporting a killed loader process, which it does by an exception wherever the program is."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


class CommandLine(LightningCLI):
    """A LightningCLI that checks the files that its command line names before it builds anything."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line.

        Raises:
            ValueError: naming the file or the option that is wrong.
        """
        limit_yaml()
        require_readable_configurations(sys.argv[1:] if args is None else args)
        super().parse_arguments(parser, args)
        options = self.config[self.config.subcommand]
        if not isinstance(options.seed_everything, bool):
            require_ranges(options, {"seed_everything": Range(0, 2**32 - 1)}, "--")


class TrainCLI(CommandLine):
    """Fine-tunes and evaluates; a run logs to TensorBoard and keeps its best checkpoint, with a card, and its last."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            model_class=ViTClassifier,
            datamodule_class=L.LightningDataModule,
            subclass_mode_data=True,
            trainer_class=Trainer,
            trainer_defaults={
                "callbacks": [ProgressLines(), Termination()],
                "default_root_dir": "logs",
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": "logs", "name": "", "default_hp_metric": False},
                },
            },
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs=_parser_options("fit", "validate", "test"),
            auto_configure_optimizers=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Fit, validate and test; explaining is `explain.py`'s."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the checkpoint of the best validation and the one of the latest state, both configurable."""
        parser.add_lightning_class_args(ModelCardCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LatestCheckpoint, "last_checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/accuracy",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
                "checkpoint.auto_insert_metric_name": False,
                "last_checkpoint.filename": "last",
                "last_checkpoint.save_on_exception": True,
                "last_checkpoint.enable_version_counter": False,
            }
        )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Keeps checkpoints and the configuration of training alone, and only where checkpoints are wanted."""
        if self.subcommand != "fit":
            self.save_config_callback = None
        if self.subcommand != "fit" or self._get(self.config_init, "trainer").get("enable_checkpointing") is False:
            self._parser(self.subcommand).callback_keys.clear()
        return super().instantiate_trainer(**kwargs)

    def instantiate_classes(self) -> None:
        """Reads the weights to evaluate, from any format, before the data numbers its classes."""
        super().instantiate_classes()
        path = self._get(self.config, "ckpt_path")
        if self.subcommand != "fit" and path is not None:
            self.model.restore(path)

    def before_fit(self) -> None:
        """Refuse to train for metrics that nobody logs."""
        require_monitored_metrics(self.trainer, self.model)

    def validate(self, model: ViTClassifier, ckpt_path: str | None = None, **options: Any) -> None:
        """Validates without letting Lightning load the checkpoint a second time."""
        self.trainer.validate(model, **options)

    def test(self, model: ViTClassifier, ckpt_path: str | None = None, **options: Any) -> None:
        """Tests without letting Lightning load the checkpoint a second time."""
        self.trainer.test(model, **options)

    def _parse_ckpt_path(self) -> None:
        """Takes the model's options from the checkpoint, and says so where the command line asked for others."""
        command = self.config.subcommand
        options = self.config[command]
        if options.get("ckpt_path") in ("last", "best"):
            keyword, options["ckpt_path"] = options.ckpt_path, find_checkpoint(options.ckpt_path, options)
            rank_zero_info(f"--ckpt_path {keyword}: {options.ckpt_path}")
        path = options.get("ckpt_path")
        if path is None and command != "fit" and not (options.model.pretrained or options.model.weights):
            raise ValueError(f"--ckpt_path is missing: {command} would evaluate a network of random weights")
        if path is None or (command == "fit" and path == "hpc"):
            return
        if command == "fit":
            _require_resumable(path, options.trainer)
        asked, default = options.model.as_dict(), self._parser(command).get_defaults().model.as_dict()
        saved = {key: value for key, value in classifier_options(path).items() if key not in MACHINE}
        self.config = self.parser.parse_object({command: {"model": saved}}, self.config)
        taken = self.config[command].model
        for key in sorted(asked.keys() - set(RESOLVED)):
            if asked[key] not in (taken[key], default[key]):
                rank_zero_warn(f"--model.{key} {asked[key]} is not used: the checkpoint was trained with {taken[key]}")


class ExplainCLI(CommandLine):
    """Explains images with a trained network, which comes from the checkpoint alone."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            datamodule_class=L.LightningDataModule,
            subclass_mode_data=True,
            trainer_class=Trainer,
            trainer_defaults={
                "callbacks": [ProgressLines(), Termination()],
                "logger": False,
                "enable_checkpointing": False,
                "enable_model_summary": False,
            },
            seed_everything_default=0,
            save_config_callback=None,
            parser_kwargs=_parser_options("predict"),
            auto_configure_optimizers=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Predict alone; its results go to files, not back to the caller."""
        return {"predict": LightningCLI.subcommands()["predict"] | {"return_predictions"}}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the trainer and the data, but no model: its options are the checkpoint's."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        defaults = {f"trainer.{key}": value for key, value in self.trainer_defaults.items() if key != "callbacks"}
        parser.set_defaults(defaults)
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what to explain and where to write it."""
        parser.add_class_arguments(Explainer, "explain")
        parser.add_class_arguments(
            ExplanationWriter, "write", skip={"output", "resume", "overwrite"}, instantiate=False
        )
        parser.add_argument(
            "--output", type=str | None, default=None, help="Folder of the results (default: results/<checkpoint>)."
        )
        parser.add_argument("--resume", action="store_true", help="Continue an interrupted run in the same folder.")
        parser.add_argument(
            "--overwrite", action="store_true", help="Replace the run in the same folder, once the new one can start."
        )

    def _parse_ckpt_path(self) -> None:
        if not self.config.predict.ckpt_path:
            raise ValueError(
                "--ckpt_path is missing: explain.py explains a trained network, "
                "for example --ckpt_path checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors"
            )

    def instantiate_classes(self) -> None:
        """Builds the network from the checkpoint, the data and the trainer from the command line."""
        options = self.parser.instantiate_classes(self.config)
        self.config_init = options
        self.datamodule = options.predict.data
        output = options.predict.output or Path("results") / Path(options.predict.ckpt_path).stem
        writer = ExplanationWriter(
            output, resume=options.predict.resume, overwrite=options.predict.overwrite, **options.predict.write
        )
        writer.output.check()
        self.model = load_classifier(options.predict.ckpt_path)
        explainer = options.predict.explain
        if getattr(self.datamodule, "masks", None) is not None and explainer.metrics == FAITHFULNESS_METRICS:
            explainer = replace(explainer, metrics=(*FAITHFULNESS_METRICS, *MASK_METRICS))
        if isinstance(explainer.target, str) and explainer.target not in ("predicted", "label"):
            class_index(explainer.target, self.model.model)
        self.model.explainer = explainer
        own = options.predict.trainer.callbacks or []
        self.trainer = self.instantiate_trainer(callbacks=[*(own if isinstance(own, list) else [own]), writer])

    def predict(self, model: ViTClassifier, datamodule: L.LightningDataModule, **_: Any) -> None:
        """Runs the predict loop without letting Lightning load the checkpoint a second time."""
        self.trainer.predict(model, datamodule=datamodule, return_predictions=False)


def train_main(args: list[str] | None = None) -> TrainCLI:
    """Runs `train.py`; a user's mistake ends with one line on stderr and a status other than 0.

    Args:
        args: command line without the program's name; `sys.argv`'s when `None`.
    """
    return run_command(TrainCLI, args)


def explain_main(args: list[str] | None = None) -> ExplainCLI:
    """Runs `explain.py`; a user's mistake ends with one line on stderr and a status other than 0.

    Args:
        args: command line without the program's name; `sys.argv`'s when `None`.
    """
    return run_command(ExplainCLI, args)


def _require_resumable(path: str, trainer: Any) -> None:
    if trainer.max_epochs not in (None, -1) and trainer.max_steps != -1:
        # with both limits Lightning 2.6 counts the epoch that the checkpoint ends twice, and trains too little
        raise ValueError("a run is resumed up to --trainer.max_epochs or --trainer.max_steps, not both: set one to -1")
    if find_path(path).suffix != ".ckpt":
        raise ValueError(
            f"--ckpt_path {path} is no training checkpoint (.ckpt); to start from its weights use --model.weights"
        )


def _parser_options(*subcommands: str) -> dict[str, Any]:
    """Has every parser raise its errors instead of printing a page of usage."""
    return {"exit_on_error": False, **{name: {"exit_on_error": False} for name in subcommands}}

"""The commands `fit`, `validate` and `test`."""

from argparse import ArgumentError
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from gmarpp.callbacks.latest_checkpoint import LatestCheckpoint
from gmarpp.callbacks.model_card import ModelCardCheckpoint
from gmarpp.callbacks.monitored import require_monitored_metrics
from gmarpp.callbacks.progress import ProgressLines
from gmarpp.callbacks.termination import Termination
from gmarpp.cli.command_line import CommandLine, parser_options
from gmarpp.command import run_command
from gmarpp.files import find_path
from gmarpp.network.files.load import describe_weights
from gmarpp.network.files.weights import Weights
from gmarpp.training.hyperparameters import GROUPS, classifier_options, moved_options
from gmarpp.training.module import ViTClassifier
from gmarpp.training.resume import find_checkpoint
from gmarpp.training.task import known_task
from gmarpp.training.trainer import Trainer

# What a checkpoint fixes about how the network sees images; it differs from the command line only by being resolved.
RESOLVED = ("image_size", "model_args", "preprocessing")
# What the best checkpoint is the best by; tasks without accuracy have a metric of their own.
DEFAULT_MONITOR = "val/accuracy"


LOGS = "logs"
"""Folder of logs and checkpoints where none is named."""


class TrainCLI(CommandLine):
    """Fine-tunes and evaluates; a run logs to TensorBoard and keeps its best checkpoint, with a card, and its last."""

    weights: Weights | None = None

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            model_class=ViTClassifier,
            datamodule_class=L.LightningDataModule,
            subclass_mode_data=True,
            trainer_class=Trainer,
            trainer_defaults={
                "callbacks": [ProgressLines(), Termination()],
                "default_root_dir": LOGS,
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": LOGS, "name": "", "default_hp_metric": False},
                },
            },
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs=parser_options("fit", "validate", "test"),
            auto_configure_optimizers=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Fit, validate and test; `predict` explains, and is a command line of its own."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, and name the new place of options that have become part of a group.

        Raises:
            ArgumentError: naming the option that is wrong.
            ValueError: naming the file or the option that is wrong.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            if moved := moved_options(str(error)):
                raise ArgumentError(None, f"{error}; {moved}") from error
            raise
        options = self.config[self.config.subcommand]
        model, trainer = options.model, options.trainer
        # The default logger keeps what it logs in the trainer's folder.
        if trainer.default_root_dir != LOGS and getattr(trainer.logger, "init_args", {}).get("save_dir") == LOGS:
            trainer.logger.init_args.save_dir = trainer.default_root_dir
        # As YAML reads a group whose options are all commented out.
        if empty := [group for group in GROUPS if model[group] is None]:
            raise ValueError(f"model.{empty[0]}: expected options of the group, got nothing: leave it out")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the checkpoint of the best validation and the one of the latest state, both configurable."""
        parser.add_lightning_class_args(ModelCardCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LatestCheckpoint, "last_checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": DEFAULT_MONITOR,
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_weights_only": True,
                "last_checkpoint.filename": "last",
                "last_checkpoint.save_on_exception": True,
                "last_checkpoint.enable_version_counter": False,
            }
        )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Keep checkpoints and the configuration of training alone, and only where checkpoints are wanted."""
        if self.subcommand != "fit":
            self.save_config_callback = None
        if self.subcommand != "fit" or self.option(self.config_init, "trainer").get("enable_checkpointing") is False:
            self.parser_of(self.subcommand).callback_keys.clear()
        return super().instantiate_trainer(**kwargs)

    def instantiate_classes(self) -> None:
        """Build the network of a checkpoint, of any format, from what was read of it; else from its options."""
        options = self.config[self.config.subcommand]
        if self.config.subcommand == "fit" and options.checkpoint.monitor == DEFAULT_MONITOR:
            options.checkpoint.monitor, options.checkpoint.mode = known_task(options.model.task).monitored
        if self.weights is not None:
            self.parser.add_instantiator(self._restore, ViTClassifier, subclasses=False)
        super().instantiate_classes()

    def _restore(self, kind: type[ViTClassifier], *, applied_instantiation_links: Any, **options: Any) -> ViTClassifier:
        # Handed on, not kept: the network has its own copy.
        weights, self.weights = self.weights, None
        assert weights is not None
        return kind.from_weights(weights, **options)

    def before_fit(self) -> None:
        """Refuse to train for metrics that nobody logs."""
        require_monitored_metrics(self.trainer, self.model)

    def after_fit(self) -> None:
        """Say where the best checkpoint is, and have TensorBoard compare runs by its score in the tab HParams."""
        for each in self.trainer.checkpoint_callbacks:
            if isinstance(each, ModelCardCheckpoint) and each.best_model_path and each.best_model_score is not None:
                score = float(each.best_model_score)
                rank_zero_info(f"Best checkpoint, {each.monitor} {score:.4g}: {each.best_model_path}")
                # Lightning's command line adds options of its own.
                options = {name: value for name, value in self.model.hparams.items() if not name.startswith("_")}
                for logger in self.trainer.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        logger.log_hyperparams(options, {f"best/{each.monitor}": score})
                        logger.finalize("success")

    def validate(self, model: ViTClassifier, ckpt_path: str | None = None, **options: Any) -> None:
        """Validate without letting Lightning load the checkpoint a second time."""
        self.trainer.validate(model, **options)

    def test(self, model: ViTClassifier, ckpt_path: str | None = None, **options: Any) -> None:
        """Test without letting Lightning load the checkpoint a second time."""
        self.trainer.test(model, **options)

    def take_options_of_checkpoint(self) -> None:
        """Take the model's options from the checkpoint, and say so where the command line asked for others."""
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
        asked, default = dict(options.model.items()), self.parser_of(command).get_defaults().model
        self.weights = describe_weights(path)
        saved = classifier_options(self.weights)
        # The machine's, not the network's: a run may be resumed on another one.
        saved.pop("execution", None)
        self.config = self.parser.parse_object({command: {"model": saved}}, self.config)
        taken = self.config[command].model
        for key in sorted(asked.keys() - set(RESOLVED)):
            if asked[key] not in (taken[key], default[key]):
                rank_zero_warn(f"--model.{key} {asked[key]} is not used: the checkpoint was trained with {taken[key]}")


def train_main(args: list[str] | None = None) -> TrainCLI:
    """Run `fit`, `validate` or `test`; a user's mistake ends with one line on stderr and a status other than 0.

    Args:
        args: command line without the program's name; `sys.argv`'s when `None`.
    """
    return run_command(TrainCLI, args)


def _require_resumable(path: str, trainer: Any) -> None:
    if trainer.max_epochs not in (None, -1) and trainer.max_steps != -1:
        # With both limits Lightning 2.6 counts the epoch that the checkpoint ends twice, and trains too little.
        raise ValueError("a run is resumed up to --trainer.max_epochs or --trainer.max_steps, not both: set one to -1")
    if find_path(path).suffix != ".ckpt":
        raise ValueError(
            f"--ckpt_path {path} is no training checkpoint (.ckpt); to start from its weights use --model.weights"
        )

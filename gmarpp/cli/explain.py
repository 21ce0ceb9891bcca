"""The commands that take any trained network: `predict`, and `validate` and `test` of a network by its name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from gmarpp.callbacks.progress import ProgressLines
from gmarpp.callbacks.termination import Termination
from gmarpp.callbacks.writer import ExplanationWriter
from gmarpp.cli.command_line import CommandLine, parser_options
from gmarpp.command import run_command
from gmarpp.configuration import SECTIONS
from gmarpp.explainer import FAITHFULNESS_METRICS, Explainer
from gmarpp.network.output import class_index
from gmarpp.training.module import ViTClassifier
from gmarpp.training.network_choice import NetworkChoice, load_chosen
from gmarpp.training.pretrained_classifier import PretrainedClassifier
from gmarpp.training.trainer import Trainer

# What segmentation masks add to the metrics that need none.
MASK_METRICS = ("pixel_accuracy", "iou", "average_precision")


class NetworkCLI(CommandLine):
    """A command line for any trained network, by its checkpoint, a name or a class, and for data and a trainer."""

    sections = SECTIONS - {"model"}
    commands: tuple[str, ...]

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
            parser_kwargs=parser_options(*self.commands),
            auto_configure_optimizers=False,
            args=args,
        )

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        """Return the commands, with the arguments of the trainer's methods that are no options."""
        return {name: LightningCLI.subcommands()[name] | {"return_predictions"} for name in cls.commands}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the trainer, the data and the network, whose options are its own."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        defaults = {f"trainer.{key}": value for key, value in self.trainer_defaults.items() if key != "callbacks"}
        parser.set_defaults(defaults)
        parser.add_lightning_class_args(self.data_class, "data", subclass_mode=True)
        parser.add_argument(
            "--model",
            type=NetworkChoice,
            default=None,
            help="Network of a checkpoint that does not name it: timm's name, or a class and its options. With "
            "weights of its own it needs no checkpoint: timm's name, hf-hub:OWNER/NAME, or a class that loads them.",
        )

    def take_options_of_checkpoint(self) -> None:
        """Leave them: they are read with the checkpoint's weights."""

    def before_instantiate_classes(self) -> None:
        """Have anyone's LightningModule made of its options alone, without what Lightning's command line would add."""
        self.parser.add_instantiator(_make, L.LightningModule, prepend=True)


def _make(kind: type[L.LightningModule], *values: Any, applied_instantiation_links: Any, **options: Any) -> Any:
    return kind(*values, **options)


class EvaluationCLI(NetworkCLI):
    """Evaluates any trained network on labeled images."""

    commands = ("validate", "test")

    def instantiate_classes(self) -> None:
        """Build the network, the data and the trainer."""
        self.config_init = self.parser.instantiate_classes(self.config)
        options = self.config_init[self.subcommand]
        self.datamodule = options.data
        self.model = load_chosen(options.model, options.ckpt_path)
        own = options.trainer.callbacks or []
        self.trainer = self.instantiate_trainer(callbacks=own if isinstance(own, list) else [own])

    def validate(self, model: L.LightningModule, datamodule: L.LightningDataModule, **_: Any) -> None:
        """Validate without letting Lightning load the checkpoint a second time."""
        self.trainer.validate(model, datamodule=datamodule)

    def test(self, model: L.LightningModule, datamodule: L.LightningDataModule, **_: Any) -> None:
        """Test without letting Lightning load the checkpoint a second time."""
        self.trainer.test(model, datamodule=datamodule)


class ExplainCLI(NetworkCLI):
    """Explains images with a trained network."""

    commands = ("predict",)
    model: ViTClassifier | PretrainedClassifier

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what to explain and where to write it."""
        parser.add_class_arguments(Explainer, "explain", skip={"architecture"})
        parser.add_argument(
            "--architecture",
            type=str | None,
            default=None,
            help="Path of a function from the network to gmarpp.Architecture, as my_code.describe, where it is not "
            "found by itself; or name of the module inside the network that is of a known family.",
        )
        parser.add_class_arguments(
            ExplanationWriter, "write", skip={"output", "resume", "overwrite"}, instantiate=False
        )
        parser.add_argument(
            "--output", type=str | None, default=None, help="Folder of the results (default: results/<network>)."
        )
        parser.add_argument("--resume", action="store_true", help="Continue an interrupted run in the same folder.")
        parser.add_argument(
            "--overwrite", action="store_true", help="Replace the run in the same folder, once the new one can start."
        )

    def instantiate_classes(self) -> None:
        """Build the network, the data and the trainer."""
        if self.config.predict.trainer.limit_predict_batches == 0:
            raise ValueError("--trainer.limit_predict_batches is 0, so there is nothing to explain")
        options = self.parser.instantiate_classes(self.config)
        self.config_init = options
        self.datamodule = options.predict.data
        writer = ExplanationWriter(
            options.predict.output or _default_output(self.config.predict),
            resume=options.predict.resume,
            overwrite=options.predict.overwrite,
            **options.predict.write,
        )
        writer.output.check()
        self.model = load_chosen(options.predict.model, options.predict.ckpt_path)
        explainer = replace(options.predict.explain, architecture=options.predict.architecture)
        if getattr(self.datamodule, "masks", None) is not None and explainer.metrics == FAITHFULNESS_METRICS:
            explainer = replace(explainer, metrics=(*FAITHFULNESS_METRICS, *MASK_METRICS))
        targets = [explainer.target] if isinstance(explainer.target, str | int) else explainer.target
        for target in targets:
            if isinstance(target, str) and target not in ("predicted", "label"):
                class_index(target, self.model.model)
        self.model.explainer = explainer.for_network(self.model.model)
        own = options.predict.trainer.callbacks or []
        self.trainer = self.instantiate_trainer(callbacks=[*(own if isinstance(own, list) else [own]), writer])

    def predict(self, model: L.LightningModule, datamodule: L.LightningDataModule, **_: Any) -> None:
        """Run the predict loop without letting Lightning load the checkpoint a second time."""
        self.trainer.predict(model, datamodule=datamodule, return_predictions=False)


def _default_output(options: Any) -> Path:
    """Return the folder in results/ that is named after the checkpoint, or the network that brings its weights."""
    if options.ckpt_path:
        return Path("results") / Path(options.ckpt_path).stem
    model = options.model
    name = getattr(model, "class_path", None) or getattr(model, "__name__", None) or str(model or "none")
    return Path("results") / name.rpartition("/")[2]


def explain_main(args: list[str] | None = None) -> ExplainCLI:
    """Run `predict`; a user's mistake ends with one line on stderr and a status other than 0.

    Args:
        args: command line without the program's name; `sys.argv`'s when `None`.
    """
    return run_command(ExplainCLI, args)


def evaluate_main(args: list[str] | None = None) -> EvaluationCLI:
    """Run `validate` or `test` of any network; a user's mistake ends as one of `explain_main`.

    Args:
        args: command line without the program's name; `sys.argv`'s when `None`.
    """
    return run_command(EvaluationCLI, args)

"""The command `predict`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from gmarpp.callbacks.progress import ProgressLines
from gmarpp.callbacks.termination import Termination
from gmarpp.callbacks.writer import ExplanationWriter
from gmarpp.cli.command_line import CommandLine, _parser_options
from gmarpp.command import run_command
from gmarpp.explainer import FAITHFULNESS_METRICS, Explainer
from gmarpp.network.output import class_index
from gmarpp.training.module import ViTClassifier, load_classifier
from gmarpp.training.trainer import Trainer

# What segmentation masks add to the metrics that need none.
MASK_METRICS = ("pixel_accuracy", "iou", "average_precision")


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
        """Return predict alone; its results go to files, not back to the caller."""
        return {"predict": LightningCLI.subcommands()["predict"] | {"return_predictions"}}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the trainer and the data, but no model: its options are the checkpoint's."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        defaults = {f"trainer.{key}": value for key, value in self.trainer_defaults.items() if key != "callbacks"}
        parser.set_defaults(defaults)
        parser.add_lightning_class_args(self.data_class, "data", subclass_mode=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what to explain and where to write it."""
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

    def take_options_of_checkpoint(self) -> None:
        """Refuse to explain without a checkpoint; its options are read with its weights."""
        if not self.config.predict.ckpt_path:
            raise ValueError(
                "--ckpt_path is missing: expected the file of a trained network, "
                "for example --ckpt_path checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors"
            )

    def instantiate_classes(self) -> None:
        """Build the network from the checkpoint, the data and the trainer from the command line."""
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
        targets = [explainer.target] if isinstance(explainer.target, str | int) else explainer.target
        for target in targets:
            if isinstance(target, str) and target not in ("predicted", "label"):
                class_index(target, self.model.model)
        self.model.explainer = explainer.for_network(self.model.model)
        own = options.predict.trainer.callbacks or []
        self.trainer = self.instantiate_trainer(callbacks=[*(own if isinstance(own, list) else [own]), writer])

    def predict(self, model: ViTClassifier, datamodule: L.LightningDataModule, **_: Any) -> None:
        """Run the predict loop without letting Lightning load the checkpoint a second time."""
        self.trainer.predict(model, datamodule=datamodule, return_predictions=False)


def explain_main(args: list[str] | None = None) -> ExplainCLI:
    """Run `predict`; a user's mistake ends with one line on stderr and a status other than 0.

    Args:
        args: command line without the program's name; `sys.argv`'s when `None`.
    """
    return run_command(ExplainCLI, args)

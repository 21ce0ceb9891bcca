"""Where the monitor's charts and pictures go: the one place that knows what each kind of logger takes."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image

from gmarpp.figures import figure_bytes
from gmarpp.files import write_atomically
from gmarpp.training.lightning_private import logged_step

_DPI = 110  # readable at the size in which loggers show pictures


class MonitorLog:
    """Hands charts and pictures to the loggers of a trainer, at the step of what its module logs.

    TensorBoard, W&B, MLflow and Comet get pictures in their own ways, and so does any logger that has W&B's
    `log_image`. Pictures for all others, or without a logger, are files `<tag>/<step>.png` in the logger's folder, or
    else in the trainer's; a folder at an address (`s3://…`) gets none.

    Args:
        trainer: whose loggers are used.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer
        self._writers: dict[str, Any] = {}

    def compare(self, values: Mapping[str, Mapping[str, float]]) -> None:
        """Add to TensorBoard's charts `attribution_by_metric/<metric>`, which have a line for each method.

        TensorBoard colors lines by run, so each method has a run of its own below the logger's.

        Args:
            values: by method and metric.
        """
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for method, metrics in values.items():
                    writer = self._writer(logger, method)
                    for metric, value in metrics.items():
                        writer.add_scalar(f"attribution_by_metric/{metric}", value, logged_step(self.trainer))
                    writer.flush()

    def add_figure(self, tag: str, figure: Figure) -> None:
        """Log a figure.

        Args:
            tag: such as `attribution_maps/rollout`; loggers group by what is before the slash.
            figure: of matplotlib; its resolution is changed.
        """
        figure.set_dpi(_DPI)
        data = figure_bytes(figure)
        step = logged_step(self.trainer)
        with Image.open(io.BytesIO(data)) as opened:
            picture = opened.convert("RGB")
        loggers: list[Logger | None] = [*self.trainer.loggers]
        for logger in loggers or [None]:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(tag, np.asarray(picture), step, dataformats="HWC")
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_image(logger.run_id, picture, key=tag, step=step)
            elif isinstance(logger, CometLogger):
                logger.experiment.log_image(picture, name=tag, step=step)
            elif logger is not None and hasattr(logger, "log_image"):
                logger.log_image(tag, [picture], step=step)
            else:
                self._write(logger, f"{tag}/{step:08d}.png", data)

    def close(self) -> None:
        """End TensorBoard's runs of the methods."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _writer(self, logger: TensorBoardLogger, method: str) -> Any:
        folder = f"{logger.log_dir}/{method}"
        if folder not in self._writers:
            self._writers[folder] = type(logger.experiment)(log_dir=folder)
        return self._writers[folder]

    def _write(self, logger: Logger | None, name: str, data: bytes) -> None:
        folder = (logger and (logger.log_dir or logger.save_dir)) or self.trainer.default_root_dir
        if "://" not in str(folder):
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)

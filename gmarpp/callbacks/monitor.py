"""Attribution maps and metrics at every validation."""

import io
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import default_collate
from torchmetrics import MetricCollection
from typing_extensions import override

from gmarpp.data.probe import spread_over_classes
from gmarpp.explainer import ExplainedBatch, Explainer
from gmarpp.figures import comparison_figure, figure_bytes
from gmarpp.labels import metric_label
from gmarpp.metrics import METRICS
from gmarpp.metrics.registry import metric_inputs
from gmarpp.options import Range, require_ranges
from gmarpp.run.curve_figure import curves_figure
from gmarpp.run.summary import CurveSum
from gmarpp.training.lightning_private import state_key
from gmarpp.visualize import MapStyle, SignedMaps


class AttributionMonitor(L.Callback):
    """Explains a fixed set of validation images, the probe, and logs how faithful the explanations are.

    At each validation it logs the scalars ``attribution/<method>/<metric>``, which checkpointing and early stopping can
    monitor, the seconds it took as ``attribution/seconds``, and on loggers that take pictures a grid of images with
    their maps and the mean insertion and deletion curves; TensorBoard's tab Custom Scalars compares the methods. The
    probe is the same at every validation and spread evenly over classes and ranks. The network runs in a batch hook, so
    averaged weights, where there are some, are explained.

    Args:
        explainer: methods, target and metrics. By default the five faithfulness metrics of GMAR++, GMAR, Rollout and
            LeGrad, with 14 steps.
        images: size of the probe over all ranks; 0 switches the monitor off, `fast_dev_run` explains one per rank.
        every_n_epochs: validate the explanations at every n-th validation only.
        grid_images: images in the grid.
        batch_size: images explained at a time.
        signed_maps: how maps with relevance against the class are drawn: ``diverging``, blue against and red for the
            class, or ``positive``, only what is for it.
    """

    def __init__(
        self,
        explainer: Explainer | None = None,
        images: int = 64,
        every_n_epochs: int = 1,
        grid_images: int = 6,
        batch_size: int = 16,
        signed_maps: SignedMaps = "diverging",
    ) -> None:
        require_ranges(
            {"images": images, "every_n_epochs": every_n_epochs, "grid_images": grid_images, "batch_size": batch_size},
            {"images": Range(0), "every_n_epochs": Range(1), "grid_images": Range(0), "batch_size": Range(1)},
            "AttributionMonitor.",
        )
        self.explainer = explainer or Explainer(steps=14)
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.grid_images = grid_images
        self.batch_size = batch_size
        self.style = MapStyle(signed_maps=signed_maps)
        self._metrics: dict[str, MetricCollection] = {}
        self._curves: dict[str, dict[str, CurveSum]] = {}
        self._shown: list[ExplainedBatch] = []
        self._seconds = 0.0
        self._validations = 0

    @property
    @override
    def state_key(self) -> str:
        return state_key(self, methods=self.explainer.names, metrics=self.explainer.metrics)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if 0 < self.images < trainer.world_size:
            raise ValueError(
                f"the monitor's probe of {self.images} images is less than the {trainer.world_size} processes: raise "
                "its option images, or set it to 0 to switch the monitor off"
            )

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # TensorBoard then has a chart for each metric, with a line for each method.
        charts = {
            metric_label(metric): [
                "Multiline",
                [f"attribution/{method}/{metric}$" for method in self.explainer.names],
            ]
            for metric in self.explainer.metrics
        }
        for logger in trainer.loggers:
            if self.images and isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars({"attribution": charts})

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._metrics = {
            method: MetricCollection({name: METRICS[name]() for name in self.explainer.metrics}, compute_groups=False)
            for method in self.explainer.names
        }
        for collection in self._metrics.values():
            collection.to(pl_module.device)
        self._curves, self._shown, self._seconds = {}, [], 0.0

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Beside the first batch: averaged weights are swapped out again before the hooks at the end of the epoch.
        if batch_idx or dataloader_idx or not self._is_due(trainer):
            return
        started = time.perf_counter()
        network: Any = pl_module.model
        for probe in self._probe(trainer, pl_module):
            with trainer.precision_plugin.forward_context():
                explained = self.explainer(network, probe)
            self._accumulate(explained, pl_module.device)
            if trainer.is_global_zero and sum(len(each.path) for each in self._shown) < self.grid_images:
                self._shown.append(explained)
        self._seconds = time.perf_counter() - started

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_due(trainer):
            for method, collection in self._metrics.items():
                for name, value in collection.compute().items():
                    # The same on all ranks already: sync_dist only tells Lightning so.
                    pl_module.log(f"attribution/{method}/{name}", value.to(pl_module.device), sync_dist=True)
            pl_module.log("attribution/seconds", self._seconds, sync_dist=True, reduce_fx="max")
            self._sum_curves(trainer, pl_module.device)
            if trainer.is_global_zero:
                self._draw(trainer, pl_module)
        self._validations += not trainer.sanity_checking

    def _is_due(self, trainer: L.Trainer) -> bool:
        return self.images > 0 and not trainer.sanity_checking and self._validations % self.every_n_epochs == 0

    def _probe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[dict[str, Any]]:
        """Return this rank's share of the probe in batches."""
        loaders: Any = trainer.val_dataloaders
        dataset: Any = (loaders[0] if isinstance(loaders, list | tuple) else loaders).dataset
        if not hasattr(dataset, "labels") or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                f"the monitor cannot choose its probe from {type(dataset).__name__}, which is no indexed data set with "
                "labels: use data that is not streamed, or set the monitor's option images to 0"
            )
        images = trainer.world_size if trainer.fast_dev_run else self.images  # type: ignore[attr-defined]
        chosen = spread_over_classes(np.asarray(dataset.labels), images)[trainer.global_rank :: trainer.world_size]
        for start in range(0, len(chosen), self.batch_size):
            samples = [dataset[int(index)] for index in chosen[start : start + self.batch_size]]
            yield pl_module.transfer_batch_to_device(default_collate(samples), pl_module.device, 0)

    def _accumulate(self, explained: ExplainedBatch, device: torch.device) -> None:
        for method, inputs in explained.inputs.items():
            unknown = [name for name in self.explainer.metrics if not set(metric_inputs(name)) <= inputs.keys()]
            if unknown:
                raise ValueError(
                    f"{', '.join(unknown)} cannot be monitored: the data has neither boxes nor masks; take them out of "
                    "the monitor's metrics"
                )
            self._metrics[method].update(**{name: value.to(device) for name, value in inputs.items()})
            if method in explained.curves:
                curves = explained.curves[method]
                for kind, scores in (("insertion", curves.insertion), ("deletion", curves.deletion)):
                    sums = self._curves.setdefault(kind, {})
                    sums.setdefault(method, CurveSum(curves.fractions.numpy())).add(scores.numpy())

    def _sum_curves(self, trainer: L.Trainer, device: torch.device) -> None:
        for sums in self._curves.values():
            for each in sums.values():
                mine = np.stack((np.full_like(each.total, each.n), each.total, each.squares)).astype(np.float32)
                n, each.total, each.squares = (
                    trainer.strategy.reduce(torch.from_numpy(mine).to(device), reduce_op="sum").double().cpu().numpy()
                )
                each.n = int(n[0])

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        names = getattr(pl_module, "class_names", ())
        if self._shown:
            signed_methods = self.explainer.signed_methods
            figure = _maps_figure(self._shown, names, self.grid_images, signed_methods, self.style)
            _log_figure(trainer, "attribution/maps", figure)
        if self._curves:
            insertion, deletion = (
                {method: each.mean() for method, each in self._curves[kind].items()}
                for kind in ("insertion", "deletion")
            )
            figure = curves_figure(insertion, deletion, self.explainer.score, self.explainer.normalize)
            _log_figure(trainer, "attribution/curves", figure)


def _maps_figure(
    batches: list[ExplainedBatch], names: tuple[str, ...], images: int, signed_methods: tuple[str, ...], style: MapStyle
) -> Figure:
    """Draw images with their boxes and maps, the class explained and its probability above each."""
    targets = torch.cat([batch.target for batch in batches])[:images].tolist()
    boxes = [box for batch in batches if batch.boxes is not None for box in batch.boxes.tolist()][:images]
    return comparison_figure(
        images=[image for batch in batches for image in batch.images][:images],
        maps={
            method: [map_ for batch in batches for map_ in batch.maps[method]][:images] for method in batches[0].maps
        },
        names=[names[target] if target < len(names) else str(target) for target in targets],
        probabilities=torch.cat([batch.target_probability for batch in batches])[:images].tolist(),
        boxes=boxes or None,
        signed_methods=signed_methods,
        style=style,
    )


def _log_figure(trainer: L.Trainer, tag: str, figure: Figure) -> None:
    figure.set_dpi(110)  # readable at the size in which TensorBoard shows it
    picture = np.asarray(Image.open(io.BytesIO(figure_bytes(figure))).convert("RGB"))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, picture, trainer.global_step, dataformats="HWC")
        elif hasattr(logger, "log_image"):
            logger.log_image(tag, [picture], step=trainer.global_step)

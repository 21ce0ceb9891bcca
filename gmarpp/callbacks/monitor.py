"""Attribution maps and metrics at every validation."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from torch import nn
from torchmetrics import MetricCollection
from typing_extensions import override

from gmarpp.callbacks.monitor_log import MonitorLog
from gmarpp.callbacks.monitored_images import MonitoredImages, require_validation
from gmarpp.explained import ExplainedBatch
from gmarpp.explainer import Explainer
from gmarpp.figures import comparison_figure
from gmarpp.metrics import METRICS
from gmarpp.metrics.registry import metric_inputs
from gmarpp.network.architecture import Architecture
from gmarpp.network.errors import UnsupportedNetworkError
from gmarpp.options import Range, require_ranges
from gmarpp.run.curve_figure import curves_figure
from gmarpp.run.summary import CurveSum
from gmarpp.training.execution import require_whole_network
from gmarpp.training.lightning_private import state_key
from gmarpp.visualize import MapStyle, SignedMaps


class AttributionMonitor(L.Callback):
    """Explains a fixed set of validation images, the probe, and logs how faithful the explanations are.

    It watches any LightningModule that trains a Vision Transformer, and changes nothing of it. What cannot be explained
    is said before training, by the explanation of one image.

    At each validation it logs the scalars ``attribution/<method>/<metric>``, which checkpointing and early stopping can
    monitor, and the seconds it took as ``attribution/seconds``. Pictures are ``attribution_maps/<method>``, a grid of
    images with their maps, and ``attribution/curves``, the mean insertion and deletion curves; `MonitorLog` says how
    each logger takes them. TensorBoard's charts ``attribution_by_metric/<metric>`` compare the methods.

    The probe is the same at every validation and spread evenly over classes and ranks. Classes come from the data set's
    `labels` or `targets`, those of a `Subset` included; without them the probe is spread over the data set, and of
    streamed data it is the beginning of each rank's first batch. The network runs in a batch hook, so averaged weights,
    where there are some, are explained.

    Args:
        explainer: methods, target and metrics. By default an `Explainer`'s, with 14 steps.
        images: size of the probe over all ranks; 0 switches the monitor off, `fast_dev_run` explains one per rank.
        every_n_epochs: validate the explanations at every n-th validation only.
        grid_images: images in the grid.
        batch_size: images explained at a time.
        signed_maps: how maps with relevance against the class are drawn: ``diverging``, blue against and red for the
            class, or ``positive``, only what is for it.
        network: dotted name of the network in the LightningModule. By default it is what the module's `forward` makes
            of images, or its only module with parameters.
        architecture: of a network that is not found by itself: see `Explainer`.
        normalization: mean and standard deviation per channel, of values in [0, 1], with which the grid shows images
            as they were. By default they come from the data set's transform, or the network; without either, each image
            is stretched to [0, 1].
    """

    def __init__(
        self,
        explainer: Explainer | None = None,
        images: int = 64,
        every_n_epochs: int = 1,
        grid_images: int = 6,
        batch_size: int = 16,
        signed_maps: SignedMaps = "diverging",
        network: str | None = None,
        architecture: str | Architecture | Callable[[nn.Module], Architecture] | None = None,
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        require_ranges(
            {"images": images, "every_n_epochs": every_n_epochs, "grid_images": grid_images, "batch_size": batch_size},
            {"images": Range(0), "every_n_epochs": Range(1), "grid_images": Range(0), "batch_size": Range(1)},
            "AttributionMonitor.",
        )
        if normalization is not None and (len(normalization) != 2 or any(std <= 0 for std in normalization[1])):
            raise ValueError(
                "AttributionMonitor.normalization: expected mean and standard deviation, of one number per channel and "
                f"the latter above 0, got {normalization}"
            )
        self.explainer = explainer or Explainer(steps=14)
        if architecture is not None:
            self.explainer = replace(self.explainer, architecture=architecture)
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.grid_images = grid_images
        self.batch_size = batch_size
        self.style = MapStyle(signed_maps=signed_maps)
        self.network = network
        self.normalization = normalization
        self._probe: MonitoredImages | None = None
        self._metrics: dict[str, MetricCollection] = {}
        self._curves: dict[str, dict[str, CurveSum]] = {}
        self._shown: list[ExplainedBatch] = []
        self._log: MonitorLog | None = None
        self._seconds = 0.0
        self._validations = 0
        self._values: dict[str, float] = {}

    @property
    @override
    def state_key(self) -> str:
        return state_key(self, methods=self.explainer.names, metrics=self.explainer.metrics)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations, "values": self._values}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations, self._values = state_dict["validations"], state_dict.get("values", {})

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._probe = None
        if self.images:
            require_whole_network(trainer.strategy)
        if 0 < self.images < trainer.world_size:
            raise ValueError(
                f"the monitor's probe of {self.images} images is less than the {trainer.world_size} processes: raise "
                "its option images, or set it to 0 to switch the monitor off"
            )
        self._log = MonitorLog(trainer) if self.images and not trainer.fast_dev_run else None  # type: ignore[attr-defined]

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._probe = None
        if self._log is not None:
            self._log.close()
            self._log = None

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.images:
            require_validation(trainer)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning has validated already, unless it was told not to; a dry run is a check itself.
        unchecked = self._probe is None and trainer.val_dataloaders is not None
        if self.images and unchecked and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._check(trainer, pl_module)
            # Hooks of the module may augment what is read now, because the trainer is in training.
            self._probe = None

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
        if batch_idx or dataloader_idx or not self.images:
            return
        if trainer.sanity_checking:
            self._check(trainer, pl_module, batch)
        elif self._is_due(trainer):
            started = time.perf_counter()
            self._explain(trainer, pl_module, batch)
            self._seconds = time.perf_counter() - started

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_due(trainer):
            self._require_images(trainer)
            values = {method: _numbers(collection.compute()) for method, collection in self._metrics.items()}
            self._values = {
                f"attribution/{method}/{name}": value
                for method, metrics in values.items()
                for name, value in metrics.items()
            }
            for name, value in self._values.items():
                # The same on all ranks already: sync_dist only tells Lightning so.
                pl_module.log(name, value, sync_dist=True)
            pl_module.log("attribution/seconds", self._seconds, sync_dist=True, reduce_fx="max")
            self._sum_curves(trainer, pl_module.device)
            if trainer.is_global_zero and self._log is not None:
                self._log.compare(values)
                self._draw(self._log)
        elif not trainer.sanity_checking:
            # What stops a run or chooses its best checkpoint looks for them at every validation, also after a resume.
            for name, value in self._values.items():
                trainer.callback_metrics.setdefault(name, torch.tensor(value))
        self._validations += not trainer.sanity_checking

    def _is_due(self, trainer: L.Trainer) -> bool:
        return self.images > 0 and not trainer.sanity_checking and self._validations % self.every_n_epochs == 0

    def _watched(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> MonitoredImages:
        """Return network and images, which are found at the first time."""
        if self._probe is None:
            images = trainer.world_size if trainer.fast_dev_run else self.images  # type: ignore[attr-defined]
            self._probe = MonitoredImages.of(
                trainer, pl_module, batch, images, self.batch_size, self.network, self.normalization
            )
        return self._probe

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any = None) -> None:
        """Explain one image, so that what cannot be explained is said before training."""
        with _undisturbed(trainer, pl_module):
            watched = self._watched(trainer, pl_module, batch)
            for image in watched.first(pl_module.device):
                try:
                    explained = replace(self.explainer, steps=1)(watched.network, image)
                except UnsupportedNetworkError as error:
                    raise UnsupportedNetworkError(
                        f"{error}. The monitor explains {type(watched.network).__name__}: name another module of "
                        f"{type(pl_module).__name__} by AttributionMonitor(network=...), or switch the monitor off by "
                        "images=0"
                    ) from error
                if explained is not None:
                    self._require_inputs(explained)

    def _explain(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Explain and measure this rank's share of the probe."""
        with _undisturbed(trainer, pl_module):
            watched = self._watched(trainer, pl_module, batch)
            for probe in watched.on(pl_module.device):
                explained = self.explainer(watched.network, probe)
                if explained is None:
                    continue
                self._accumulate(explained, pl_module.device)
                if trainer.is_global_zero and sum(len(each.path) for each in self._shown) < self.grid_images:
                    self._shown.append(replace(explained, images=watched.pictures(probe, explained)))

    def _require_images(self, trainer: L.Trainer) -> None:
        # A rank without images would leave the others waiting for its sums.
        has_images = self._probe is not None and len(self._probe.batches) > 0
        if not trainer.strategy.reduce_boolean_decision(has_images, all=True):
            raise ValueError(
                f"the monitor has no images on some of the {trainer.world_size} processes: validate on at least as "
                "many images as there are processes, or set the monitor's option images to 0"
            )

    def _require_inputs(self, explained: ExplainedBatch) -> None:
        known = {name for inputs in explained.inputs.values() for name in inputs}
        unknown = [name for name in self.explainer.metrics if not set(metric_inputs(name)) <= known]
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)} cannot be monitored: the data has neither boxes nor masks; take them out of "
                "the monitor's metrics"
            )

    def _accumulate(self, explained: ExplainedBatch, device: torch.device) -> None:
        self._require_inputs(explained)
        for method, inputs in explained.inputs.items():
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

    def _draw(self, log: MonitorLog) -> None:
        if self._shown and self._probe:
            names = self._probe.class_names
            for method in self.explainer.names:
                signed_methods = self.explainer.signed_methods
                figure = _maps_figure(self._shown, method, names, self.grid_images, signed_methods, self.style)
                log.add_figure(f"attribution_maps/{method}", figure)
        if self._curves:
            insertion, deletion = (
                {method: each.mean() for method, each in self._curves[kind].items()}
                for kind in ("insertion", "deletion")
            )
            assert self._probe is not None
            explainer = self.explainer.for_network(self._probe.network)
            score, normalize = explainer.score or "probability", explainer.normalize
            log.add_figure("attribution/curves", curves_figure(insertion, deletion, score, normalize))


@contextmanager
def _undisturbed(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Run a module in the trainer's precision so that neither its random numbers nor what it logs know of it."""
    own = vars(pl_module).get("log")
    pl_module.log = lambda *values, **options: None  # type: ignore[method-assign]
    try:
        with isolate_rng(), trainer.precision_plugin.forward_context():
            yield
    finally:
        del pl_module.log
        if own is not None:
            pl_module.log = own  # type: ignore[method-assign]


def _maps_figure(
    batches: list[ExplainedBatch],
    method: str,
    names: tuple[str, ...],
    images: int,
    signed_methods: tuple[str, ...],
    style: MapStyle,
) -> Figure:
    """Draw images with their boxes and the maps of a method, the class explained and its probability above each."""
    targets = torch.cat([batch.target for batch in batches])[:images].tolist()
    boxes = [box for batch in batches if batch.boxes is not None for box in batch.boxes.tolist()][:images]
    return comparison_figure(
        images=[image for batch in batches for image in batch.images][:images],
        maps={method: [map_ for batch in batches for map_ in batch.maps[method]][:images]},
        names=[
            names[target] if 0 <= target < len(names) else str(target) if target >= 0 else "score" for target in targets
        ],
        probabilities=torch.cat([batch.target_probability for batch in batches])[:images].tolist(),
        boxes=boxes or None,
        signed_methods=signed_methods,
        style=style,
    )


def _numbers(metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}

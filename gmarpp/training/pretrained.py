"""The Lightning module of a network that was trained elsewhere: it is evaluated and explained as it is."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from torch import Tensor, nn
from torchmetrics import MeanMetric

from gmarpp.network.output import class_names, logits_of
from gmarpp.network.preprocessing import Preprocessing, give_preprocessing, tells_preprocessing
from gmarpp.network.task import task_of
from gmarpp.training.classes import ClassList
from gmarpp.training.evaluation import counted_images
from gmarpp.training.execution import require_whole_network
from gmarpp.training.task import known_task

# Of the names of what is measured, by Lightning's stage.
PREFIXES = {"validate": "val/", "test": "test/"}


class PretrainedClassifier(L.LightningModule):
    """Evaluates and explains a network of any kind.

    Where the network does not tell how its images are prepared, the data module says so.

    Args:
        network: from images (B, C, H, W) to logits (B, classes), or to an object with the attribute `logits`.
        path: where its weights come from, for the records.
        sha256: digest of its weights, likewise.
    """

    def __init__(self, network: nn.Module, path: str | None = None, sha256: str | None = None) -> None:
        super().__init__()
        self.model = network.eval()
        self.task = known_task(task_of(network))
        self.explainer: Callable[[nn.Module, Mapping[str, Any]], Any] | None = None
        self.checkpoint_path, self.checkpoint_sha256 = path, sha256

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images have to be prepared for the network; `None` where it does not say."""
        return Preprocessing.of(self.model) if tells_preprocessing(self.model) else None

    @property
    def classes(self) -> tuple[str, ...]:
        """Identifiers of the classes in the order of the outputs; empty where the network knows none."""
        return ClassList.of(self.model).classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes for people, in the same order."""
        return class_names(self.model)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of normalized images (B, C, H, W)."""
        return logits_of(self.model(images))

    def setup(self, stage: str) -> None:
        """Have the network tell how the data module prepares images, and compare their classes.

        Raises:
            ValueError: the data has other classes than the network, or the strategy shares the network out.
        """
        require_whole_network(self.trainer.strategy)
        data = getattr(self.trainer, "datamodule", None)
        prepared = getattr(data, "preprocessing", None)
        if isinstance(prepared, Preprocessing):
            give_preprocessing(self.model, prepared)
        known, found = ClassList.of(self.model), ClassList.of(data)
        if known and found:
            found.require_same(known, "of the network", type(data).__name__)
        elif found:
            found.give_to(self.model)
        if stage in PREFIXES:
            self.configure_metrics(PREFIXES[stage])

    def configure_metrics(self, prefix: str) -> None:
        """Set up the metrics of an evaluation.

        Raises:
            ValueError: the classes are not known.
        """
        if not self.classes:
            raise ValueError(
                f"neither {type(self.model).__name__} nor the data names any classes, so there is nothing to measure: "
                "give labeled images, with --data ImageFolder by --data.labelled true"
            )
        self.loss = MeanMetric()
        self.metrics = self.task.collection(len(self.classes), prefix)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return what the explainer says of the batch; logits (B, classes) when there is none."""
        return self(batch["image"]) if self.explainer is None else self.explainer(self.model, batch)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update val/loss and the task's metrics, such as val/accuracy."""
        self._evaluate(
            batch, counted_images(batch, batch_idx, self.trainer.val_dataloaders, dataloader_idx), "val/loss"
        )

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the same metrics under test/."""
        self._evaluate(
            batch, counted_images(batch, batch_idx, self.trainer.test_dataloaders, dataloader_idx), "test/loss"
        )

    def _evaluate(self, batch: Mapping[str, Any], counted: Tensor, loss_name: str) -> None:
        logits = self(batch["image"]).float()
        if logits.shape[1] != len(self.classes):
            raise ValueError(
                f"{type(self.model).__name__} has {logits.shape[1]} outputs, and there are {len(self.classes)} "
                "classes: use data with the classes that the network was trained on"
            )
        labels = self.task.labels(batch["label"], logits.shape[1])
        if counted.any():
            logits, labels = logits[counted], labels[counted]
            self.loss.update(self.task.losses(logits, labels))
            self.metrics.update(self.task.predictions(logits), labels)
        self.log(loss_name, self.loss, prog_bar=True)
        self.log_dict(self.metrics, prog_bar=True)

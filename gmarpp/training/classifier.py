"""What the Lightning modules of networks share: steps that evaluate and explain."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning as L
from torch import Tensor, nn
from torchmetrics import MeanMetric

from gmarpp.training.classes import ClassList
from gmarpp.training.evaluation import counted_images
from gmarpp.training.task import Task


class Classifier(L.LightningModule):
    """Evaluates a network, and explains it by what it is given to explain with.

    A subclass calls `configure_metrics` before its first evaluation.

    Attributes:
        model: the network.
        task: what it was or is trained for.
        explainer: from the network and a batch to what `predict_step` returns; `None` for logits.
        checkpoint_path: where the network's weights come from, for the records.
        checkpoint_sha256: digest of its weights, likewise.
    """

    model: nn.Module
    task: Task

    def __init__(self, checkpoint_path: str | None = None, checkpoint_sha256: str | None = None) -> None:
        super().__init__()
        self.explainer: Callable[[nn.Module, Mapping[str, Any]], Any] | None = None
        self.checkpoint_path, self.checkpoint_sha256 = checkpoint_path, checkpoint_sha256

    def configure_metrics(self, outputs: int) -> None:
        """Set up the metrics of validation and test, of a network with that many outputs."""
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_metrics = self.task.collection(outputs, "val/")
        self.test_metrics = self.val_metrics.clone(prefix="test/")

    @property
    def classes(self) -> tuple[str, ...]:
        """Identifiers of the classes in the order of the outputs; empty where they are not known (yet)."""
        return ClassList.of(self.model).classes

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update val/loss and the task's metrics, such as val/accuracy."""
        self._evaluate(batch, counted_images(batch, batch_idx, self.trainer.val_dataloaders, dataloader_idx), "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the same metrics under test/."""
        self._evaluate(batch, counted_images(batch, batch_idx, self.trainer.test_dataloaders, dataloader_idx), "test")

    def predict_step(self, batch: Mapping[str, Any] | None, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return what the explainer says of the batch; logits (B, classes) when there is none."""
        if batch is None:  # none of its images can be read
            return None
        return self(batch["image"]) if self.explainer is None else self.explainer(self.model, batch)

    def _evaluate(self, batch: Mapping[str, Any], counted: Tensor, prefix: Literal["val", "test"]) -> None:
        logits = self(batch["image"]).float()
        if self.classes and logits.shape[1] != len(self.classes):
            raise ValueError(
                f"{type(self.model).__name__} has {logits.shape[1]} outputs, and there are {len(self.classes)} "
                "classes: use data with the classes that the network was trained on"
            )
        loss, metrics = getattr(self, f"{prefix}_loss"), getattr(self, f"{prefix}_metrics")
        labels = self.task.labels(batch["label"], logits.shape[1])
        if counted.any():
            logits, labels = logits[counted], labels[counted]
            loss.update(self.task.losses(logits, labels))
            metrics.update(self.task.predictions(logits), labels)
        self.log(f"{prefix}/loss", loss, prog_bar=True)
        self.log_dict(metrics, prog_bar=True)

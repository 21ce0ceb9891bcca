"""What a network learns from labels: the loss, the metrics and the balance of each task."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanAbsoluteError, Metric, MetricCollection, R2Score
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)

from gmarpp.options import Range

UNKNOWN = -1


class Task(ABC):
    """Loss and metrics of logits (B, C) and labels, in float32.

    Attributes:
        outputs: the number of a network's outputs that it can have.
        default_outputs: that number where nothing is said; None where it has to be.
        monitored: the metric by which a run's best checkpoint is chosen, and whether `max` or `min` of it is best.
        has_classes: whether labels can be smoothed, and classes weighted.
        mixes: whether images of several labels can be mixed, by mixup and CutMix.
    """

    outputs: ClassVar[Range] = Range(1)
    default_outputs: ClassVar[int | None] = 1
    monitored: ClassVar[tuple[str, str]]
    has_classes: ClassVar[bool] = True
    mixes: ClassVar[bool] = False

    @abstractmethod
    def labels(self, labels: Tensor, outputs: int) -> Tensor:
        """Return a batch's labels in the form that the other methods take.

        Raises:
            ValueError: they are another task's.
        """

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
        """Return the training loss, a scalar.

        Args:
            logits: (B, C).
            labels: from `labels`.
            smoothing: of the labels, in [0, 1).
            weights: (C,), of classes, or of a label's positives.
        """

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the plain loss of each image, (B,)."""

    @abstractmethod
    def metrics(self, outputs: int) -> dict[str, Metric | MetricCollection]:
        """Return new metrics by name, updated with `predictions` and labels."""

    @abstractmethod
    def predictions(self, logits: Tensor) -> Tensor:
        """Return what the metrics take."""

    def balance(self, labels: Tensor, outputs: int) -> Tensor:
        """Return weights (C,) that make up for rare classes or labels in training labels (n,) or (n, C).

        Raises:
            ValueError: a class or label has no image, or all.
        """
        raise NotImplementedError

    def collection(self, outputs: int, prefix: str) -> MetricCollection:
        """Return new metrics named `<prefix><name>`."""
        return MetricCollection(self.metrics(outputs), prefix=prefix)


class Multiclass(Task):
    """One class per image: cross entropy; labels (B,) long, -1 where unknown."""

    outputs = Range(2)
    default_outputs = 200
    monitored = ("val/accuracy", "max")
    mixes = True

    def labels(self, labels: Tensor, outputs: int) -> Tensor:
        """Return labels (B,)."""
        if labels.dim() != 1 or labels.is_floating_point():
            raise _other_labels("multiclass", "one class per image, integers (B,)", labels)
        return labels

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
        """Return the cross entropy with labels (B,), or with mixed ones (B, C)."""
        return F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of each image."""
        return F.cross_entropy(logits, labels, reduction="none")

    def metrics(self, outputs: int) -> dict[str, Metric | MetricCollection]:
        """Return accuracy, top-5 accuracy and calibration error."""
        return {
            "accuracy": MulticlassAccuracy(outputs, average="micro"),
            "accuracy_top5": MulticlassAccuracy(outputs, top_k=min(5, outputs), average="micro"),
            "calibration_error": MulticlassCalibrationError(outputs),
        }

    def predictions(self, logits: Tensor) -> Tensor:
        """Return logits."""
        return logits

    def balance(self, labels: Tensor, outputs: int) -> Tensor:
        """Return images / (classes · images of the class), whose mean over the images is 1."""
        counts = labels.bincount(minlength=outputs)
        _require_examples(counts, "no training image")
        return len(labels) / (outputs * counts.float())


class Multilabel(Task):
    """Labels that do not exclude each other: binary cross entropy, each label by itself.

    Labels (B, C) are 1, 0, or -1 where unknown, which counts neither in the loss nor in a metric.
    """

    default_outputs: ClassVar[int | None] = None
    monitored = ("val/average_precision", "max")

    def labels(self, labels: Tensor, outputs: int) -> Tensor:
        """Return labels (B, C); one label's may have shape (B,)."""
        shaped = labels[:, None] if labels.dim() == 1 and outputs == 1 else labels
        if shaped.dim() != 2 or shaped.shape[1] != outputs or shaped.is_floating_point():
            raise _other_labels(
                "multilabel", f"1, 0 or -1 for each of {outputs} labels, integers (B, {outputs})", labels
            )
        if shaped.numel() and (shaped.amin() < UNKNOWN or shaped.amax() > 1):
            raise ValueError(f"labels: expected 1, 0 or -1 (unknown), got {int(shaped.amin())} to {int(shaped.amax())}")
        return shaped

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
        """Return the mean over all known labels; smoothing draws 0 and 1 toward one half, weights are of positives."""
        known = labels != UNKNOWN
        return (self._terms(logits, labels, smoothing, weights) * known).sum() / known.sum().clamp(min=1)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over each image's known labels."""
        known = labels != UNKNOWN
        return (self._terms(logits, labels) * known).sum(1) / known.sum(1)

    @staticmethod
    def _terms(logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
        targets = labels.clamp(min=0).float() * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")

    def metrics(self, outputs: int) -> dict[str, Metric | MetricCollection]:
        """Return mean average precision (mAP) and F1 at a probability of one half, both means over the labels."""
        return {
            "average_precision": MultilabelAveragePrecision(outputs, average="macro", ignore_index=UNKNOWN),
            "f1": MultilabelF1Score(outputs, average="macro", ignore_index=UNKNOWN),
        }

    def predictions(self, logits: Tensor) -> Tensor:
        """Return probabilities: torchmetrics would take a batch of logits that lie in [0, 1] for such."""
        return logits.sigmoid()

    def balance(self, labels: Tensor, outputs: int) -> Tensor:
        """Return negatives / positives of each label."""
        positives, negatives = (labels == 1).sum(0), (labels == 0).sum(0)
        _require_examples(positives, "no training image that has it")
        _require_examples(negatives, "no training image without it")
        return negatives / positives


class Binary(Multilabel):
    """One label, with one output: its classes are the label and its absence."""

    outputs = Range(1, 1)
    default_outputs = 1
    monitored = ("val/accuracy", "max")

    def metrics(self, outputs: int) -> dict[str, Metric | MetricCollection]:
        """Return accuracy and F1 at a probability of one half, average precision, and the area under the ROC curve."""
        return {
            "accuracy": BinaryAccuracy(ignore_index=UNKNOWN),
            "f1": BinaryF1Score(ignore_index=UNKNOWN),
            "average_precision": BinaryAveragePrecision(ignore_index=UNKNOWN),
            "auroc": BinaryAUROC(ignore_index=UNKNOWN),
        }


class Regression(Task):
    """Values: mean squared error; labels (B, C) float, NaN where unknown."""

    monitored = ("val/mae", "min")
    has_classes = False

    def labels(self, labels: Tensor, outputs: int) -> Tensor:
        """Return values (B, C); those of one output may have shape (B,)."""
        shaped = labels[:, None] if labels.dim() == 1 and outputs == 1 else labels
        if shaped.dim() != 2 or shaped.shape[1] != outputs or not shaped.is_floating_point():
            raise _other_labels("regression", f"{outputs} values per image, floating-point (B, {outputs})", labels)
        return shaped.float()

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
        """Return the mean squared error."""
        return F.mse_loss(logits, labels)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean squared error of each image."""
        return F.mse_loss(logits, labels, reduction="none").mean(1)

    def metrics(self, outputs: int) -> dict[str, Metric | MetricCollection]:
        """Return the mean absolute error and R², the mean over the outputs."""
        return {"mae": MeanAbsoluteError(), "r2": R2Score()}

    def predictions(self, logits: Tensor) -> Tensor:
        """Return values as they are."""
        return logits


TASKS: dict[str, Task] = {
    "multiclass": Multiclass(),
    "binary": Binary(),
    "multilabel": Multilabel(),
    "regression": Regression(),
}


def known_task(name: str) -> Task:
    """Return the task of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"--model.task: unknown task {name!r}: choose from {', '.join(TASKS)}")
    return TASKS[name]


def _other_labels(task: str, expected: str, labels: Tensor) -> ValueError:
    return ValueError(
        f"--model.task {task}: expected labels of {expected}, got {str(labels.dtype).removeprefix('torch.')} "
        f"{tuple(labels.shape)}: set --model.task to what the data's labels are"
    )


def _require_examples(counts: Tensor, missing: str) -> None:
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"--model.class_weights balanced: {missing} for the outputs {empty[:10]}: give weights, or none"
        )

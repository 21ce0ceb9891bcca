"""Metrics that callbacks wait for: known before training begins."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from gmarpp.callbacks.monitor import AttributionMonitor
from gmarpp.training.module import ViTClassifier


def require_monitored_metrics(trainer: L.Trainer, module: ViTClassifier) -> None:
    """Check what checkpoints and early stopping monitor, unless callbacks of one's own may log it.

    Raises:
        ValueError: a callback monitors a metric that the run does not log; naming those that it does.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(type(callback).__module__.partition(".")[0] not in ("gmarpp", "lightning") for callback in callbacks):
        return
    logged = ["train/loss", "train/lr", "val/loss", *module.val_metrics]
    for callback in callbacks:
        if isinstance(callback, AttributionMonitor) and callback.images:
            explainer = callback.explainer
            logged += [f"attribution/{method}/{metric}" for method in explainer.names for metric in explainer.metrics]
            logged.append("attribution/seconds")
    for callback in callbacks:
        known = [*logged, "epoch", "step"] if isinstance(callback, Checkpoint) else logged
        metric = getattr(callback, "monitor", None)
        if metric is not None and metric not in known:
            raise ValueError(
                f"{type(callback).__name__}: unknown metric {metric!r} to monitor: choose from {', '.join(known)}"
            )

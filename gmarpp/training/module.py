"""The Lightning module that fine-tunes a timm Vision Transformer and, given an explainer, explains it."""

import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from timm.data import Mixup
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError
from typing_extensions import Self, override

from gmarpp.files import first_line
from gmarpp.network.build import build_model
from gmarpp.network.formats import read_lightning_checkpoint, read_weights, weights_of_checkpoint
from gmarpp.network.load import complete, describe_weights, fill_model, load_pretrained, load_weights
from gmarpp.network.preprocessing import Preprocessing, get_image_size, get_preprocessing, set_preprocessing
from gmarpp.network.weights import Weights
from gmarpp.options import Range, require_ranges
from gmarpp.training.lightning_private import attached_trainer, restore_place_in_epoch
from gmarpp.training.optim import parameter_groups, warmup_cosine_schedule

DEFAULT_ARCHITECTURE = "vit_large_patch16_224.augreg_in21k_ft_in1k"

RANGES = {
    "num_classes": Range(2),
    "image_size": Range(1),
    "drop_path": Range(0, 1, high_open=True),
    "label_smoothing": Range(0, 1, high_open=True),
    "mixup": Range(0),
    "cutmix": Range(0),
    "lr": Range(0, low_open=True),
    "lr_batch_size": Range(1),
    "betas": Range(0, 1, high_open=True),
    "weight_decay": Range(0),
    "layer_decay": Range(0, 1, low_open=True),
    "warmup": Range(0, 1, high_open=True),
    "min_lr_ratio": Range(0, 1),
}


class ViTClassifier(L.LightningModule):
    """Fine-tunes any timm Vision Transformer as a classifier.

    Start weights are loaded when a run starts without a checkpoint. A trained network is built by `from_weights` or
    `load_from_checkpoint`, which need neither start weights nor the Hub. What decides how the network sees images
    (`image_size`, `preprocessing`, `model_args`) is resolved once and frozen into the checkpoint.

    Args:
        architecture: timm's name of the network; its pretrained tag also decides the preprocessing. The weights file's
            when not given, and without one vit_large_patch16_224.augreg_in21k_ft_in1k.
        num_classes: classes of the data, at least 2.
        image_size: side, or [height, width], of the input in pixels; the weights file's or the architecture's own when
            not given. The position embedding is resampled to it.
        pretrained: start from timm's weights on the Hugging Face Hub.
        weights: start from this local file instead (anything `gmarpp.load_model` reads). Its head is used only when it
            is for the same classes.
        model_args: further options of the timm model, such as {global_pool: avg}.
        preprocessing: overrides of mean, std, interpolation (bilinear, bicubic, ...) and crop_pct (0 to 1).
        drop_path: largest probability of stochastic depth, in [0, 1).
        label_smoothing: share of the target spread over all classes, in [0, 1).
        mixup: alpha of mixup's Beta distribution, 0 (none) or more (Zhang et al. 2018).
        cutmix: alpha of CutMix's Beta distribution, 0 (none) or more (Yun et al. 2019). With both, each batch draws
            one.
        head_only: train the classification head and freeze everything else.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        compile: compile the network with torch.compile for training.
        channels_last: keep images in channels-last memory order.
        lr: peak learning rate of the head, > 0.
        lr_batch_size: the effective batch size that `lr` is meant for, at least 1; the rate in use grows in proportion
            to the run's own (Goyal et al. 2017). When not given, `lr` is used as it is.
        betas: AdamW's moment decays, both in [0, 1).
        weight_decay: AdamW's decoupled weight decay, >= 0; biases, norms and embeddings are excluded.
        layer_decay: learning-rate factor per layer away from the head, in (0, 1].
        warmup: share of all steps in which the rate rises linearly, in [0, 1); a half cosine follows.
        min_lr_ratio: last learning rate as a share of the peak, in [0, 1].

    Raises:
        ValueError: an option is out of range, or the weights file is for another architecture.
        FileNotFoundError: there is no such weights file.
    """

    def __init__(
        self,
        architecture: str | None = None,
        num_classes: int = 200,
        image_size: int | list[int] | None = None,
        pretrained: bool = True,
        weights: str | None = None,
        model_args: dict[str, Any] | None = None,
        preprocessing: dict[str, Any] | None = None,
        drop_path: float = 0.0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        head_only: bool = False,
        gradient_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002 - the option's natural name
        channels_last: bool = False,
        lr: float = 2.5e-4,
        lr_batch_size: int | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        layer_decay: float = 0.75,
        warmup: float = 0.1,
        min_lr_ratio: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        require_ranges(self.hparams, RANGES, "--model.")
        _require(
            not isinstance(image_size, list) or len(image_size) == 2,
            f"--model.image_size: expected a side or [height, width], got {image_size}",
        )

        source = Weights({}) if weights is None else read_weights(weights)
        if architecture is None and weights is not None and source.architecture is None:
            raise ValueError(f"{weights} does not name its architecture: set --model.architecture to timm's name of it")
        architecture = architecture or source.architecture or DEFAULT_ARCHITECTURE
        if source.architecture is not None and source.architecture != architecture.partition(".")[0]:
            raise ValueError(
                f"{weights} holds a {source.architecture}, not a {architecture}: "
                f"set --model.architecture {source.architecture}"
            )
        size, arguments = (
            source.image_size if image_size is None else image_size,
            source.model_args | (model_args or {}),
        )
        try:
            self.model = build_model(architecture, num_classes, size, arguments, drop_path)
        except ValueError as error:
            raise ValueError(f"--model.architecture, --model.image_size or --model.model_args: {error}") from error
        try:
            set_preprocessing(self.model, {**source.preprocessing, **(preprocessing or {})})
        except ValueError as error:
            raise ValueError(f"--model.preprocessing {preprocessing}: {error}") from error
        self.hparams.update(
            architecture=architecture,
            image_size=list(get_image_size(self.model)),
            model_args=self._network.model_args,
            preprocessing=get_preprocessing(self.model),
        )

        if head_only:
            self.model.requires_grad_(False)
            head = self._network.get_classifier()
            for layer in head if isinstance(head, tuple) else (head,):
                layer.requires_grad_(True)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.mix = (
            Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes) if mixup or cutmix else None
        )

        self.classes: tuple[str, ...] = ()
        self.class_names: tuple[str, ...] = ()
        self.explainer: Callable[[nn.Module, Mapping[str, Any]], Any] | None = None
        self.checkpoint_path: str | None = None
        self.checkpoint_sha256: str | None = None
        self.stops_at_divergence = True
        self._weights_pending = pretrained or weights is not None
        self._seed = 0
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "accuracy_top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
                "calibration_error": MulticlassCalibrationError(num_classes),
            },
            prefix="val/",
        )
        self.test_metrics = self.val_metrics.clone(prefix="test/")

    @classmethod
    def from_weights(cls, weights: Weights, /, **options: Any) -> Self:
        """Build the module of a trained network: the only one that is built, of the only read of its file.

        Args:
            weights: complete ones, from `describe_weights`.
            **options: in place of those that the weights were trained with.

        Raises:
            ValueError: the description or an option is not accepted, or a weight does not fit; naming the file.
        """
        chosen = {**classifier_options(weights), **options}
        # What the training started from stays on record, and is not needed any more.
        start = {"pretrained": chosen.pop("pretrained", False), "weights": chosen.pop("weights", None)}
        try:
            module = cls(**chosen, pretrained=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{weights.origin} has options that this version of gmarpp does not know or accept: {first_line(error)}"
            ) from error
        module.hparams.update(start)
        fill_model(module.model, weights)
        module.classes, module.class_names = weights.classes, weights.class_names
        module.checkpoint_path, module.checkpoint_sha256 = weights.path, weights.sha256
        return module

    @property
    def preprocessing(self) -> Preprocessing:
        """How images have to be prepared for the network."""
        return Preprocessing.of(self.model)

    @property
    def _network(self) -> Any:
        return self.model

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of normalized images (B, 3, H, W)."""
        if self.hparams["channels_last"]:
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.model(images)
        return logits

    def setup(self, stage: str) -> None:
        """Take the classes from the data, or compare them with those the network was trained on.

        Raises:
            ValueError: the classes are others, or the strategy shares the network out among the devices.
        """
        if self.trainer.strategy.restore_checkpoint_after_setup:
            raise ValueError(
                f"{type(self.trainer.strategy).__name__} shares the network out among the devices, but layer-wise "
                "learning rates and explanations need them whole: set --trainer.strategy ddp; "
                "--model.gradient_checkpointing true saves memory"
            )
        data: Any = getattr(self.trainer, "datamodule", None)
        classes = tuple(getattr(data, "classes", ()))
        if classes and not self.classes:
            self.classes, self.class_names = classes, tuple(data.class_names)
        elif classes:
            self._require_classes(classes, self.classes, "the network was trained on")
        self._tell_model_its_classes()
        if stage == "fit":
            self._seed = torch.initial_seed()
            if self.hparams["gradient_checkpointing"]:
                self._network.set_grad_checkpointing(True)
            if self.hparams["compile"]:
                # in place: torch.compile(self.model) would put `_orig_mod.` in every key of the checkpoint
                self.model.compile()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with layer-wise rates, warm-up and cosine per step."""
        self._load_start_weights()
        # by itself Lightning would do so here only for runs that epochs limit, and the batch size is needed for all
        self.trainer.fit_loop.setup_data()
        total = self.trainer.estimated_stepping_batches
        # -1 where epochs are limited but the data has no length
        if math.isinf(total) or total <= 0:
            raise ValueError(
                "the schedule needs an end: set --trainer.max_epochs or --trainer.max_steps; streamed data has no "
                "length and needs --trainer.max_steps"
            )
        lr = self._scaled_lr()
        groups = parameter_groups(self.model, lr, self.hparams["weight_decay"], self.hparams["layer_decay"])
        optimizer = AdamW(groups, lr=lr, betas=tuple(self.hparams["betas"]))
        schedule = warmup_cosine_schedule(
            optimizer, int(total), int(total * self.hparams["warmup"]), self.hparams["min_lr_ratio"]
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Restore the place within the epoch that the checkpoint of a resumed run was saved at."""
        # Lightning does so when it sets up the data, which was before the checkpoint was read
        restore_place_in_epoch(self.trainer)

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Seed the random numbers of a step, such as dropout's and mixup's, by seed, rank, epoch and batch.

        A resumed run draws what an uninterrupted one would, whatever else draws from the global generators.
        """
        seed = hash((self._seed, self.global_rank, self.current_epoch, batch_idx)) & 0xFFFFFFFF
        random.seed(seed)
        np.random.seed(seed)
        # the generators' own method: torch.manual_seed formats the whole stack where an accelerator is not in use
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Cross entropy of one batch, mixed if so configured.

        Raises:
            FloatingPointError: the loss is not finite, unless `stops_at_divergence` is off.
            ValueError: mixup or cutmix got an odd number of images.
        """
        images, target = batch["image"], batch["label"]
        smoothing = self.hparams["label_smoothing"]
        if self.mix is not None:
            _require(
                len(images) % 2 == 0, f"mixup pairs images, and this batch has {len(images)}: set an even batch size"
            )
            images, target = self.mix(images, target)
            smoothing = 0.0
        loss = F.cross_entropy(self(images).float(), target, label_smoothing=smoothing)
        if self.stops_at_divergence:
            self._require_finite(loss.detach(), batch)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/lr", max(group["lr"] for group in self.trainer.optimizers[0].param_groups))
        return loss

    def on_validation_start(self) -> None:
        """Load the start weights if validation is the first thing that happens."""
        self._load_start_weights()

    def on_test_start(self) -> None:
        """Load the start weights if testing is the first thing that happens."""
        self._load_start_weights()

    def on_predict_start(self) -> None:
        """Load the start weights if prediction is the first thing that happens."""
        self._load_start_weights()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update val/loss, val/accuracy, val/accuracy_top5 and val/calibration_error."""
        counted = self.counted(batch, batch_idx, self.trainer.val_dataloaders, dataloader_idx)
        self._evaluate(batch, counted, self.val_loss, self.val_metrics, "val/loss")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the same metrics under test/."""
        counted = self.counted(batch, batch_idx, self.trainer.test_dataloaders, dataloader_idx)
        self._evaluate(batch, counted, self.test_loss, self.test_metrics, "test/loss")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return what the explainer says of the batch; logits (B, num_classes) when there is none."""
        return self(batch["image"]) if self.explainer is None else self.explainer(self.model, batch)

    @staticmethod
    def counted(batch: Mapping[str, Any], batch_idx: int, loaders: Any, dataloader_idx: int = 0) -> Tensor:
        """Which of a rank's evaluation images belong into a metric.

        An image without a label does not, nor does one with which a DistributedSampler filled up the last round so
        that every rank gets as many: another rank has it, too.

        Returns:
            (B,) bool, on the labels' device.
        """
        labels: Tensor = batch["label"]
        loader = loaders[dataloader_idx] if isinstance(loaders, (list, tuple)) else loaders
        sampler = loader.sampler if isinstance(loader, DataLoader) else None
        if not isinstance(sampler, DistributedSampler) or loader.batch_size is None:
            return labels >= 0
        first = batch_idx * loader.batch_size
        drawn = torch.arange(first, first + len(labels), device=labels.device) * sampler.num_replicas + sampler.rank
        images: Any = sampler.dataset
        return (labels >= 0) & (drawn < len(images))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the classes, so that outputs can name them without the data, and the seed of the steps."""
        checkpoint["classes"], checkpoint["class_names"] = list(self.classes), list(self.class_names)
        checkpoint["seed"] = self._seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take classes and seed from the checkpoint, or compare the data's classes with them."""
        classes = tuple(checkpoint.get("classes", ()))
        if self.classes and classes:
            self._require_classes(self.classes, classes, f"the checkpoint {self._ckpt_path() or ''} was trained on")
        if classes:
            self.classes, self.class_names = classes, tuple(checkpoint["class_names"])
        self._tell_model_its_classes()
        self._seed = checkpoint.get("seed", self._seed)
        self._weights_pending = False

    @classmethod
    @override
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **options: Any,
    ) -> Self:
        """Build the module from a `.ckpt` as Lightning does, but never runs code from the file.

        Args:
            checkpoint_path: a local file.
            map_location: device of the module; the CPU when not given.
            hparams_file: not supported, since it would replace what describes the network: give options instead.
            strict: require all weights to be there, and no others.
            weights_only: True or not given.
            **options: in place of those in the checkpoint.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, unsafe or does not fit, or an argument asks for more than is supported.
        """
        _require(weights_only is not False, "weights_only=False would run code from the checkpoint: leave it out")
        _require(hparams_file is None, "hparams_file is not supported: give the options that differ by name")
        content, digest = read_lightning_checkpoint(checkpoint_path)
        weights = complete(weights_of_checkpoint(content, digest, checkpoint_path))
        module = cls.from_weights(weights, **options)
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"], strict=module.strict_loading if strict is None else strict)
        return module.to(map_location or "cpu")

    def _ckpt_path(self) -> Any:
        return trainer.ckpt_path if (trainer := attached_trainer(self)) is not None else None

    def _tell_model_its_classes(self) -> None:
        self._network.classes, self._network.class_names = self.classes, self.class_names

    def _load_start_weights(self) -> None:
        """Load the start weights in the first hook of a stage after which a checkpoint would have been restored."""
        count = self.hparams["num_classes"]
        if self.classes and len(self.classes) != count:
            raise ValueError(
                f"the data has {len(self.classes)} classes and num_classes is {count}: "
                f"set --model.num_classes {len(self.classes)}"
            )
        if not self._weights_pending:
            return
        self._weights_pending = False
        path, architecture = self.hparams["weights"], self.hparams["architecture"]
        if path is None:
            has_head = load_pretrained(self.model, architecture)
        else:
            has_head = load_weights(self.model, read_weights(path), self.classes)
        if not has_head and not self.trainer.training:
            raise ValueError(
                f"{path or architecture} has no head for the data's {count} classes: nothing can be evaluated with it; "
                "give a trained network with --ckpt_path"
            )

    def _scaled_lr(self) -> float:
        """State the effective batch size, and scale the learning rate to it if so configured."""
        lr, reference = float(self.hparams["lr"]), self.hparams["lr_batch_size"]
        batch = getattr(self.trainer.train_dataloader, "batch_size", None)
        if batch is None:
            _require(reference is None, "lr_batch_size needs a data loader with a batch size; set --model.lr alone")
            rank_zero_info(f"Learning rate {lr:.3g}")
            return lr
        trainer = self.trainer
        per_node = trainer.world_size // trainer.num_nodes
        effective = batch * trainer.world_size * trainer.accumulate_grad_batches
        scaled = lr * effective / reference if reference else lr
        rank_zero_info(
            f"Effective batch size {effective} = {batch} x {per_node} devices x {trainer.num_nodes} nodes x "
            f"{trainer.accumulate_grad_batches} accumulated; learning rate {scaled:.3g}"
            + (f" = {lr:.3g} x {effective} / {reference}" if reference else "")
        )
        return scaled

    def _require_finite(self, loss: Tensor, batch: Mapping[str, Any]) -> None:
        """Stop all ranks together: one that stopped alone would leave the others waiting for its gradients."""
        finite = torch.isfinite(loss)
        ranks: Any = self.trainer.strategy.reduce(finite.float(), reduce_op="sum")
        if ranks == self.trainer.world_size:
            return
        files = "" if finite else ", ".join(map(str, batch.get("path", ["unknown"])))
        if self.trainer.world_size > 1:
            gathered = [""] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, files)
            files = ", ".join(filter(None, gathered))
        raise FloatingPointError(
            f"the loss is not finite at step {self.global_step}; the batch's files: {files}; look at them, "
            "lower --model.lr, raise --model.warmup, set --trainer.gradient_clip_val 1.0, or train with "
            "--trainer.precision bf16-mixed"
        )

    def _evaluate(
        self, batch: Mapping[str, Any], counted: Tensor, loss: MeanMetric, metrics: MetricCollection, loss_name: str
    ) -> None:
        logits, labels = self(batch["image"]).float(), batch["label"]
        if counted.any():
            logits, labels = logits[counted], labels[counted]
            loss.update(F.cross_entropy(logits, labels, reduction="none"))
            metrics.update(logits, labels)
        self.log(loss_name, loss, prog_bar=True)
        self.log_dict(metrics, prog_bar=True)

    def _require_classes(self, found: tuple[str, ...], expected: tuple[str, ...], owner: str) -> None:
        if found != expected:
            at = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
            index = min(len(found), len(expected)) if at is None else at
            data = type(getattr(self.trainer, "datamodule", None)).__name__
            raise ValueError(
                f"the classes of the data ({data}: {_summary(found)}) are not those {owner} ({_summary(expected)}); "
                f"they first differ at index {index}; use data with the same classes in the same order, or fine-tune "
                "for the new ones with --model.weights"
            )


def load_classifier(path: str | Path) -> ViTClassifier:
    """Build a `ViTClassifier` from any file that `gmarpp.load_model` reads; no network access.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of an unknown kind or architecture, or does not fit its architecture.
    """
    return ViTClassifier.from_weights(describe_weights(path)).eval()


def classifier_options(weights: Weights) -> dict[str, Any]:
    """Return the options of a `ViTClassifier` that weights fit; those of optimization only where the file has them."""
    return weights.training or {
        "architecture": weights.architecture,
        "num_classes": weights.num_classes,
        "image_size": None if weights.image_size is None else list(weights.image_size),
        "pretrained": False,
        "model_args": weights.model_args,
        "preprocessing": weights.preprocessing,
    }


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _summary(classes: tuple[str, ...]) -> str:
    return f"{len(classes)}: {', '.join(classes[:3])}{', …' if len(classes) > 3 else ''}"

"""The Lightning module that fine-tunes a timm Vision Transformer and, given an explainer, explains it."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from typing_extensions import Self, override

from gmarpp.files import first_line
from gmarpp.network.build import undrawn_weights
from gmarpp.network.files.formats import read_lightning_checkpoint, read_weights, weights_of_checkpoint
from gmarpp.network.files.load import complete, fill_model
from gmarpp.network.files.weights import Weights
from gmarpp.network.preprocessing import Preprocessing, get_image_size, get_preprocessing
from gmarpp.network.task import TaskName
from gmarpp.training.checkpoint_io import require_no_code
from gmarpp.training.class_weights import class_weights as weights_of
from gmarpp.training.classes import ClassList
from gmarpp.training.classifier import Classifier
from gmarpp.training.execution import Execution, require_whole_network
from gmarpp.training.hyperparameters import GROUPS, arguments, classifier_options, plain, resolve_options
from gmarpp.training.lightning_private import attached_trainer, restore_place_in_epoch
from gmarpp.training.mixing import Mixing
from gmarpp.training.optim import Optimization, adamw, parameter_groups, warmup_cosine_schedule
from gmarpp.training.run_size import scaled_lr, total_steps
from gmarpp.training.seeding import seed_step
from gmarpp.training.start import StartWeights, build_start, start_architecture, train_head_only
from gmarpp.training.step_loss import StepLoss
from gmarpp.training.task import known_task
from gmarpp.training.weights_alone import average_weights_alone, require_whole_run

DEFAULT_OPTIMIZER, DEFAULT_MIXING, DEFAULT_EXECUTION = Optimization(), Mixing(), Execution()


class ViTClassifier(Classifier):
    """Fine-tunes any timm Vision Transformer as a classifier, of one class or several labels, or for a regression.

    Start weights are loaded when a run starts without a checkpoint. A trained network is built by `from_weights` or
    `load_from_checkpoint`, which need neither start weights nor the Hub. What decides how the network sees images
    (`image_size`, `preprocessing`, `model_args`) is resolved once and frozen into the checkpoint.

    Args:
        architecture: timm's name of the network; its pretrained tag also decides the preprocessing. The weights file's
            when not given, and without one vit_large_patch16_224.augreg_in21k_ft_in1k.
        num_classes: outputs: classes (200 when not given), labels, values; a binary task has 1.
        image_size: side, or [height, width], of the input in pixels; the weights file's or the architecture's own when
            not given. The position embedding is resampled to it.
        pretrained: start from timm's weights on the Hugging Face Hub.
        weights: start from this local file instead (anything `gmarpp.load_model` reads). Its head is used only when it
            is for the same classes.
        model_args: further options of the timm model, such as {global_pool: avg}.
        preprocessing: overrides of mean, std, interpolation (bilinear, bicubic, ...) and crop_pct (0 to 1).
        drop_path: largest probability of stochastic depth, in [0, 1).
        head_only: train the classification head and freeze everything else.
        optimizer: learning rates, weight decay and schedule.
        mixing: mixup, CutMix and label smoothing.
        execution: how the network runs on this machine.
        task: `multiclass` (cross entropy), `binary` (one output), `multilabel` (binary cross entropy of each label) or
            `regression` (mean squared error).
        class_weights: of classes in the training loss, or of a label's positives; `balanced` counts training labels.

    Raises:
        ValueError: an option is out of range, or the weights file is for another architecture.
        FileNotFoundError: there is no such weights file.
    """

    def __init__(
        self,
        architecture: str | None = None,
        num_classes: int | None = None,
        image_size: int | list[int] | None = None,
        pretrained: bool = True,
        weights: str | None = None,
        model_args: dict[str, Any] | None = None,
        preprocessing: dict[str, Any] | None = None,
        drop_path: float = 0.0,
        head_only: bool = False,
        optimizer: Optimization = DEFAULT_OPTIMIZER,
        mixing: Mixing = DEFAULT_MIXING,
        execution: Execution = DEFAULT_EXECUTION,
        task: TaskName = "multiclass",
        class_weights: list[float] | Literal["balanced"] | None = None,
    ) -> None:
        super().__init__()
        # A checkpoint holds plain values alone: that is what can be read without running code.
        self.save_hyperparameters(ignore=list(GROUPS))
        self.save_hyperparameters(plain(optimizer=optimizer, mixing=mixing, execution=execution))
        self.task, self.mixing, self.execution = known_task(task), mixing, execution
        self.class_weights: Tensor | None = None
        self.stops_at_divergence = True
        self._step_loss: StepLoss | None = None
        self._seed = 0
        self.configure_network()
        self.mix = mixing.mixer(self.hparams["num_classes"])
        self.configure_metrics(self.hparams["num_classes"])

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
            with undrawn_weights():
                module = cls(**arguments(chosen), pretrained=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{weights.origin} has options that this version of gmarpp does not know or accept: {first_line(error)}"
            ) from error
        module.hparams.update(start)
        fill_model(module.model, weights)
        module.checkpoint_path, module.checkpoint_sha256 = weights.path, weights.sha256
        return module

    def configure_network(self) -> None:
        """Build the network with random weights, and record what was decided about it."""
        options = self.hparams
        resolve_options(options, self.task, self.mixing)
        path = options["weights"]
        source = Weights({}) if path is None else read_weights(path)
        architecture = start_architecture(options["architecture"], source)
        self.model = build_start(architecture, source, options)
        options.update(
            architecture=architecture,
            image_size=list(get_image_size(self.model)),
            model_args=self._network.model_args,
            preprocessing=get_preprocessing(self.model),
        )
        if options["head_only"]:
            train_head_only(self.model)
        if self.execution.channels_last:
            self.model.to(memory_format=torch.channels_last)
        begins = options["pretrained"] or path is not None
        self._start = StartWeights(architecture, source) if begins else None

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW with layer-wise rates, and a schedule of warm-up and cosine per step."""
        self._load_start_weights()
        options, steps = self.optimization, total_steps(self.trainer)
        lr = scaled_lr(self.trainer, options.lr, options.lr_batch_size)
        groups = parameter_groups(self.model, lr, options.weight_decay, options.layer_decay)
        optimizer = adamw(groups, options.betas)
        schedule = warmup_cosine_schedule(optimizer, steps, int(steps * options.warmup), options.min_lr_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def optimization(self) -> Optimization:
        """The optimizer's options, among them the rate that a search may have found."""
        options = self.hparams["optimizer"]
        return options if isinstance(options, Optimization) else Optimization(**options)

    @property
    def preprocessing(self) -> Preprocessing:
        """How images have to be prepared for the network."""
        return Preprocessing.of(self.model)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes for people, in the order of the outputs."""
        return ClassList.of(self.model).class_names

    @property
    def _network(self) -> Any:
        return self.model

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) of normalized images (B, 3, H, W)."""
        if self.execution.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.model(images)
        return logits

    def setup(self, stage: str) -> None:
        """Take the classes from the data, or compare them with those the network was trained on.

        Raises:
            ValueError: the data has other classes, or the strategy shares the network out among the devices.
        """
        require_whole_network(self.trainer.strategy)
        # A subclass that saves its own options has put objects in place of plain values.
        self.hparams.update(plain(optimizer=self.optimization, mixing=self.mixing, execution=self.execution))
        known, found = ClassList.of(self.model), ClassList.of(getattr(self.trainer, "datamodule", None))
        found = found.label if self.hparams["task"] == "binary" else found
        if known and found:
            found.require_same(known, "the network was trained on", self._data_name())
        elif found:
            found.give_to(self.model)
        if stage == "fit":
            self._seed = torch.initial_seed()
            self.execution.prepare(self.model)

    def on_train_start(self) -> None:
        """Restore the place in the epoch that a resumed run's checkpoint was saved at, and count the classes."""
        # Lightning does so when it sets up the data, which was before the checkpoint was read.
        restore_place_in_epoch(self.trainer)
        self.class_weights = weights_of(self.task, self.hparams, self.trainer.train_dataloader, self.device)

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Seed the random numbers of a step by seed, rank, epoch and batch.

        A resumed run draws what an uninterrupted one would, whatever else draws from the global generators.
        """
        seed_step((self._seed, self.global_rank, self.current_epoch, batch_idx), self.device)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the task's loss of one batch, mixed if so configured.

        Raises:
            ValueError: mixup or cutmix got an odd number of images, or the labels are another task's.
        """
        images, smoothing = batch["image"], self.mixing.label_smoothing
        target = self.task.labels(batch["label"], self.hparams["num_classes"])
        if self.mix is not None:
            (images, target), smoothing = self.mix(images, target), 0.0
        loss = self.task.loss(self(images).float(), target, smoothing, self.class_weights)
        self._step_loss = StepLoss(loss.detach(), batch, self.trainer)
        return loss

    def on_after_backward(self) -> None:
        """Log the step, or raise FloatingPointError where its loss is not finite and `stops_at_divergence` is on."""
        if self._step_loss is not None:
            self._step_loss.log(self, self.stops_at_divergence)
            self._step_loss = None

    def on_validation_start(self) -> None:
        """Load the start weights if evaluation is the first thing that happens."""
        self._load_start_weights()

    on_test_start = on_predict_start = on_validation_start

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the classes, so that outputs can name them without the data, and the seed of the steps."""
        checkpoint["classes"], checkpoint["class_names"] = list(self.classes), list(self.class_names)
        checkpoint["seed"] = self._seed
        average_weights_alone(checkpoint, attached_trainer(self), self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take classes and seed from the checkpoint, or compare the data's classes with them."""
        known, trained = ClassList.of(self.model), ClassList.of_checkpoint(checkpoint)
        trainer = attached_trainer(self)
        require_whole_run(checkpoint, trainer)
        if known and trained:
            path = "" if trainer is None else trainer.ckpt_path
            known.require_same(trained, f"the checkpoint {path or ''} was trained on", self._data_name())
        if trained:
            trained.give_to(self.model)
        self._seed = checkpoint.get("seed", self._seed)
        self._start = None

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
        require_no_code(weights_only)
        if hparams_file is not None:
            raise ValueError("hparams_file is not supported: give the options that differ by name")
        content, digest = read_lightning_checkpoint(checkpoint_path)
        module = cls.from_weights(complete(weights_of_checkpoint(content, digest, checkpoint_path)), **options)
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"], strict=module.strict_loading if strict is None else strict)
        return module.to(map_location or "cpu")

    def _data_name(self) -> str:
        return type(getattr(attached_trainer(self), "datamodule", None)).__name__

    def _load_start_weights(self) -> None:
        """Load the start weights in the first hook of a stage after which a checkpoint would have been restored."""
        classes = ClassList.of(self.model)
        classes.require_count(self.hparams["num_classes"])
        if self._start is not None:
            start, self._start = self._start, None
            start.load_into(self.model, classes.classes, needs_head=not self.trainer.training)

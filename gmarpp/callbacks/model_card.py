"""Model cards: what a checkpoint is, how it was made and how good it is, written beside it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import lightning as L
from huggingface_hub import EvalResult, ModelCardData
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from gmarpp.files import write_atomically
from gmarpp.labels import method_label, metric_label
from gmarpp.run.versions import versions
from gmarpp.training.finite_weights import require_finite_weights
from gmarpp.training.hyperparameters import GROUPS
from gmarpp.training.lightning_private import ObservedCheckpoint


class ModelCardCheckpoint(ObservedCheckpoint):
    """A ModelCheckpoint that writes a model card, `<checkpoint>.md`, beside each checkpoint and removes it with it.

    Args:
        model_card: write the cards. They need a folder: a checkpoint at an address (`s3://…`) gets none.
        **options: of Lightning's ModelCheckpoint.
    """

    def __init__(self, model_card: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.model_card = model_card

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score also where the run goes on in a new folder, as long as its checkpoint is there."""
        if Path(state_dict["best_model_path"]).is_file():
            state_dict = {**state_dict, "dirpath": self.dirpath}
        super().load_state_dict(state_dict)

    @override
    def before_save(self, trainer: L.Trainer) -> None:
        require_finite_weights(trainer.lightning_module, trainer.global_step)

    @override
    def on_file_saved(self, trainer: L.Trainer, filepath: str) -> None:
        # On all ranks, since a metric that was not asked for yet is summed over them.
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.model_card and trainer.is_global_zero and "://" not in filepath:
            text = describe_training(trainer, trainer.lightning_module, metrics, Path(filepath).name)
            write_atomically(_card(filepath), text.encode())

    @override
    def on_file_removed(self, trainer: L.Trainer, filepath: str) -> None:
        if self.model_card and trainer.is_global_zero and "://" not in filepath:
            _card(filepath).unlink(missing_ok=True)


def describe_training(trainer: Any, module: Any, metrics: Mapping[str, float], checkpoint: str) -> str:
    """Describe a network in training as a model card of the Hugging Face Hub.

    Args:
        trainer: Lightning's, in `fit`.
        module: a `ViTClassifier`.
        metrics: by the names they are logged under, `val/<metric>` and `attribution/<method>/<metric>`; the card
            leaves out all others.
        checkpoint: the file's name.

    Returns:
        Markdown with YAML front matter: data, metrics, attribution metrics, recipe and versions.
    """
    name, architecture, classes = Path(checkpoint).stem, module.hparams["architecture"], module.class_names
    data = "unnamed data" if trainer.datamodule is None else type(trainer.datamodule).__name__
    validation = {key.removeprefix("val/"): value for key, value in metrics.items() if key.startswith("val/")}
    sections = [
        f"---\n{_front_matter(name, data, module, validation).to_yaml()}\n---",
        f"# {name}: {architecture} on {data}",
        f"For {len(classes)} classes: {', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}. "
        "The checkpoint knows them and how images are prepared:",
        f'```python\nimport gmarpp\n\nmodel = gmarpp.load_model("{checkpoint}")\n```',
        "## Data",
        _table(
            ("split", "images"),
            [("training", _images(trainer.train_dataloader)), ("validation", _images(trainer.val_dataloaders))],
        ),
        "## Metrics",
        "Measured on the validation images during training; a checkpoint that was selected by them looks a little "
        "better there than it is.",
        _table(("metric", "value"), [(key, f"{value:.4g}") for key, value in validation.items()]),
        *_attribution(metrics),
        "## Recipe",
        _table(("option", "value"), _recipe(trainer, module).items()),
        *_configuration(trainer),
        "## Versions",
        _table(("package", "version"), versions().items()),
    ]
    return "\n\n".join(sections) + "\n"


def _from_hub(options: Mapping[str, Any]) -> bool:
    return bool(options["pretrained"] and not options["weights"])


def _front_matter(name: str, data: str, module: Any, validation: Mapping[str, float]) -> ModelCardData:
    results = [
        EvalResult("image-classification", data, f"{data}, validation in training", "accuracy", value)
        for key, value in validation.items()
        if key == "accuracy"
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "vision-transformer", "gmarpp"],
        base_model=module.model.pretrained_cfg.get("hf_hub_id") if _from_hub(module.hparams) else None,
        model_name=name,
        eval_results=results,
    )


def _recipe(trainer: Any, module: Any) -> dict[str, Any]:
    """Return what the network was trained from and how, by names for people; then its options."""
    options = module.hparams
    return {
        "start": (
            f"timm's {options['architecture']}"
            if _from_hub(options)
            else Path(options["weights"] or "random weights").name
        ),
        "steps": trainer.global_step,
        "processes": trainer.world_size,
        "images per process and batch": getattr(trainer.train_dataloader, "batch_size", "unknown"),
        "batches accumulated": trainer.accumulate_grad_batches,
        "precision": trainer.precision,
        **{
            key: value
            for key, value in _by_full_name(options)
            if key not in ("architecture", "weights", "pretrained") and not key.startswith("_")
        },
    }


def _attribution(metrics: Mapping[str, float]) -> list[str]:
    """Return a section with a row per method and a column per metric; none where nothing was explained."""
    values = {(parts[1], parts[2]): metrics[key] for key in metrics if len(parts := key.split("/")) == 3}
    methods, columns = dict.fromkeys(method for method, _ in values), dict.fromkeys(metric for _, metric in values)
    rows = [(method_label(method), *(f"{values[method, metric]:.4g}" for metric in columns)) for method in methods]
    head = ("method", *(metric_label(metric) for metric in columns))
    return ["## Explanations", "Measured on the monitor's images.", _table(head, rows)] if rows else []


def _configuration(trainer: Any) -> list[str]:
    """Return all options of the command line, where there was one."""
    return [
        f"All options:\n\n```yaml\n{callback.parser.dump(callback.config)}```"
        for callback in trainer.callbacks
        if isinstance(callback, SaveConfigCallback)
    ]


def _by_full_name(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield options with those of a group named as on the command line: `mixing.mixup`."""
    for key, value in options.items():
        if key in GROUPS:
            yield from ((f"{key}.{name}", each) for name, each in value.items())
        else:
            yield key, value


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def _images(loaders: Any) -> Any:
    dataset = getattr(loaders[0] if isinstance(loaders, list | tuple) else loaders, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else "unknown"


def _card(checkpoint: str) -> Path:
    return Path(checkpoint).with_suffix(".md")

"""What `AttributionMonitor` explains: the network of anyone's LightningModule, and images of its validation data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import Self

from gmarpp.data.batch_content import batch_content
from gmarpp.data.probe import choose_probe, first_source, is_indexed, normalization_in
from gmarpp.explained import ExplainedBatch
from gmarpp.network.extent import fit_to_extent
from gmarpp.network.output import class_names
from gmarpp.network.preprocessing import displayable, normalization_of
from gmarpp.training.lightning_private import batch_for_step
from gmarpp.training.trained_network import named_network, trained_network


def require_validation(trainer: L.Trainer) -> None:
    """Check that there are validation images to explain, unless validation is switched off by its limit.

    Raises:
        ValueError: `fit` got no validation data, or the LightningModule has no `validation_step`.
    """
    if trainer.limit_val_batches and not trainer.enable_validation:
        raise ValueError(
            "AttributionMonitor explains images of the validation, and this run has none: give "
            "trainer.fit(..., val_dataloaders=...) and the LightningModule a validation_step, or set the monitor's "
            "option images to 0"
        )


@dataclass(frozen=True)
class MonitoredImages:
    """A network, and a rank's share of the images that are explained at every validation.

    Attributes:
        network: from images to logits.
        batches: as `Explainer` takes them, on the CPU.
        class_names: of the network's or the data set's classes; may be empty.
        normalization: mean and standard deviation (C, 1, 1), if they are not the network's own.
    """

    network: nn.Module
    batches: Sequence[Mapping[str, Any]]
    class_names: tuple[str, ...] = ()
    normalization: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls,
        trainer: L.Trainer,
        module: L.LightningModule,
        batch: Any,
        images: int,
        batch_size: int,
        network: str | None,
        normalization: tuple[Sequence[float], Sequence[float]] | None,
    ) -> Self:
        """Choose and read images, and find the network.

        Args:
            trainer: with its validation data loaded.
            module: the trainer's.
            batch: the first of the validation, of which images of streamed data are taken.
            images: how many, over all ranks.
            batch_size: images explained at a time.
            network: dotted name in the module, if it is not to be searched.
            normalization: mean and standard deviation, if they are not to be searched.

        Raises:
            ValueError: the batches hold no images, or the module no network; with what to write.
        """
        loader = _first_loader(trainer.val_dataloaders)
        batches = list(_share(trainer, loader, batch, images, batch_size))
        source = first_source(getattr(loader, "dataset", None))
        if not batches:
            return cls(module if network is None else named_network(module, network), ())
        example = batches[0]["image"][:1]
        found = trained_network(module, example.to(module.device), network)
        channels = _per_channel(normalization or normalization_in(source), example)
        if channels is None and normalization_of(found, example) is None:
            rank_zero_warn(
                "AttributionMonitor does not know how the images were normalized, and shows each stretched to [0, 1]: "
                "AttributionMonitor(normalization=(mean, std)) shows them as they were"
            )
        return cls(found, batches, class_names(found) or tuple(getattr(source, "classes", ())), channels)

    def on(self, device: torch.device) -> Iterator[dict[str, Any]]:
        """Return the batches on a device."""
        for batch in self.batches:
            yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def first(self, device: torch.device) -> Iterator[dict[str, Any]]:
        """Return a batch of the first image alone on a device, if this rank has any."""
        for batch in self.on(device):
            yield {name: value[:1] for name, value in batch.items()}
            return

    def pictures(self, batch: Mapping[str, Any], explained: ExplainedBatch) -> Tensor:
        """Return the images of a batch as they are shown, on the CPU, float32 (B, 3, H, W) in [0, 1]."""
        if self.normalization is None:
            return explained.images
        height, width = explained.images.shape[2:]
        seen = fit_to_extent(batch["image"].cpu(), (height, width))
        return displayable(self.network, seen, self.normalization)


def _first_loader(loaders: Any) -> Any:
    while isinstance(loaders, list | tuple | Mapping):
        loaders = next(iter(loaders.values() if isinstance(loaders, Mapping) else loaders))
    return loaders


def _share(trainer: L.Trainer, loader: Any, batch: Any, images: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """Return a rank's share of the probe in batches."""
    if is_indexed(loader):
        dataset: Any = loader.dataset
        chosen = choose_probe(dataset, images)[trainer.global_rank :: trainer.world_size].tolist()
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            samples = loader.collate_fn([dataset[index] for index in part])
            yield _on_cpu(batch_content(batch_for_step(trainer, samples), part))
    elif batch is not None:
        content = _on_cpu(batch_content(batch))
        share = min(len(range(trainer.global_rank, images, trainer.world_size)), len(content["image"]))
        for start in range(0, share, batch_size):
            yield {name: value[start : min(start + batch_size, share)] for name, value in content.items()}


def _on_cpu(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in content.items()}


def _per_channel(
    normalization: tuple[Sequence[float], Sequence[float]] | None, images: Tensor
) -> tuple[Tensor, Tensor] | None:
    if normalization is None:
        return None
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in normalization)
    if {len(mean), len(std)} - {1, images.shape[1]}:
        raise ValueError(
            f"AttributionMonitor.normalization: expected mean and standard deviation of {images.shape[1]} channels, "
            f"got {len(mean)} and {len(std)} values"
        )
    return mean, std

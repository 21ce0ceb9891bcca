"""The predict loop's output, written batch by batch on any number of ranks, so that a run can be resumed."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import DataLoader, IterableDataset

from gmarpp.callbacks.progress import show_rate
from gmarpp.callbacks.rank_zero import on_rank_zero
from gmarpp.data.batches import pending_batches
from gmarpp.data.chosen_batches import chosen_batches
from gmarpp.data.dataset import Originals
from gmarpp.explained import ExplainedBatch
from gmarpp.figures import FIGURE_FORMATS
from gmarpp.files import expand_path, sync_disk
from gmarpp.metrics.registry import metric_inputs
from gmarpp.options import Range, require_ranges
from gmarpp.processes import usable_cores
from gmarpp.run.background import BackgroundTasks
from gmarpp.run.description import describe_run, now, require_same_run
from gmarpp.run.folder import IMAGES, MAPS, MAPS_INDEX, OVERLAYS, PARTS, write_run
from gmarpp.run.output_folder import OutputFolder
from gmarpp.run.pictures import Pictures
from gmarpp.run.reader import StoredRun
from gmarpp.run.results import write_results
from gmarpp.run.shards import Shard, merge_parts, publish, remove_parts, reopen_maps, shard_files
from gmarpp.run.stored_batch import bytes_per_image, stored_batch
from gmarpp.visualize import MapStyle, SignedMaps, pixels

logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 30.0
_QUEUED_BATCHES, _DRAWING_PROCESSES = 4, 8


class ExplanationWriter(BasePredictionWriter):
    """Writes what `ViTClassifier.predict_step` returns, and at the end tables, figures and a report.

    Nothing is written before the first batch is explained: a run that cannot start leaves no folder. From then on the
    folder is locked, and finished images are published every half minute in part files of their own; when all ranks are
    done, rank 0 merges them. A run that was interrupted, even by a kill, goes on with ``resume`` and ends with the same
    tables and maps as an uninterrupted one. All ranks must see the same folder. Pictures are drawn by other processes:
    as with a data loader's workers, a script needs ``if __name__ == "__main__"`` where processes are not forked.

    Args:
        output: folder of the results; created if missing. ``~`` and environment variables are expanded.
        overlays: write a picture per image and method: true, on the image as the network saw it; ``original``, on the
            whole picture in its own resolution, at the place where preprocessing took the image from; false, none.
        resume: continue the interrupted run in ``output``, or add images to a complete one. A limit of the trainer's
            batches counts from the beginning of the data, not from where the run is resumed.
        overwrite: replace the run in ``output``, once the new one can start.
        colormap: one of ``gmarpp.colormaps.COLORMAPS``.
        opacity: share of the map's colors in overlays, 0 to 1.
        signed_maps: how maps with relevance against the class are drawn: ``diverging``, blue against and red for the
            class, or ``positive``, only what is for it.
        figure_images: columns of the comparison figure; 0 for no figure.
        figure_formats: formats of the figures: ``png``, ``pdf``, ``svg``.
        report: write ``report.html``.
        shard_size: images per file of maps.

    Raises:
        ValueError: for an option out of range, or a path that names an unknown user or variable.
    """

    def __init__(
        self,
        output: str | Path,
        overlays: bool | Literal["original"] = True,
        resume: bool = False,
        overwrite: bool = False,
        colormap: str = "inferno",
        opacity: float = 0.5,
        signed_maps: SignedMaps = "diverging",
        figure_images: int = 8,
        figure_formats: Sequence[str] = ("png",),
        report: bool = True,
        shard_size: int = 1024,
    ) -> None:
        super().__init__("batch")
        for unknown in set(figure_formats) - set(FIGURE_FORMATS):
            raise ValueError(f"unknown figure format {unknown!r}: choose from {', '.join(FIGURE_FORMATS)}")
        require_ranges(
            {"figure_images": figure_images, "shard_size": shard_size},
            {"figure_images": Range(0), "shard_size": Range(1)},
            "write.",
        )
        self.output = OutputFolder(expand_path(output), resume, overwrite)
        self.folder = self.output.path
        self.overlays = overlays
        self.style = MapStyle(colormap, opacity, signed_maps)
        self.figure_images = figure_images
        self.figure_formats = tuple(figure_formats)
        self.report = report
        self.shard_size = shard_size
        self._run: dict[str, Any] = {}
        self._resumed = self._opened = False
        self._skipped = 0
        self._batches: list[list[int]] = []
        self._data = ExitStack()
        self._pictures: Pictures | None = None
        self._tasks: BackgroundTasks | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a folder that holds something else, and have the data module leave out finished images."""
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        self._run, self._batches = {}, []
        self._resumed = self._opened = False
        self._skipped = 0
        limit = trainer.limit_predict_batches
        if self.output.resume and isinstance(limit, float) and limit < 1:
            raise ValueError(
                "limit_predict_batches: expected a number of batches, or 1.0 for all, where a run is resumed, got "
                f"{limit}, a share of the batches that are left"
            )
        self.output.check()
        data: Any = getattr(trainer, "datamodule", None)
        if data is None:
            if self.output.resume:
                raise ValueError("resume needs a data module: give Trainer.predict(datamodule=…), not data loaders")
            return
        # The network's classes and weights are known only after setup, and the finished images only with them.
        self._data.enter_context(chosen_batches(data, partial(self._pending, trainer, pl_module)))

    def _pending(self, trainer: L.Trainer, module: L.LightningModule, loader: Any) -> list[list[int]]:
        """Return the batches that have images left to explain, of a loader of all."""
        if not isinstance(loader, DataLoader) or loader.batch_size is None:
            raise ValueError(
                f"{type(trainer.datamodule).__name__}.predict_dataloader: expected one DataLoader with a batch size, "  # type: ignore[attr-defined]
                f"got {loader!r}"
            )
        if isinstance(loader.dataset, IterableDataset):
            raise ValueError(
                "streamed images have no numbers by which a run could be divided and resumed: set --data.streaming "
                "false, and for a part of the data a slice such as --data.predict_split 'valid[:100]'"
            )
        images = len(loader.dataset)  # type: ignore[arg-type]
        finished = self._prepare(trainer, module, loader.dataset)
        if finished and max(finished) >= images:
            raise ValueError(
                f"the run in {self.folder} holds an image with index {max(finished)}, but the data has {images}: "
                "choose another output folder"
            )
        # A loader's own batch size may depend on the number of ranks; what is explained together must not.
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        batch_size: int = getattr(data, "predict_batch_size", getattr(data, "batch_size", loader.batch_size))
        # Lightning counts a rank's batches from where a run is resumed; the limit is meant from the data's beginning.
        if isinstance(trainer.limit_predict_batches, int):
            images = min(images, trainer.limit_predict_batches * batch_size * trainer.world_size)
        self._batches = pending_batches(images, batch_size, finished, trainer.world_size)
        if finished:
            done = sum(index < images for index in finished)
            logger.info("%d of %d images are already explained", done, images)
        return self._batches

    def _prepare(self, trainer: L.Trainer, module: Any, dataset: Any) -> set[int]:
        """Describe the run, make sure that it is the one to resume, and return the indices of its finished images."""
        options = {"overlays": self.overlays, **asdict(self.style)}
        self._run = describe_run(trainer, module, dataset, options)
        originals = Originals(dataset) if self.overlays == "original" else None
        self._pictures = Pictures(self.folder, self._run["signed_methods"], self.style, originals)
        on_rank_zero(trainer, self.output.lock)
        previous, finished = self.output.resumed()
        if previous is not None:
            require_same_run(previous, self._run, self.folder)
            self._run |= {"created": previous["created"], "status": previous["status"]}
            self._run["rows_per_image"] = previous.get("rows_per_image", 1)
            self._resumed = True
        return {index // self._run.get("rows_per_image", 1) for index in finished}

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make ready to draw pictures beside the network."""
        if not self._run:
            loaders: Any = trainer.predict_dataloaders
            self._prepare(trainer, pl_module, loaders.dataset)
        # On a CPU, the network's threads wait for the slowest of them: pictures are to take of all cores alike.
        processes = min(_DRAWING_PROCESSES, usable_cores(trainer.num_devices))
        self._tasks = BackgroundTasks(processes, _QUEUED_BATCHES * processes, self._pictures)
        self._buffer: list[Shard] = []
        self._done = 0
        self._started = self._flushed = time.monotonic()

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before the first batch, make sure that the metrics have the objects that they measure against."""
        if self._opened or not isinstance(batch, Mapping) or any(batch.get(key) is not None for key in ("box", "mask")):
            return
        explainer: Any = pl_module.explainer
        unusable = [metric for metric in explainer.metrics if "masks" in metric_inputs(metric)]
        if unusable:
            raise ValueError(
                f"explain.metrics: {', '.join(unusable)} compare maps with an object, and the data has neither boxes "
                "nor masks: give --data.masks, or leave these metrics out"
            )

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: ExplainedBatch | None,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Hand the batch's pictures to the processes that draw, and keep the rest for the next part."""
        if self._batches and batch_indices:
            expected = self._batches[batch_indices[0]]
            self._skipped += len(expected) - (0 if batch is None else len(batch["index"]))
            positions = [] if prediction is None else prediction.positions
            explained = set(positions)
            # Unreadable images are left out, and so are those without any of the labels to explain.
            if positions != [each for each in expected if each in explained]:
                raise ValueError(
                    f"index: expected the positions of the images in the data set, {expected}, got {positions}"
                )
        if prediction is None:
            return
        shard = stored_batch(prediction)
        if not self._opened:
            self._run["rows_per_image"] = prediction.rows_per_image
            on_rank_zero(trainer, lambda: self._begin(trainer, pl_module, shard, prediction))
            self._opened = True
        assert self._tasks is not None
        self._draw(self._tasks, [row["file"] for row in shard.rows], prediction)
        self._buffer.append(shard)
        self._done += len(shard.rows)
        waiting = sum(len(shard.rows) for shard in self._buffer)
        if waiting >= self.shard_size or time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush(trainer, self._tasks)
        show_rate(trainer, self._done * trainer.world_size / (time.monotonic() - self._started))

    def _begin(self, trainer: L.Trainer, module: Any, shard: Shard, explained: ExplainedBatch) -> None:
        """Estimate from the first image what room all of them take, and make the folder ready."""
        maps = {method: maps[0].numpy() for method, maps in explained.maps.items()} if self.overlays else {}
        image = pixels(explained.images[:1])[0]
        images = int(sum(trainer.num_predict_batches)) * trainer.world_size * len(shard.rows)
        assert self._pictures is not None
        self.output.require_space(images * bytes_per_image(shard, self._pictures, image, maps))
        overlays = [f"{OVERLAYS}/{method}" for method in ("", *module.explainer.names)] if self.overlays else []
        self.output.open(self._run, not self._resumed, [PARTS, MAPS, IMAGES, *overlays])

    def _draw(self, tasks: BackgroundTasks, files: list[str], explained: ExplainedBatch) -> None:
        """Have the processes that draw share a batch."""
        maps = {method: maps.numpy() for method, maps in explained.maps.items()} if self.overlays else {}
        indices = (explained.index // explained.rows_per_image).tolist()
        size = -(-len(files) // tasks.processes)
        for start in range(0, len(files), size):
            some = slice(start, start + size)
            some_maps = {method: attributions[some] for method, attributions in maps.items()}
            # A share at a time: the pixels of a whole large batch would pass through fresh memory.
            images = pixels(explained.images[some])
            tasks.submit(Pictures.write, files[some], indices[some], images, some_maps)

    def _flush(self, trainer: L.Trainer, tasks: BackgroundTasks) -> None:
        """Have all finished images published when their pictures are written."""
        if self._buffer:
            first = self._buffer[0].rows[0]["index"]
            part = self.folder / PARTS / f"{first:09d}-{trainer.global_rank}.safetensors"
            tasks.submit_last(publish, self._buffer, part)
        self._buffer = []
        self._flushed = time.monotonic()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Publish the rest and wait for all ranks."""
        assert self._tasks is not None
        self._flush(trainer, self._tasks)
        self._tasks.wait()
        self._close()
        if not self._opened:
            # The others were here with the first batch that they explained.
            on_rank_zero(trainer, self._require_explanations)
        skipped: Any = trainer.strategy.reduce(torch.tensor(self._skipped, device=pl_module.device), reduce_op="sum")
        self._skipped = int(skipped)

    def _require_explanations(self) -> None:
        if not self._resumed:
            raise ValueError(
                f"expected images to explain, got none: {self._skipped} cannot be read, and others have none of the "
                "labels asked for"
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Merge on rank 0; also where no image was left to explain, so that the predict loop had nothing to do."""
        self._data.close()
        try:
            if stage == "predict" and trainer.is_global_zero and (self._opened or self._resumed):
                if not self._opened:
                    self.output.open(self._run, new=False, subfolders=(PARTS, MAPS))
                self._finish()
        finally:
            self.output.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep what is finished, unless writing itself is what failed."""
        self._data.close()
        try:
            if self._tasks is not None and not self._tasks.failed:
                self._flush(trainer, self._tasks)
                self._tasks.wait()
        finally:
            self._close()
            self.output.release()
            if trainer.is_global_zero and (self._opened or self._resumed):
                logger.error("The run in %s is interrupted: continue it with --resume", self.folder)

    def _close(self) -> None:
        if self._tasks is not None:
            self._tasks.close()
            self._tasks = None

    def _finish(self) -> None:
        if self._run["status"] == "complete":
            if not shard_files(self.folder / PARTS) and (self.folder / MAPS / MAPS_INDEX).exists():
                remove_parts(self.folder)
                logger.info("The run in %s is complete: nothing was left to explain", self.folder)
                return
            reopen_maps(self.folder)
            self._run["status"] = "running"
            write_run(self.folder, self._run)
        images = merge_parts(self.folder, self.shard_size)
        explanations = StoredRun(self.folder, {**self._run, "status": "complete"})
        write_results(explanations, self.figure_images, self.figure_formats, self.style, self.report)
        # The parts may go only when the disk has all that replaces them.
        sync_disk()
        done = {"status": "complete", "finished": now(), "explained": images, "skipped": self._skipped}
        write_run(self.folder, {**self._run, **done})
        remove_parts(self.folder)
        skipped = f", skipped {self._skipped} that cannot be read" if self._skipped else ""
        place = self.folder / "report.html" if self.report else self.folder
        what = "images" if self._run["rows_per_image"] == 1 else "outputs of images"
        logger.info("Explained %d %s%s: %s", images, what, skipped, place)

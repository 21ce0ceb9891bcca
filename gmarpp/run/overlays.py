"""Overlays of a run that was made without them, or in other colors."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from gmarpp.files import expand_path, remove_leftovers, sync_disk, write_atomically
from gmarpp.maps import Array
from gmarpp.processes import usable_cores
from gmarpp.run.background import BackgroundTasks
from gmarpp.run.folder import IMAGES, OVERLAYS, make_folder, write_run
from gmarpp.run.lock import FolderLock
from gmarpp.run.reader import StoredRun, load_explanations, read_picture
from gmarpp.run.tables import write_csv
from gmarpp.visualize import OVERLAY_SIDE, Backdrop, MapStyle, SignedMaps, encode_png

logger = logging.getLogger(__name__)

_IMAGES_PER_TASK = 64
_QUEUED_TASKS = 4


def write_overlays(
    run: str, colormap: str = "inferno", opacity: float = 0.5, signed_maps: SignedMaps = "diverging"
) -> None:
    """Draw the overlays of a complete run of predict, one per image and method, in place of those that it has.

    They are laid on the images that the run stores, as JPEG, and so are a little less exact than those that predict
    draws itself.

    Args:
        run: the run's folder. ``~`` and environment variables are expanded.
        colormap: one of ``gmarpp.colormaps.COLORMAPS``.
        opacity: share of the map's colors, 0 to 1.
        signed_maps: how signed maps are drawn, ``diverging`` or ``positive``.

    Raises:
        ValueError: an option is out of range, the run is not complete, or a file of it is damaged; naming it.
        OSError: the folder holds no run, another process writes into it, or a file cannot be read or written.
    """
    style, folder = MapStyle(colormap, opacity, signed_maps), expand_path(run)
    load_explanations(folder)
    lock = FolderLock(folder)
    try:
        stored = load_explanations(folder)
        if stored.run["writer"]["overlays"] == "original":
            raise ValueError(
                f"the run in {folder} has overlays on whole pictures, which it does not store: run predict again, with "
                f"--write.overlays original --write.colormap {colormap} --overwrite"
            )
        for name in ("", *stored.methods):
            make_folder(folder / OVERLAYS / name)
        remove_leftovers(folder)
        _draw_all(stored, style)
        sync_disk()
        # The table names pictures where the description says that there are any.
        said = {**stored.run, "writer": {**stored.run["writer"], "overlays": True, **asdict(style)}}
        write_run(folder, said)
        drawn = load_explanations(folder)
        write_csv(folder / "explanations.csv", (record for shard in drawn.shards() for record in drawn.records(shard)))
    finally:
        lock.release()
    logger.info("Drew %d overlays: %s", len(stored) * len(stored.methods), folder / OVERLAYS)


def _draw_all(stored: StoredRun, style: MapStyle) -> None:
    processes = usable_cores(1)
    tasks = BackgroundTasks(processes, _QUEUED_TASKS * processes)
    try:
        for shard in stored.shards():
            files = [row["file"] for row in shard.rows]
            for start in range(0, len(files), _IMAGES_PER_TASK):
                some = slice(start, start + _IMAGES_PER_TASK)
                maps = {method: shard.tensors[method][some].numpy() for method in stored.methods}
                tasks.submit(_draw, stored.folder, files[some], maps, stored.signed_methods, style)
        tasks.wait()
    finally:
        tasks.close()


def _draw(
    folder: Path, files: Sequence[str], maps: Mapping[str, Array], signed_methods: Collection[str], style: MapStyle
) -> None:
    for position, file in enumerate(files):
        backdrop = Backdrop(read_picture(folder / IMAGES / f"{file}.jpg", folder), style, OVERLAY_SIDE)
        for method, attributions in maps.items():
            overlay = backdrop.overlay(attributions[position], method in signed_methods)
            write_atomically(folder / OVERLAYS / method / f"{file}.png", encode_png(overlay), durable=False)

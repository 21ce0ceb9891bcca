"""Tiny-ImageNet (Le & Yang 2015) in its official layout, with boxes."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from gmarpp.data.archive import download, extract, require_same_archive
from gmarpp.data.dataset import Files
from gmarpp.data.module import SEEDS, ImageDataModule, Split
from gmarpp.data.numbering import Labels
from gmarpp.data.walk import files_in, require_regular_file
from gmarpp.files import expand_path
from gmarpp.options import Range, require_ranges

logger = logging.getLogger(__name__)

FOLDER = "tiny-imagenet-200"
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
SPLITS = ("val", "train", "selection", "test")
SUFFIXES = (".jpeg",)
# The official files of names and boxes take less than 3 MiB.
MAX_TEXT_BYTES = 64 << 20


class TinyImageNet(ImageDataModule):
    """Tiny-ImageNet: 200 ImageNet classes, 64×64 pixels, 100,000 training and 10,000 validation images with boxes.

    The official test split has no labels, so `validate` and `test` report on the official validation split, and `fit`
    selects on a part of the training split: equally many images of every class, the same ones in every run.

    Args:
        root: the folder `tiny-imagenet-200`, a folder that holds it, or a zip file of it. A zip or folder with a part
            of the images is enough. Here and in `extract_to`, `~` and environment variables are expanded.
        download: download the official archive into `root` (248 MB) and verify it, if the data does not exist.
        extract_to: folder to extract a zip file into; the zip file's own by default.
        selection_fraction: part of the training images, per class, that `fit` validates on, in [0, 1). 0 trains on all
            of them and validates on the official validation split, which then serves selection and report.
        selection_seed: which images these are, 0 to 2**32 - 1.
        split: what `predict` explains: "val", "train", "selection", or the unlabeled "test".
        **options: of `ImageDataModule`.
    """

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        extract_to: str | None = None,
        selection_fraction: float = 0.05,
        selection_seed: int = 0,
        split: Literal["val", "train", "selection", "test"] = "val",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        require_ranges(
            {"selection_fraction": selection_fraction, "selection_seed": selection_seed},
            {"selection_fraction": Range(0, 1, high_open=True), "selection_seed": SEEDS},
            "data: ",
        )
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
        self.root = expand_path(root)
        self.download = download
        self.extract_to = None if extract_to is None else expand_path(extract_to)
        self.selection_fraction = selection_fraction
        self.selection_seed = selection_seed
        self.split = split

    def prepare_data(self) -> None:
        """Download and extract the data if needed.

        Raises:
            FileNotFoundError: the data does not exist, and `download` is off.
            OSError: the download failed, or the data cannot be written.
            ValueError: the archive is damaged, a path in it leads outside it, or the folder to extract it to comes
                from another archive.
        """
        if self._is_archive:
            if self.folder.is_dir():
                require_same_archive(self.root, self.folder)
            else:
                extract(self.root, self.folder, _locate)
            return
        try:
            self.folder  # noqa: B018
        except FileNotFoundError:
            if not self.download:
                raise
            archive = self.root / f"{FOLDER}.zip"
            download(URL, archive, MD5)
            extract(archive, self.root / FOLDER, _locate)

    @property
    def folder(self) -> Path:
        """Folder with `train`, `val` and `wnids.txt`.

        Raises:
            FileNotFoundError: there is no such folder.
        """
        if self._is_archive:
            return (self.extract_to or self.root.parent) / FOLDER
        return _locate(self.root)

    @property
    def _is_archive(self) -> bool:
        return self.root.suffix.lower() == ".zip" and not self.root.is_dir()

    def read_classes(self) -> tuple[Sequence[str], Sequence[str]]:
        """Return the sorted WordNet ids, and the first synonym of each."""
        classes = _classes(self.folder)
        words = dict(line.split("\t", 1) for _, line in _lines(self.folder / "words.txt") if "\t" in line)
        return classes, [words.get(wnid, wnid).split(",")[0] for wnid in classes]

    def read_split(self, split: Split) -> tuple[Files, Labels]:
        """See `ImageDataModule`; all splits but "test" have boxes."""
        classes = _classes(self.folder)
        name: str = {"predict": self.split, "test": "val"}.get(split, split)
        if name == "selection" and not self.selection_fraction:
            name = "val"
        if name == "test":
            table = _read_test(self.folder)
        elif name == "val":
            table = _read_val(self.folder, classes)
        else:
            table = _read_train(self.folder, classes)
            selected = self._selected(table.labels, classes)
            table = table.rows(selected if name == "selection" else ~selected)
        logger.info("%s: %d images for %s", self.folder, len(table.paths), name)
        return Files(self.folder, table.paths, table.boxes), table.labels

    def _selected(self, labels: Labels, classes: Sequence[str]) -> NDArray[np.bool_]:
        selected = np.zeros(len(labels), dtype=bool)
        for label, wnid in enumerate(classes):
            rows = np.flatnonzero(labels == label)
            count = min(len(rows) - 1, max(1, round(self.selection_fraction * len(rows))))
            if self.selection_fraction:
                # Each class has its own generator, so that the choice does not depend on the other classes.
                generator = np.random.default_rng([self.selection_seed, crc32(wnid.encode())])
                selected[generator.permutation(rows)[:count]] = True
        return selected


@dataclass(frozen=True)
class _Table:
    """Relative paths, labels (n,), and boxes (n, 4) as in the official files."""

    paths: list[str]
    labels: Labels
    boxes: NDArray[np.int16] | None

    def rows(self, mask: NDArray[np.bool_]) -> "_Table":
        assert self.boxes is not None
        paths = [path for path, kept in zip(self.paths, mask, strict=True) if kept]
        return _Table(paths, self.labels[mask], self.boxes[mask])


def _locate(root: Path) -> Path:
    for folder in (root, root / FOLDER):
        if (folder / "wnids.txt").is_file():
            return folder
    raise FileNotFoundError(
        f"{root.absolute()} neither is nor holds a folder {FOLDER} with wnids.txt: give root the folder or a zip file "
        "of Tiny-ImageNet, or set download to true"
    )


def _lines(file: Path) -> list[tuple[int, str]]:
    """Return number and text of each line that is not blank."""
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing")
    try:
        require_regular_file(file)
        size = file.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"expected at most {MAX_TEXT_BYTES >> 20} MiB, got {size >> 20} MiB")
        lines = file.read_text(encoding="utf-8").split("\n")
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]


def _classes(folder: Path) -> list[str]:
    file = folder / "wnids.txt"
    classes: set[str] = set()
    for number, line in _lines(file):
        wnid = line.strip()
        if wnid in classes or wnid in (".", "..") or not wnid.isprintable() or {"/", "\\"} & set(wnid):
            raise ValueError(f"{file}, line {number}: expected the name of a folder, each once, got {wnid!r}")
        classes.add(wnid)
    if not classes:
        raise ValueError(f"{file}: expected the names of classes, got none")
    return sorted(classes)


def _read_train(folder: Path, classes: Sequence[str]) -> _Table:
    paths: list[str] = []
    labels: list[int] = []
    boxes: list[list[int]] = []
    for label, wnid in enumerate(classes):
        if not (folder / "train" / wnid).is_dir():
            raise FileNotFoundError(f"class {wnid} of {folder / 'wnids.txt'} has no folder {folder / 'train' / wnid}")
        rows = _read_boxes(folder / "train" / wnid / f"{wnid}_boxes.txt", f"train/{wnid}/images", folder)
        if not rows:
            raise ValueError(f"{folder / 'train' / wnid} has no image")
        rows.sort()
        paths += [path for path, _, _ in rows]
        labels += [label] * len(rows)
        boxes += [box for _, _, box in rows]
    return _Table(paths, np.array(labels), np.array(boxes, dtype=np.int16))


def _read_val(folder: Path, classes: Sequence[str]) -> _Table:
    file = folder / "val" / "val_annotations.txt"
    labels = {wnid: label for label, wnid in enumerate(classes)}
    rows = _read_boxes(file, "val/images", folder, labels)
    boxes = np.array([box for _, _, box in rows], dtype=np.int16).reshape(-1, 4)
    return _Table([path for path, _, _ in rows], np.array([labels[wnid] for _, wnid, _ in rows], dtype=int), boxes)


def _read_test(folder: Path) -> _Table:
    if not (folder / "test" / "images").is_dir():
        raise FileNotFoundError(f"{folder / 'test' / 'images'} is missing")
    paths = [f"test/images/{name}" for name in files_in(folder / "test" / "images", SUFFIXES)]
    return _Table(paths, np.full(len(paths), -1), None)


def _read_boxes(
    file: Path, images: str, folder: Path, classes: Collection[str] | None = None
) -> list[tuple[str, str, list[int]]]:
    """Return rows of an annotation file: path, class id if classes are given (else a corner), corners."""
    fields = 1 if classes is None else 2
    present = set(files_in(folder / images, SUFFIXES))
    rows = []
    for number, line in _lines(file):
        name, *parts = line.split("\t")
        corners = [int(part) for part in parts[fields - 1 :] if part.isdecimal() and len(part) < 5]
        if len(parts) != fields + 3 or len(corners) != 4 or corners[0] > corners[2] or corners[1] > corners[3]:
            columns = "file, class, x0, y0, x1, y1" if fields == 2 else "file, x0, y0, x1, y1"
            raise ValueError(f"{file}, line {number}: expected {columns} between tabs, got {line[:200]!r}")
        if classes is not None and parts[0] not in classes:
            raise ValueError(
                f"{file}, line {number}: unknown class {parts[0]!r}: expected one of {folder / 'wnids.txt'}"
            )
        if name not in present:
            raise FileNotFoundError(f"{folder / images / name} is missing, or listed twice: {file}, line {number}")
        present.remove(name)
        rows.append((f"{images}/{name}", parts[0], corners))
    if present:
        raise ValueError(f"{folder / images / min(present)} is not listed in {file} ({len(present)} such images)")
    return rows

"""Images from any folder, with or without labels and masks."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gmarpp.data.dataset import Files
from gmarpp.data.module import ImageDataModule, Split
from gmarpp.data.names import readable_names
from gmarpp.data.numbering import Labels
from gmarpp.data.splits import find_split, held_out
from gmarpp.data.walk import SUFFIXES, files_below, require_regular_file
from gmarpp.files import expand_path
from gmarpp.options import Range, require_ranges


class ImageFolder(ImageDataModule):
    """Any images below a folder, in the order of their paths.

    Without labels, for `predict`: every image below `root`, or `root` itself if it is one. With labels: the name of
    the folder that directly holds an image is its class, in `root/train` and `root/val` (`root/test` where it exists),
    or `training`, `valid`, `validation`, `dev`; or in `root` itself, for all but `fit`, or with `val_share`. Links are
    followed; hidden files are left out, and so, with a warning, are folders that hold results of this project.
    Unreadable folders are errors, and so are unreadable files, unless `on_error` skips them.

    Args:
        root: the folder, or one image. Here and in `masks`, `~` and environment variables are expanded.
        labelled: whether parent folders are class ids.
        val_share: share of the training images held out for validation where no folder holds any: of every class alike,
            the same ones in every run; in (0, 1).
        masks: folder of segmentation masks. An image's mask has the same relative path, or else the same name, up to
            the suffix. Everything but black, or palette index 0, is object.
        **options: of `ImageDataModule`.
    """

    def __init__(
        self,
        root: str,
        labelled: bool = False,
        masks: str | None = None,
        val_share: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        ranges = {"val_share": Range(0, 1, low_open=True, high_open=True)}
        require_ranges({"val_share": val_share}, ranges, "data: ")
        self.root = expand_path(root)
        self.labelled = labelled
        self.val_share = val_share
        self.masks = None if masks is None else expand_path(masks)
        self._classes: list[str] = []
        # What the classes were read from, for the split of the same folder, which is read next.
        self._walked: tuple[Path, list[str]] | None = None

    def read_classes(self) -> tuple[Sequence[str], Sequence[str]]:
        """Return the sorted names of the class folders; none without labels."""
        if not self.labelled:
            return (), ()
        has_training = find_split("train", self._folders()) is not None
        folder = self._split_folder("train" if has_training else "val")
        self._walked = None
        paths = self._images(folder)
        self._walked = folder, paths
        bare = next((path for path in paths if not _parent(path)), None)
        if bare is not None:
            raise ValueError(
                f"{folder / bare}: expected images in folders named by class, got one outside: move or remove it"
            )
        self._classes = sorted(set(map(_parent, paths)))
        return self._classes, readable_names(self._classes)

    def read_split(self, split: Split) -> tuple[Files, Labels]:
        """See `ImageDataModule`."""
        if not self.labelled and split != "predict":
            remedy = f"set --data.labelled true if the folders in {self.root} are classes"
            raise ValueError(f"{split} needs labels: {remedy}")
        folder = self._split_folder(split)
        paths = self._images(folder)
        if not self.labelled:
            labels = np.full(len(paths), -1)
        else:
            classes = {name: number for number, name in enumerate(self._classes or self.read_classes()[0])}
            parents = list(map(_parent, paths))
            unknown = next((parent for parent in parents if parent not in classes), None)
            if unknown is not None:
                raise ValueError(
                    f"unknown class {unknown!r} in {folder}: expected the classes of {self.root / 'train'}"
                )
            labels = np.array([classes[parent] for parent in parents])
            if self.val_share is not None and not self._has_own_folder(split):
                chosen = held_out(labels, self.val_share) != (split == "train")
                paths, labels = [paths[row] for row in np.flatnonzero(chosen)], labels[chosen]
        masks = None if self.masks is None else _matched(paths, folder, self.masks)
        # Millions of objects of pathlib would take seconds.
        above = "" if folder == self._base else f"{folder.relative_to(self._base)}{os.sep}"
        return Files(self._base, [f"{above}{path}" for path in paths], masks=masks), labels

    @property
    def _base(self) -> Path:
        return self.root.parent if self.root.is_file() else self.root

    def _split_folder(self, split: Split) -> Path:
        if not self.root.exists():
            raise FileNotFoundError(f"image folder {self.root.absolute()} does not exist")
        if not self.root.is_dir():
            require_regular_file(self.root)
        if not self.labelled:
            return self._base
        found = {kind: find_split(kind, self._folders()) for kind in ("train", "val", "test")}
        if split == "test" and found["test"]:
            return self.root / found["test"]
        # A share of the training images stands in for a folder of validation images.
        kind = "train" if split == "train" or (self.val_share is not None and not found["val"]) else "val"
        if folder := found[kind]:
            return self.root / folder
        if split in ("train", "selection") and self.val_share is None:
            raise FileNotFoundError(
                f"{self.root.absolute()} has no folder {kind!r}, which fit needs: set val_share to hold out a share of "
                "the images"
            )
        return self.root

    def _has_own_folder(self, split: Split) -> bool:
        """Return whether a split's images are no share of the training images."""
        return any(find_split(kind, self._folders()) for kind in (("val", "test") if split == "test" else ("val",)))

    def _folders(self) -> list[str]:
        """Return the names of folders that may be splits: without training images, `valid` may be a class."""
        names = [entry.name for entry in self.root.iterdir() if entry.is_dir()] if self.root.is_dir() else []
        return names if find_split("train", names) else [name for name in names if name in ("val", "test")]

    def _images(self, folder: Path) -> list[str]:
        if self.root.is_file():
            return [self.root.name]
        walked, self._walked = self._walked, None
        if walked is not None and walked[0] == folder:
            return walked[1]
        paths = files_below(folder, SUFFIXES, besides=self.masks)
        if not paths:
            raise ValueError(f"{folder.absolute()}: expected images (suffixes {' '.join(SUFFIXES)}), got none")
        return paths


def _parent(path: str) -> str:
    """Return the name of the folder that directly holds a file."""
    return path.rpartition(os.sep)[0].rpartition(os.sep)[2]


def _matched(images: list[str], folder: Path, masks: Path) -> list[str]:
    """Return the path of each image's mask."""
    if not masks.is_dir():
        raise FileNotFoundError(f"mask folder {masks.absolute()} does not exist")
    by_path, by_stem = defaultdict(list), defaultdict(list)
    for path in files_below(masks, SUFFIXES):
        by_path[str(Path(path).with_suffix(""))].append(path)
        by_stem[Path(path).stem].append(path)
    chosen = []
    for image in images:
        candidates = by_path.get(str(Path(image).with_suffix(""))) or by_stem.get(Path(image).stem, [])
        if len(candidates) != 1:
            found = f"{len(candidates)}: {', '.join(candidates[:3])}" if candidates else "none"
            raise ValueError(
                f"image {folder / image}: expected one mask in {masks}, got {found}. "
                f"Name it {Path(image).with_suffix('.png')}"
            )
        chosen.append(str(masks / candidates[0]))
    return chosen

"""Images from any folder, with or without labels and masks."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gmarpp.data.dataset import Files
from gmarpp.data.module import ImageDataModule, Split
from gmarpp.data.names import readable_names
from gmarpp.data.numbering import Labels
from gmarpp.data.walk import SUFFIXES, files_below, require_regular_file
from gmarpp.files import expand_path


class ImageFolder(ImageDataModule):
    """Any images below a folder, in the order of their paths.

    Without labels, for `predict`: every image below `root`, or `root` itself if it is one. With labels: the name of
    the folder that directly holds an image is its class, in `root/train` and `root/val` (`root/test` where it exists)
    or, for all but `fit`, in `root` itself. Links are followed; hidden files are left out, and so, with a warning, are
    folders that hold results of this project. Unreadable files and folders are errors.

    Args:
        root: the folder, or one image. Here and in `masks`, `~` and environment variables are expanded.
        labelled: whether parent folders are class ids.
        masks: folder of segmentation masks. An image's mask has the same relative path, or else the same name, up to
            the suffix. Everything but black, or palette index 0, is object.
        **options: of `ImageDataModule`.
    """

    def __init__(self, root: str, labelled: bool = False, masks: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.root = expand_path(root)
        self.labelled = labelled
        self.masks = None if masks is None else expand_path(masks)

    def read_classes(self) -> tuple[Sequence[str], Sequence[str]]:
        """Return the sorted names of the class folders; none without labels."""
        if not self.labelled:
            return (), ()
        folder = self._split_folder("train") if (self.root / "train").is_dir() else self._split_folder("val")
        paths = self._images(folder)
        bare = next((path for path in paths if not Path(path).parent.name), None)
        if bare is not None:
            raise ValueError(
                f"{folder / bare}: expected images in folders named by class, got one outside: move or remove it"
            )
        classes = sorted({Path(path).parent.name for path in paths})
        return classes, readable_names(classes)

    def read_split(self, split: Split) -> tuple[Files, Labels]:
        """See `ImageDataModule`."""
        if not self.labelled and split != "predict":
            raise ValueError(f"{split} needs labels: set labelled to true if the folders in {self.root} are classes")
        folder = self._split_folder(split)
        paths = self._images(folder)
        masks = None if self.masks is None else _matched(paths, folder, self.masks)
        if not self.labelled:
            labels = np.full(len(paths), -1)
        else:
            classes = {name: number for number, name in enumerate(self.read_classes()[0])}
            parents = [Path(path).parent.name for path in paths]
            unknown = next((parent for parent in parents if parent not in classes), None)
            if unknown is not None:
                raise ValueError(
                    f"unknown class {unknown!r} in {folder}: expected the classes of {self.root / 'train'}"
                )
            labels = np.array([classes[parent] for parent in parents])
        root = self._base
        return Files(root, [str((folder / path).relative_to(root)) for path in paths], masks=masks), labels

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
        choices = {"train": ["train"], "selection": ["val"], "test": ["test", "val", ""]}.get(split, ["val", ""])
        for name in choices:
            if (self.root / name).is_dir():
                return self.root / name
        raise FileNotFoundError(f"{self.root.absolute()} has no folder {choices[0]!r}, which fit needs")

    def _images(self, folder: Path) -> list[str]:
        if self.root.is_file():
            return [self.root.name]
        paths = files_below(folder, SUFFIXES, besides=self.masks)
        if not paths:
            raise ValueError(f"{folder.absolute()}: expected images (suffixes {' '.join(SUFFIXES)}), got none")
        return paths


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

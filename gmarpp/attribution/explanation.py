"""The result of `explain`, which draws itself in a notebook."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from gmarpp.attribution.target import NO_CLASS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gmarpp.visualize import Region, SignedMaps


@dataclass(frozen=True)
class Explanation:
    """Maps of a batch of images.

    Attributes:
        maps: by method name, float32, shape (B, h, w), raw, not normalized; (B, K, h, w) where the target was (B, K);
            (B, t, h, w), or (B, K, t, h, w), of videos.
        target: class explained, long, (B,) or (B, K); -1 where a function was explained instead of a class.
        logits: the network's output, (B, C); the scores, (B, 1) or (B, K), where the target was a function.
        scores: what was explained, float32, (B,) or (B, K): the logit of each class, the difference of a `Contrast`, or
            the value of a function. Of a class, methods of the balanced gradient explain the margin instead, its logit
            less the log-sum-exp of the others.
        images: the part of the images that the network's patches cover, float32 in [0, 1] for display, (B, 3, H, W);
            (B, T, 3, H, W) of videos.
        class_names: names of the classes for people, or of the K scores where the target was a function that names
            them; empty if they have none.
        signed_methods: names of the methods whose maps are signed, negative for what speaks against the score.
        task: of the network, as `gmarpp.network.task.task_of` tells; decides what stands above a figure's columns.
    """

    maps: dict[str, Tensor]
    target: Tensor
    logits: Tensor
    scores: Tensor
    images: Tensor = field(repr=False)
    class_names: tuple[str, ...] = field(default=(), repr=False)
    signed_methods: tuple[str, ...] = ()
    task: str = "multiclass"

    def overlay(
        self,
        image: int = 0,
        method: str | None = None,
        column: int = 0,
        signed_maps: "SignedMaps" = "diverging",
        original: Image.Image | None = None,
        region: "Region | None" = None,
    ) -> Image.Image:
        """Lay a map over its image, or over the whole picture that the image was made of, in that one's resolution.

        Of a video, it is laid over one frame per step of the map, in rows of four.

        Args:
            image: position in the batch.
            method: key of `maps`; the first by default.
            column: which class, where several classes per image were explained.
            signed_maps: how a signed map is drawn; see `gmarpp.visualize.MapStyle`.
            original: the picture before it was resized and cropped.
            region: the part of `original` that `images` shows, its edges x0, y0, x1, y1 in pixels; all of it by
                default. `gmarpp.network.preprocessing.Preprocessing.region` tells timm's crop.

        Raises:
            ValueError: an unknown method, or that part of the original does not look like the image.
        """
        from gmarpp.visualize import laid_over

        method = method or next(iter(self.maps))
        if method not in self.maps:
            raise ValueError(f"unknown method {method!r}: choose from {', '.join(self.maps)}")
        drawn = signed_maps if method in self.signed_methods else None
        attribution = self._map(method, image, column)
        return laid_over(self._picture(image, method), attribution, drawn, original, region)

    def save(
        self,
        path: str | Path,
        signed_maps: "SignedMaps" = "diverging",
        originals: Sequence[Image.Image] | None = None,
        regions: "Sequence[Region] | None" = None,
    ) -> None:
        """Save what the path's suffix says; each file appears under its name only when it is complete.

        `.safetensors` holds raw maps, `maps/<method>`, with `target`, `logits` and `scores`; `.png`, `.pdf` and `.svg`
        hold the figure of `show` with all images. A path without a suffix is a folder: `maps.safetensors`, and
        `overlays/<method>/<image>.png`, or `<image>-<column>.png` where several classes per image were explained, in
        place of those of an earlier explanation.

        Args:
            path: file or folder; folders that are missing are made.
            signed_maps: how signed maps are drawn; see `gmarpp.visualize.MapStyle`.
            originals: for the overlays of a folder, the picture that each image was made of; see `overlay`.
            regions: the part of each that the image shows.

        Raises:
            ValueError: another suffix, or originals that do not fit the images.
            OSError: naming the file that cannot be written.
        """
        from gmarpp.attribution.saving import save_explanation

        save_explanation(self, Path(path), signed_maps, originals, regions)

    def show(self, images: int = 8, signed_maps: "SignedMaps" = "diverging") -> "Figure":
        """Draw images across and methods down, with class and probability, or score, above each image.

        Args:
            images: how many to draw, from the first; every explained class of an image has its own column.
            signed_maps: how signed maps are drawn; see `gmarpp.visualize.MapStyle`.
        """
        from gmarpp.figures import comparison_figure
        from gmarpp.visualize import MapStyle

        targets = self.target[:, None] if self.target.dim() == 1 else self.target
        columns = [(image, column) for image in range(min(images, len(targets))) for column in range(targets.shape[1])]
        names, probabilities = self._headings(columns)
        first = next(iter(self.maps))
        return comparison_figure(
            images=[self._picture(image, first) for image, _ in columns],
            maps={method: [self._map(method, *column) for column in columns] for method in self.maps},
            names=names,
            probabilities=probabilities,
            signed_methods=self.signed_methods,
            style=MapStyle(signed_maps=signed_maps),
        )

    def _headings(self, columns: Sequence[tuple[int, int]]) -> tuple[list[str], list[float | None]]:
        """Return what stands above images and columns of classes: class and probability, or score."""
        rows = len(self.logits)
        targets, scores = self.target.view(rows, -1), self.scores.view(rows, -1)
        is_function = bool((targets == NO_CLASS).any())
        if is_function or self.logits.shape[1] == 1:
            values = [f"{float(scores[column]):.3g}" for column in columns]
            if not (is_function and self.class_names):
                return [f"score {value}" for value in values], [None] * len(columns)
            # A comma would end the name: of a class only the first of synonyms is shown.
            texts = [self.class_names[k].replace(",", "") for _, k in columns]
            return [f"{value} {text}" for value, text in zip(values, texts, strict=True)], [None] * len(columns)
        explained = [int(targets[column]) for column in columns]
        names = [self.class_names[index] if self.class_names else f"class {index}" for index in explained]
        if self.task == "regression":
            values = [f"{float(scores[column]):.3g} {name}" for column, name in zip(columns, names, strict=True)]
            return values, [None] * len(columns)
        logits = self.logits.float()
        probabilities = logits.sigmoid() if self.task == "multilabel" else logits.softmax(dim=1)
        return names, [float(probabilities[image, k]) for (image, _), k in zip(columns, explained, strict=True)]

    def _picture(self, image: int, method: str) -> Tensor:
        picture = self.images[image].cpu()
        if picture.dim() == 3:
            return picture
        steps = self.maps[method].shape[-3]
        return _in_rows(picture[torch.arange(steps) * len(picture) // steps])

    def _map(self, method: str, image: int, column: int) -> Tensor:
        maps = self.maps[method][image].cpu()
        maps = maps if self.target.dim() == 1 else maps[column]
        if maps.dim() == 2:
            return maps
        from gmarpp.visualize import upsample_map

        # Frames are interpolated one by one, so that none shows what belongs to its neighbor.
        height, width = self.images.shape[-2:]
        return _in_rows(torch.stack([torch.from_numpy(upsample_map(each.numpy(), height, width)) for each in maps]))


def _in_rows(frames: Tensor) -> Tensor:
    """Lay frames (t, ..., H, W) out in rows of four, (..., R H, 4 W); places that are left are as good as empty."""
    across = min(len(frames), 4)
    left = frames.abs().min().expand(-len(frames) % across, *frames.shape[1:])
    rows = torch.unflatten(torch.cat([frames, left]), 0, (-1, across))
    laid_out: Tensor = torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2)
    return laid_out

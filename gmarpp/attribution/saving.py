"""Explanations on disk: raw maps, overlays, figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from gmarpp.figures import FIGURE_FORMATS, figure_bytes
from gmarpp.files import write_atomically
from gmarpp.visualize import Region, SignedMaps, encode_png

if TYPE_CHECKING:
    from gmarpp.attribution.explanation import Explanation

_OVERLAYS = "overlays"


def save_explanation(
    explanation: "Explanation",
    path: Path,
    signed_maps: SignedMaps,
    originals: Sequence[Image.Image] | None,
    regions: Sequence[Region] | None,
) -> None:
    """Save an explanation as `Explanation.save` describes it."""
    suffix = path.suffix.removeprefix(".")
    if originals is not None and suffix and not path.is_dir():
        raise ValueError(f"{path}: originals are for the overlays of a folder, expected a path without a suffix")
    if path.is_dir() or not suffix:
        overlays, raw = _overlays(explanation, signed_maps, originals, regions), _raw(explanation)
        for earlier in path.glob(f"{_OVERLAYS}/*/[0-9][0-9][0-9][0-9]*.png"):
            earlier.unlink()
        for name, data in overlays:
            _write(path / name, data)
        _write(path / "maps.safetensors", raw)
    elif suffix == "safetensors":
        _write(path, _raw(explanation))
    elif suffix in FIGURE_FORMATS:
        figure = explanation.show(len(explanation.images), signed_maps)
        _write(path, figure_bytes(figure, suffix))
    else:
        choices = ", ".join(f".{each}" for each in ("safetensors", *FIGURE_FORMATS))
        raise ValueError(f"{path}: unknown suffix '.{suffix}': choose from {choices}, or none for a folder")


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)


def _raw(explanation: "Explanation") -> bytes:
    tensors: dict[str, Tensor] = {f"maps/{method}": maps for method, maps in explanation.maps.items()}
    tensors |= {name: getattr(explanation, name) for name in ("target", "logits", "scores")}
    about = {"class_names": explanation.class_names, "signed_methods": explanation.signed_methods}
    # One entry only: safetensors keeps no order among several, and equal explanations are to be equal bytes.
    metadata = {"explanation": json.dumps(about)}
    # The scores of a function are its output, and files hold no tensor twice.
    return save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, metadata)


def _overlays(
    explanation: "Explanation",
    signed_maps: SignedMaps,
    originals: Sequence[Image.Image] | None,
    regions: Sequence[Region] | None,
) -> list[tuple[str, bytes]]:
    """Draw all overlays before the first is written, so that originals that do not fit leave nothing behind."""
    images = len(explanation.images)
    for name, given in (("originals", originals), ("regions", regions)):
        if given is not None and len(given) != images:
            raise ValueError(f"{name}: expected one for each of {images} images, got {len(given)}")
    classes: Any = explanation.target.shape[1:]
    drawn = []
    for method in explanation.maps:
        for image in range(images):
            placed = (None if originals is None else originals[image]), (None if regions is None else regions[image])
            for column in range(*(classes or (1,))):
                picture = explanation.overlay(image, method, column, signed_maps, *placed)
                name = f"{image:04d}-{column}" if classes else f"{image:04d}"
                drawn.append((f"{_OVERLAYS}/{method}/{name}.png", encode_png(np.asarray(picture))))
    return drawn

"""An explained batch in the form in which it is stored, and how much room that takes."""

import math
from typing import Any

from torch import Tensor

from gmarpp.explained import ExplainedBatch
from gmarpp.maps import Array
from gmarpp.run.folder import file_stem
from gmarpp.run.pictures import Pictures
from gmarpp.run.shards import Shard

_ROLES = ("label", "target", "predicted")
_PROBABILITIES = ("target_probability", "predicted_probability")


def stored_batch(explained: ExplainedBatch) -> Shard:
    """Return what is stored of an explained batch.

    Raises:
        ValueError: naming what no reader would take, such as a box that is not finite.
    """
    methods = tuple(explained.maps)
    metrics = tuple(next(iter(explained.values.values()), {}))
    tensors: dict[str, Tensor] = {}
    fractions = None
    for method in methods:
        tensors[method] = explained.maps[method].float()
        tensors |= {f"{method}/{metric}": value.float() for metric, value in explained.values[method].items()}
        if explained.curves:
            curves = explained.curves[method]
            fractions = curves.fractions.float()
            tensors[f"{method}/insertion"] = curves.insertion.float()
            tensors[f"{method}/deletion"] = curves.deletion.float()
    # Whole columns at a time: to take numbers from tensors one by one took longer than all the rest.
    columns: dict[str, list[Any]] = {role: [int(each) for each in getattr(explained, role).tolist()] for role in _ROLES}
    columns |= {name: [_known(each) for each in getattr(explained, name).tolist()] for name in _PROBABILITIES}
    if explained.boxes is not None:
        columns["box"] = [[round(edge, 2) for edge in box] for box in explained.boxes.tolist()]
    rows = [
        {"index": index, "path": path, "file": file_stem(index, path), **dict(zip(columns, values, strict=True))}
        for index, path, *values in zip(explained.index.tolist(), explained.path, *columns.values(), strict=True)
    ]
    shard = Shard(methods, metrics, rows, tensors, fractions)
    shard.check()
    return shard


def _known(probability: float) -> float | None:
    return None if math.isnan(probability) else probability


def bytes_per_image(shard: Shard, pictures: Pictures, image: Array, maps: dict[str, Array]) -> int:
    """Return about how many bytes of disk an image like the first of a batch takes.

    Args:
        shard: the batch.
        pictures: draws those of the run.
        image: the batch's first image, uint8 pixels, shape (H, W, 3).
        maps: by method, its map, shape (h, w); empty where no overlays are drawn.
    """
    drawn = sum(len(data) for _, data in pictures.encoded("", shard.rows[0]["index"], image, maps))
    # While parts are merged, both they and the maps are there.
    return drawn + 2 * sum(tensor.nbytes for tensor in shard.tensors.values()) // len(shard.rows)

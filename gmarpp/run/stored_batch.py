"""An explained batch in the form in which it is stored, and how much room that takes."""

from torch import Tensor

from gmarpp.explained import ExplainedBatch
from gmarpp.maps import Array
from gmarpp.run.folder import file_stem
from gmarpp.run.pictures import Pictures
from gmarpp.run.shards import Shard


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
    rows = []
    for position, (index, path) in enumerate(zip(explained.index.tolist(), explained.path, strict=True)):
        row = {
            "index": index,
            "path": path,
            "file": file_stem(index, path),
            **{role: int(getattr(explained, role)[position]) for role in ("label", "target", "predicted")},
            "target_probability": _known(explained.target_probability[position]),
            "predicted_probability": _known(explained.predicted_probability[position]),
        }
        if explained.boxes is not None:
            row["box"] = [round(float(edge), 2) for edge in explained.boxes[position]]
        rows.append(row)
    shard = Shard(methods, metrics, rows, tensors, fractions)
    shard.check()
    return shard


def _known(probability: Tensor) -> float | None:
    return None if probability.isnan() else float(probability)


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

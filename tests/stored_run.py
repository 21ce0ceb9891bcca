"""A small finished run on disk, without a network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gmarpp.run.folder import IMAGES, MAPS, PARTS, file_stem, write_run
from gmarpp.run.reader import StoredRun, load_explanations
from gmarpp.run.shards import Shard, merge_parts, remove_parts
from gmarpp.visualize import encode_jpeg

METHODS = ("gmarpp_l1", "rollout", "random")
METRICS = ("average_drop", "insertion_auc", "sparseness")
CLASS_NAMES = ("tabby, tabby cat", "<b>dog</b>", 'the "bird" & co', "Größe 猫")


def run_description() -> dict[str, Any]:
    return {
        "status": "running",
        "created": "2025-01-02T03:04:05+00:00",
        "versions": {"gmarpp": "0", "torch": "2"},
        "checkpoint": {"path": "checkpoints/x.ckpt", "sha256": "ab" * 32},
        "model": {"name": "VisionTransformer", "architecture": "vit_tiny", "parameters": 5_000_000},
        "explainer": {"target": "predicted", "score": "probability", "baseline": "blur", "steps": 4},
        "data": {"name": "ImageFolder", "images": 7, "paths_sha256": None},
        "writer": {"overlays": True, "colormap": "inferno", "opacity": 0.5},
        "classes": ["a", "b", "c", "d"],
        "class_names": list(CLASS_NAMES),
        "processes": 1,
    }


def shard(
    indices: Sequence[int], paths: Sequence[str], grid: tuple[int, int] = (4, 6), signed_methods: Sequence[str] = ()
) -> Shard:
    """Random explanations that depend on each image's index only; image 1 has no value of the first metric."""
    tensors: dict[str, list[torch.Tensor]] = {}
    rows = []
    for index, path in zip(indices, paths, strict=True):
        generator = torch.Generator().manual_seed(index)
        for method in METHODS:
            offset = 0.25 if method in signed_methods else 0
            tensors.setdefault(method, []).append(torch.rand(*grid, generator=generator) - offset)
            for curve in ("insertion", "deletion"):
                tensors.setdefault(f"{method}/{curve}", []).append(torch.rand(5, generator=generator))
            for metric in METRICS:
                value = torch.rand((), generator=generator)
                undefined = index == 1 and metric == METRICS[0]
                tensors.setdefault(f"{method}/{metric}", []).append(value * torch.nan if undefined else value)
        rows.append(
            {
                "index": index,
                "path": path,
                "file": file_stem(index, path),
                "label": index % 4 if index else -1,
                "target": (index * 3) % 4,
                "predicted": (index * 3) % 4,
                "target_probability": 0.5,
                "predicted_probability": 0.5,
                "box": [0.0, 1.0, 10.0, 12.0],
            }
        )
    stacked = {key: torch.stack(values) for key, values in tensors.items()}
    return Shard(METHODS, METRICS, rows, stacked, torch.linspace(0, 1, 5))


def stored_run(
    folder: Path, paths: Sequence[str], shard_size: int = 4, signed_methods: Sequence[str] = ()
) -> StoredRun:
    for name in (PARTS, MAPS, IMAGES):
        (folder / name).mkdir(parents=True)
    part = shard(range(len(paths)), paths, signed_methods=signed_methods)
    part.write(folder / PARTS / "0.safetensors")
    for row in part.rows:
        pixels = np.random.default_rng(row["index"]).integers(0, 256, (24, 36, 3), dtype=np.uint8)
        (folder / IMAGES / f"{row['file']}.jpg").write_bytes(encode_jpeg(pixels))
    merge_parts(folder, shard_size)
    remove_parts(folder)
    # Runs of earlier versions do not say which methods are signed.
    said = {"signed_methods": list(signed_methods)} if signed_methods else {}
    write_run(folder, {**run_description(), **said, "status": "complete"})
    return load_explanations(folder)

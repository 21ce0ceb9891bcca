"""Writing of networks to files, with metadata that lets `load_model` rebuild them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from gmarpp.files import write_atomically
from gmarpp.network.files.weights import DIGEST, DIGEST_NAME, content_digest
from gmarpp.network.preprocessing import get_image_size, get_preprocessing
from gmarpp.network.task import task_of


def save_weights(
    model: nn.Module, path: str | Path, dtype: torch.dtype | None = None, notes: Mapping[str, str] | None = None
) -> None:
    """Write a network as a plain timm safetensors file whose metadata lets `load_model` rebuild it.

    The file appears under its name only when it is complete. Its metadata holds a digest of all its content, which is
    checked whenever the file is read.

    Args:
        model: a network from `load_model` or a `ViTClassifier`'s `.model`.
        path: the file to write, `.safetensors`.
        dtype: dtype to store floating-point weights in; unchanged when `None`.
        notes: further metadata, such as `recipe` or `origin`.

    Raises:
        ValueError: notes hold anything but strings.
    """
    metadata = {**(notes or {}), **describe_model(model), DIGEST_NAME: DIGEST}
    if wrong := [key for key, value in metadata.items() if not isinstance(value, str)]:
        raise ValueError(f"notes: expected strings, got others for {', '.join(wrong)}")
    state = {
        key: value.detach().cpu().to(dtype if value.is_floating_point() else None).contiguous()
        for key, value in model.state_dict().items()
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    metadata[DIGEST] = content_digest(state, metadata)
    write_atomically(Path(path), save(state, metadata))


def describe_model(model: nn.Module) -> dict[str, str]:
    """Return what a file has to say of a network from `load_model`: architecture, classes, preprocessing; in JSON."""
    network: Any = model
    height, width = get_image_size(model)
    return {
        "architecture": network.pretrained_cfg["architecture"],
        "model_args": json.dumps(network.model_args),
        "img_size": json.dumps(height if height == width else [height, width]),
        "num_classes": str(network.num_classes),
        "classes": json.dumps(network.classes),
        "class_names": json.dumps(network.class_names),
        "task": task_of(model),
        **{
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in get_preprocessing(model).items()
        },
    }

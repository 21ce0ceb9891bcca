"""Folders in the layouts of the Hugging Face Hub: a network's configuration beside its weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmarpp.files import first_line
from gmarpp.network.safe_reading import load_safetensors, load_tensors, read_json
from gmarpp.network.weights import (
    PREPROCESSING,
    Weights,
    expect_integer,
    expect_mapping,
    expect_names,
    expect_pair,
    without_prefix,
)

CONFIG = "config.json"
PIL_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Parts of a ViTForImageClassification checkpoint that classification does not use.
UNUSED = ("vit.pooler.", "pooler.")


def read_folder(folder: Path) -> Weights:
    """Return the weights in a folder: a timm network, or transformers' ViTForImageClassification in timm's layout.

    Raises:
        FileNotFoundError: the configuration or the weights are missing.
        ValueError: a file is damaged, or the network is of another kind.
    """
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder} is not a Hugging Face model folder: it has no {CONFIG}")
    digests: dict[str, str] = {}
    config = _read_config(folder / CONFIG, digests)
    if "architecture" in config:
        weights = _read_timm(folder, config, digests)
    elif config.get("model_type") == "vit":
        weights = _read_vit(folder, config, digests)
    else:
        raise ValueError(
            f"{folder} holds a {config.get('model_type', 'network without model_type')}; of Hugging Face folders only "
            "timm's and ViTForImageClassification's (model_type vit) can be loaded"
        )
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return replace(weights, sha256=hashlib.sha256(lines.encode()).hexdigest())


def _read_config(file: Path, digests: dict[str, str]) -> dict[str, Any]:
    config, digests[file.name] = read_json(file)
    return config


def _read_state(folder: Path, digests: dict[str, str]) -> dict[str, Tensor]:
    for name, load in (("model.safetensors", load_safetensors), ("pytorch_model.bin", load_tensors)):
        if (folder / name).exists():
            state, *_, digests[name] = load(folder / name)
            return state
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def _read_timm(folder: Path, config: dict[str, Any], digests: dict[str, str]) -> Weights:
    """Read what `timm.models.push_to_hf_hub` and `save_for_hf` write."""
    about = expect_mapping("pretrained_cfg", config.get("pretrained_cfg", config))
    size = about.get("input_size")
    if size is not None and not (isinstance(size, list) and len(size) == 3):
        raise ValueError(f"input_size: expected three numbers, got {size!r}")
    labels = expect_names("label_names", config.get("label_names", about.get("label_names")) or [])
    options = expect_mapping("model_args", config.get("model_args") or {})
    if pool := config.get("global_pool"):
        options.setdefault("global_pool", pool)
    own_size = options.pop("img_size", None if size is None else size[1:])
    own_classes = options.pop("num_classes", None)
    described = expect_mapping("label_descriptions", config.get("label_descriptions") or {})
    return Weights(
        state=without_prefix(_read_state(folder, digests)),
        architecture=config["architecture"],
        image_size=None if own_size is None else expect_pair("input_size", own_size),
        num_classes=config.get("num_classes", about.get("num_classes", own_classes)),
        model_args=options,
        classes=labels,
        class_names=tuple(described.get(label, label) for label in labels),
        preprocessing={key: about[key] for key in PREPROCESSING if about.get(key) is not None},
    )


def _read_vit(folder: Path, config: dict[str, Any], digests: dict[str, str]) -> Weights:
    """Convert `transformers.ViTForImageClassification` to timm's layout."""

    def integer(name: str) -> int:
        return expect_integer(name, config.get(name), 1, 1 << 20)

    def choice(name: str, known: Mapping[Any, Any], value: Any) -> Any:
        # As a key, True equals 1.
        if type(value) not in map(type, known) or value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(map(str, known))}")
        return known[value]

    depth, width, epsilon = integer("num_hidden_layers"), integer("hidden_size"), config.get("layer_norm_eps")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise ValueError(f"layer_norm_eps: expected a number in (0, 1), got {epsilon!r}")
    state = _rename(_read_state(folder, digests), depth, folder)
    num_classes = len(state["head.bias"]) if "head.bias" in state else 0
    labels = {} if config.get("id2label") is None else expect_mapping("id2label", config["id2label"])
    names = tuple(labels.get(str(index), f"LABEL_{index}") for index in range(num_classes))
    size = expect_pair("image_size", config.get("image_size"))
    return Weights(
        state=state,
        architecture="vit_base_patch16_224",
        image_size=size,
        num_classes=num_classes,
        model_args={
            "patch_size": integer("patch_size"),
            "embed_dim": width,
            "depth": depth,
            "num_heads": integer("num_attention_heads"),
            "mlp_ratio": integer("intermediate_size") / width,
            "qkv_bias": choice("qkv_bias", {True: True, False: False}, config.get("qkv_bias", True)),
            "act_layer": choice("hidden_act", ACTIVATIONS, config.get("hidden_act")),
            "layer_norm_eps": epsilon,
        },
        classes=names if len(set(names)) == len(names) else (),
        class_names=names,
        preprocessing=_vit_preprocessing(folder, min(size), choice, digests),
    )


def _rename(source: Mapping[str, Tensor], depth: int, folder: Path) -> dict[str, Tensor]:
    """Rename weights to timm's names.

    Raises:
        ValueError: a weight is missing, does not fit the others, or is unknown.
    """
    names = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
        "norm.weight": "vit.layernorm.weight",
        "norm.bias": "vit.layernorm.bias",
    }
    if "classifier.weight" in source:
        names |= {f"head.{kind}": f"classifier.{kind}" for kind in ("weight", "bias")}
    left = {key: value for key, value in source.items() if not key.startswith(UNUSED)}
    try:
        state = {ours: left.pop(theirs) for ours, theirs in names.items()}
        for layer in range(depth):
            state |= _rename_layer(left, layer)
    except KeyError as error:
        raise ValueError(f"{folder} lacks {error} of a ViTForImageClassification with {depth} layers") from error
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{folder} holds weights that do not fit each other: {first_line(error)}") from error
    if left:
        raise ValueError(
            f"{folder} holds {len(left)} weights ({next(iter(left))}, …) that a ViTForImageClassification with {depth} "
            f"layers does not have: correct {CONFIG}"
        )
    return state


def _rename_layer(left: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Take a layer's weights out of those left, under timm's names."""
    prefix, state = f"vit.encoder.layer.{layer}", {}
    for ours, theirs in {
        "norm1": "layernorm_before",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }.items():
        for kind in ("weight", "bias"):
            state[f"blocks.{layer}.{ours}.{kind}"] = left.pop(f"{prefix}.{theirs}.{kind}")
    for kind in ("weight", "bias"):
        parts = [f"{prefix}.attention.attention.{part}.{kind}" for part in ("query", "key", "value")]
        if parts[0] in left:
            state[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat([left.pop(part) for part in parts])
    return state


def _vit_preprocessing(folder: Path, image_size: int, choice: Any, digests: dict[str, str]) -> dict[str, Any]:
    file = folder / "preprocessor_config.json"
    config = _read_config(file, digests) if file.exists() else {}
    normalized = choice("do_normalize", {True: True, False: False}, config.get("do_normalize", True))
    size = config.get("size")
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    if shortest is not None:
        expect_integer("shortest_edge", shortest, image_size, 1 << 20)
    return {
        "mean": config.get("image_mean", [0.5] * 3) if normalized else [0.0] * 3,
        "std": config.get("image_std", [0.5] * 3) if normalized else [1.0] * 3,
        "interpolation": choice("resample", PIL_INTERPOLATION, config.get("resample", 2)),
        "crop_pct": image_size / shortest if shortest else 1.0,
        "crop_mode": "center" if shortest else "squash",
    }

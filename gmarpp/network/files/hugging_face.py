"""Folders in the layouts of the Hugging Face Hub: a network's configuration beside its weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmarpp.files import first_line
from gmarpp.network.expected import PREPROCESSING, expect_integer, expect_mapping, expect_names, expect_pair
from gmarpp.network.files.image_processor import choose, processor_preprocessing, read_image_processor
from gmarpp.network.files.prefix import without_prefix
from gmarpp.network.files.safe_reading import load_safetensors, load_tensors, read_json
from gmarpp.network.files.weights import Weights

CONFIG = "config.json"
# Weights are in one file, or in several that an index lists.
STATES = (
    ("model.safetensors", load_safetensors),
    ("model.safetensors.index.json", load_safetensors),
    ("pytorch_model.bin", load_tensors),
    ("pytorch_model.bin.index.json", load_tensors),
)
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
    """Return the weights in a folder: of a timm network, or of a classifier of transformers.

    A ViTForImageClassification comes in timm's layout, which can be fine-tuned and exported, too.

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
        weights = _read_classifier(folder, config, digests)
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return replace(weights, sha256=hashlib.sha256(lines.encode()).hexdigest())


def _read_config(file: Path, digests: dict[str, str]) -> dict[str, Any]:
    config, digests[file.name] = read_json(file)
    return config


def _read_state(folder: Path, digests: dict[str, str]) -> dict[str, Tensor]:
    found = next(((name, load) for name, load in STATES if (folder / name).exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"{folder} has neither {', '.join(name for name, _ in STATES[:-1])} nor {STATES[-1][0]}"
        )
    name, load = found
    files = _shards(_read_config(folder / name, digests), name) if name.endswith(".json") else [name]
    state: dict[str, Tensor] = {}
    for file in files:
        part, *_, digests[file] = load(folder / file)
        if twice := part.keys() & state.keys():
            raise ValueError(f"{folder / file} holds {min(twice)}, which another file of {name} holds, too")
        state |= part
    return state


def _shards(index: dict[str, Any], name: str) -> list[str]:
    files = expect_mapping("weight_map", index.get("weight_map")).values()
    # Another folder's files are not read.
    if wrong := [file for file in files if not isinstance(file, str) or Path(file).name != file]:
        raise ValueError(f"{name}: expected names of files beside it, got {wrong[0]!r:.80}")
    return sorted(set(files))


def _read_classifier(folder: Path, config: dict[str, Any], digests: dict[str, str]) -> Weights:
    """Read what `save_pretrained` of transformers writes."""
    labels = {} if config.get("id2label") is None else expect_mapping("id2label", config["id2label"])
    names = expect_names("id2label", [labels[index] for index in sorted(labels, key=_position)])
    processor = read_image_processor(folder, digests)
    size = config.get(
        "image_size", expect_mapping("vision_config", config.get("vision_config") or {}).get("image_size")
    )
    image_size = (224, 224) if size is None else expect_pair("image_size", size)
    image_size, preprocessing = processor_preprocessing(processor, image_size, resample=3)
    return Weights(
        state=_read_state(folder, digests),
        image_size=image_size,
        num_classes=len(names) or None,
        classes=_identifiers(names),
        class_names=names,
        preprocessing=preprocessing if processor else {},
        configuration=config,
    )


def _position(index: str) -> int:
    if not index.isdecimal():
        raise ValueError(f"id2label: expected indices of classes, got {index!r:.80}")
    return int(index)


def _identifiers(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names that tell classes apart; those that transformers makes up, LABEL_0 and so on, tell nothing."""
    made_up = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return names if len(set(names)) == len(names) and not made_up else ()


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

    depth, width, epsilon = integer("num_hidden_layers"), integer("hidden_size"), config.get("layer_norm_eps")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise ValueError(f"layer_norm_eps: expected a number in (0, 1), got {epsilon!r}")
    state = _rename(_read_state(folder, digests), depth, folder)
    num_classes = len(state["head.bias"]) if "head.bias" in state else 0
    labels = {} if config.get("id2label") is None else expect_mapping("id2label", config["id2label"])
    names = tuple(labels.get(str(index), f"LABEL_{index}") for index in range(num_classes))
    size = expect_pair("image_size", config.get("image_size"))
    _, preprocessing = processor_preprocessing(read_image_processor(folder, digests), size, resample=2)
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
            "qkv_bias": choose("qkv_bias", {True: True, False: False}, config.get("qkv_bias", True)),
            "act_layer": choose("hidden_act", ACTIVATIONS, config.get("hidden_act")),
            "layer_norm_eps": epsilon,
        },
        classes=_identifiers(names),
        class_names=names,
        preprocessing=preprocessing,
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

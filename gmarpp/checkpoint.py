"""Loading, importing and exporting network weights, without ever unpickling code."""

import hashlib
import json
import logging
import pickle
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.data import resolve_model_data_config
from timm.layers import LayerNorm
from torch import Tensor, nn

from gmarpp.storage import write_atomically

logger = logging.getLogger(__name__)

PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
# timm's own options of create_model that read files, or the network, in place of building a model
FACTORY_OPTIONS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
PIL_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Weights:
    """A state dict in timm's naming, and what its file says about the network that it fits.

    `None` or empty means that the file does not say. `preprocessing` holds any of `PREPROCESSING`; `model_args` are
    options of `build_model` beyond the architecture's own.
    """

    state: dict[str, Tensor]
    architecture: str | None = None
    image_size: tuple[int, int] | None = None
    num_classes: int | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    preprocessing: dict[str, Any] = field(default_factory=dict)


def load_model(path: str | Path, architecture: str | None = None) -> nn.Module:
    """Builds the network that a file describes and loads its weights.

    Args:
        path: a `.ckpt` of this project, a timm `.safetensors` or `.pth`, or the folder of a Hugging Face
            `ViTForImageClassification`.
        architecture: timm's name of the network, for files that do not name it themselves.

    Returns:
        The network in evaluation mode, with plain attributes `classes` and `class_names` (tuples of str, empty when
        the file does not say) and a `pretrained_cfg` that holds the preprocessing it was trained with.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of an unknown kind or architecture, or does not fit its architecture.
    """
    weights = describe_weights(path, architecture)
    assert weights.architecture is not None
    assert weights.num_classes is not None
    model: Any = build_model(weights.architecture, weights.num_classes, weights.image_size, weights.model_args)
    fill_model(model, weights, path)
    module: nn.Module = model.eval()
    return module


def describe_weights(path: str | Path, architecture: str | None = None) -> Weights:
    """Reads a file as `read_weights` does, and finds out what it does not say itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of an unknown kind, or does not tell its architecture.
    """
    weights = read_weights(path)
    architecture = architecture or weights.architecture
    if architecture is None:
        raise ValueError(
            f"{path} does not name its architecture: pass timm's name of it as architecture=, for example "
            '"vit_base_patch16_224", or write the file with gmarpp.checkpoint.save_weights'
        )
    num_classes, image_size = weights.num_classes, weights.image_size
    if num_classes is None:
        num_classes = _head_size(weights.state, architecture)
    if image_size is None:
        image_size = _infer_image_size(weights.state, architecture, weights.model_args)
    return replace(weights, architecture=architecture, num_classes=num_classes, image_size=image_size)


def fill_model(model: nn.Module, weights: Weights, path: str | Path) -> None:
    """Loads weights that must fit exactly, head included, and the classes and the preprocessing that go with them.

    Raises:
        ValueError: a weight is missing, unknown or of another shape; the message names it and `path`.
    """
    network: Any = model
    _load_exactly(model, _to_layout_of(model, weights.state), path)
    set_preprocessing(model, weights.preprocessing)
    network.classes, network.class_names = weights.classes, weights.class_names


def build_model(
    architecture: str,
    num_classes: int,
    image_size: int | Sequence[int] | None = None,
    model_args: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
) -> nn.Module:
    """Builds a timm network with random weights; no network access.

    Args:
        architecture: timm's name, with or without a pretrained tag. The tag decides the preprocessing.
        num_classes: outputs of the head; 0 for none.
        image_size: side or (height, width) in pixels; the architecture's own when `None`.
        model_args: further options of the timm model, such as `global_pool`, and `layer_norm_eps`.
        drop_path: largest probability of stochastic depth, in [0, 1).

    Raises:
        ValueError: unknown architecture, an option that it does not have or that would read other files, or a size that
            its patches do not divide.
    """
    if refused := FACTORY_OPTIONS & set(model_args or {}):
        raise ValueError(
            f"model_args holds {', '.join(sorted(refused))}, which would read other files or the Hub: take it out, and "
            "name start weights with --model.weights"
        )
    try:
        timm.get_pretrained_cfg(architecture, allow_unregistered=False)
    except RuntimeError as error:
        name = architecture.partition(".")[0]
        known = timm.list_pretrained(f"{name}.*") if timm.is_model(name) else timm.list_models()
        close = ", ".join(get_close_matches(architecture, known, cutoff=0.4)) or "see timm.list_models()"
        raise ValueError(f"unknown architecture {architecture!r}; close names: {close}") from error
    options = dict(model_args or {})
    epsilon = options.pop("layer_norm_eps", None)
    if epsilon is not None:
        options["norm_layer"] = partial(LayerNorm, eps=epsilon)
    size = None if image_size is None else _pair(image_size)
    try:
        model = timm.create_model(
            architecture, num_classes=num_classes, img_size=size, drop_path_rate=drop_path or None, **options
        )
    except TypeError as error:
        raise ValueError(f"{architecture} cannot be built with image_size={size} and {options}: {error}") from error
    patch = _pair(model.patch_embed.patch_size) if hasattr(model, "patch_embed") else (1, 1)
    if size is not None and (size[0] % patch[0] or size[1] % patch[1]):
        raise ValueError(
            f"image_size {size[0]}x{size[1]} is not a multiple of {architecture}'s {patch[0]}-pixel patches"
        )
    model.model_args = dict(model_args or {})
    model.classes, model.class_names = (), ()
    set_preprocessing(model, {})
    built: nn.Module = model
    return built


def get_preprocessing(model: nn.Module) -> dict[str, Any]:
    """The `PREPROCESSING` that a network was trained with, as plain lists and values."""
    config = resolve_model_data_config(model)
    return {key: list(config[key]) if isinstance(config[key], tuple) else config[key] for key in PREPROCESSING}


def set_preprocessing(model: nn.Module, preprocessing: Mapping[str, Any]) -> None:
    """Records in `pretrained_cfg` the preprocessing a network is trained with, and its true input size."""
    unknown = set(preprocessing) - set(PREPROCESSING)
    if unknown:
        raise ValueError(f"unknown preprocessing {', '.join(sorted(unknown))}; there are {', '.join(PREPROCESSING)}")
    network: Any = model
    config = dict(network.pretrained_cfg)
    config.update({key: tuple(value) if isinstance(value, list) else value for key, value in preprocessing.items()})
    config["input_size"] = (3, *get_image_size(model))
    network.pretrained_cfg = network.default_cfg = config


def get_image_size(model: nn.Module) -> tuple[int, int]:
    """The (height, width) in pixels that a timm network is built for."""
    network: Any = model
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return _pair(size if size is not None else network.pretrained_cfg["input_size"][1:])


def load_weights(model: nn.Module, path: str | Path, classes: Sequence[str] = ()) -> bool:
    """Loads a file's weights into a network as the start of a fine-tuning.

    The position embedding and the patch projection are resampled where sizes differ. The file's head is used only when
    it has as many outputs as the network's and its classes, where both are known, are `classes` in the same order.

    Returns:
        Whether the head was loaded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds another architecture's weights.
    """
    weights = read_weights(path)
    state = _to_layout_of(model, weights.state)
    current = model.state_dict()
    head = _head_keys(model)
    keep = all(key in state and state[key].shape == current[key].shape for key in head) and (
        not classes or not weights.classes or tuple(classes) == weights.classes
    )
    if not keep:
        state = {key: value for key, value in state.items() if key not in head} | {key: current[key] for key in head}
        logger.info("%s: the head is not loaded, it is not for these classes", path)
    _load_exactly(model, state, path)
    return keep


def load_pretrained(model: nn.Module, architecture: str) -> bool:
    """Loads timm's pretrained weights from the Hugging Face Hub, all but a head that is for other classes.

    Returns:
        Whether the head was loaded.

    Raises:
        ConnectionError: the weights could not be had.
    """
    network: Any = model
    options = {key: value for key, value in network.model_args.items() if key != "layer_norm_eps"}
    try:
        source = timm.create_model(
            architecture, pretrained=True, num_classes=network.num_classes, img_size=get_image_size(model), **options
        )
    except Exception as error:
        raise ConnectionError(
            f"the pretrained weights of {architecture} could not be loaded from the Hugging Face Hub "
            f"({_first_line(error)}); give a local file with --model.weights, or start from random weights with "
            "--model.pretrained false"
        ) from error
    current = model.state_dict()
    fits: bool = source.pretrained_cfg["num_classes"] == network.num_classes
    kept = set() if fits else _head_keys(model)
    model.load_state_dict({key: current[key] if key in kept else value for key, value in source.state_dict().items()})
    return fits


def save_weights(
    model: nn.Module, path: str | Path, dtype: torch.dtype | None = None, notes: Mapping[str, str] | None = None
) -> None:
    """Writes a network as a plain timm safetensors file whose metadata lets `load_model` rebuild it.

    The file appears under its name only when it is complete.

    Args:
        model: a network from `load_model` or a `ViTClassifier`'s `.model`.
        path: the file to write, `.safetensors`.
        dtype: dtype to store floating-point weights in; each one's own when `None`.
        notes: further metadata, such as `recipe` or `origin`.
    """
    metadata = {**(notes or {}), **describe_model(model)}
    state = {
        key: value.detach().cpu().to(dtype if value.is_floating_point() else None).contiguous()
        for key, value in model.state_dict().items()
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), save(state, metadata))


def describe_model(model: nn.Module) -> dict[str, str]:
    """What a file has to say about a network from `load_model`: architecture, classes, preprocessing; JSON values."""
    network: Any = model
    height, width = get_image_size(model)
    return {
        "architecture": network.pretrained_cfg["architecture"],
        "model_args": json.dumps(network.model_args),
        "img_size": json.dumps(height if height == width else [height, width]),
        "num_classes": str(network.num_classes),
        "classes": json.dumps(network.classes),
        "class_names": json.dumps(network.class_names),
        **{
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in get_preprocessing(model).items()
        },
    }


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 digest of a file; of a folder, over its files' names and contents in sorted order."""
    digest = hashlib.sha256()
    root = Path(path)
    for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if file.is_file():
            if root.is_dir():
                digest.update(file.relative_to(root).as_posix().encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def read_weights(path: str | Path) -> Weights:
    """Reads any of the formats of `load_model`; large files are mapped, not read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, unsafe, or of an unknown kind.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if source.is_dir():
        return _read_hugging_face(source)
    if source.suffix == ".ckpt":
        return _read_lightning(source)
    if source.suffix == ".safetensors":
        return _read_safetensors(source)
    if source.suffix in {".pth", ".pt", ".bin"}:
        content = _load_tensors(source)
        state = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
        return Weights(state=state, architecture=content.get("arch"))
    raise ValueError(
        f"{path} is of an unknown kind; known are .ckpt, .safetensors, .pth, .pt, .bin and a Hugging Face ViT folder"
    )


def read_lightning_checkpoint(path: str | Path) -> dict[str, Any]:
    """Content of a `.ckpt` written by this project, with its tensors mapped from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, unsafe, or another project's.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    content = _load_tensors(Path(path))
    if "architecture" not in content.get("hyper_parameters", {}) or "state_dict" not in content:
        raise ValueError(f"{path} is not a checkpoint of a gmarpp ViTClassifier: it names no architecture")
    return content


def _read_lightning(path: Path) -> Weights:
    content = read_lightning_checkpoint(path)
    hparams = content["hyper_parameters"]
    prefix = "model."
    return Weights(
        state={key[len(prefix) :]: value for key, value in content["state_dict"].items() if key.startswith(prefix)},
        architecture=hparams["architecture"],
        image_size=_pair(hparams["image_size"]),
        num_classes=hparams["num_classes"],
        model_args=hparams["model_args"],
        classes=tuple(content.get("classes", ())),
        class_names=tuple(content.get("class_names", ())),
        preprocessing=hparams["preprocessing"],
    )


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is not a mapping
    except SafetensorError as error:
        raise _damaged(path, error) from error
    parsed = {key: _parse_json(value) for key, value in metadata.items()}
    size = parsed.get("img_size")
    return Weights(
        state=state,
        architecture=metadata.get("architecture"),
        image_size=None if size is None else _pair(size),
        num_classes=parsed.get("num_classes"),
        model_args=parsed.get("model_args", {}),
        classes=tuple(parsed.get("classes", ())),
        class_names=tuple(parsed.get("class_names", ())),
        preprocessing={key: parsed[key] for key in PREPROCESSING if key in parsed},
    )


def _read_hugging_face(folder: Path) -> Weights:
    """Converts a Hugging Face ViT to timm's layout; see `transformers.ViTForImageClassification`."""
    config = _read_json(folder / "config.json")
    if config.get("model_type") != "vit":
        raise ValueError(
            f"{folder} holds a {config.get('model_type', 'network without model_type')}; of Hugging Face folders only "
            "ViTForImageClassification (model_type vit) can be loaded"
        )
    file = next(
        (folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).exists()), None
    )
    if file is None:
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
    source = read_weights(file).state
    try:
        state = _rename_hugging_face(source, config["num_hidden_layers"])
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}: it is not a ViTForImageClassification") from error
    num_classes = len(state["head.bias"]) if "head.bias" in state else 0
    labels = config.get("id2label", {})
    names = tuple(str(labels.get(str(index), f"LABEL_{index}")) for index in range(num_classes))
    return Weights(
        state=state,
        architecture="vit_base_patch16_224",
        image_size=_pair(config["image_size"]),
        num_classes=num_classes,
        model_args={
            "patch_size": config["patch_size"],
            "embed_dim": config["hidden_size"],
            "depth": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
            "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
            "qkv_bias": config.get("qkv_bias", True),
            "act_layer": {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(
                config["hidden_act"], config["hidden_act"]
            ),
            "layer_norm_eps": config["layer_norm_eps"],
        },
        classes=names,
        class_names=names,
        preprocessing=_hugging_face_preprocessing(folder, config["image_size"]),
    )


def _rename_hugging_face(source: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    names = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
        "norm.weight": "vit.layernorm.weight",
        "norm.bias": "vit.layernorm.bias",
    }
    for layer in range(depth):
        for ours, theirs in {
            "norm1": "layernorm_before",
            "attn.proj": "attention.output.dense",
            "norm2": "layernorm_after",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        }.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{layer}.{ours}.{kind}"] = f"vit.encoder.layer.{layer}.{theirs}.{kind}"
    state = {ours: source[theirs] for ours, theirs in names.items()}
    for layer in range(depth):
        attention = f"vit.encoder.layer.{layer}.attention.attention"
        for kind in ("weight", "bias"):
            if f"{attention}.query.{kind}" in source:
                state[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(
                    [source[f"{attention}.{part}.{kind}"] for part in ("query", "key", "value")]
                )
    state.update(
        {f"head.{kind}": source[f"classifier.{kind}"] for kind in ("weight", "bias") if "classifier.weight" in source}
    )
    return state


def _hugging_face_preprocessing(folder: Path, image_size: int) -> dict[str, Any]:
    file = folder / "preprocessor_config.json"
    config = _read_json(file) if file.exists() else {}
    normalised = config.get("do_normalize", True)
    size = config.get("size")
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    return {
        "mean": config.get("image_mean", [0.5] * 3) if normalised else [0.0] * 3,
        "std": config.get("image_std", [0.5] * 3) if normalised else [1.0] * 3,
        "interpolation": PIL_INTERPOLATION[config.get("resample", 2)],
        "crop_pct": image_size / shortest if shortest else 1.0,
        "crop_mode": "center" if shortest else "squash",
    }


def _load_tensors(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise ValueError(
                f"{path} holds more than tensors and plain values and is not opened, since unpickling can run code; "
                "save its state dict alone, or as safetensors"
            ) from error
        raise _damaged(path, error) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged or incomplete ({_first_line(error)}); copy or download it again")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path.parent} is not a Hugging Face model folder: it has no {path.name}") from error
    except json.JSONDecodeError as error:
        raise _damaged(path, error) from error
    return content


def _parse_json(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _to_layout_of(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    converted: dict[str, Tensor] = dict(state if convert is None else convert(dict(state), model))
    return converted


def _head_names(classifier: str | Sequence[str]) -> tuple[str, ...]:
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _head_keys(model: nn.Module) -> set[str]:
    network: Any = model
    names = _head_names(network.pretrained_cfg["classifier"])
    return {key for key in model.state_dict() if any(key.startswith(f"{name}.") for name in names)}


def _head_size(state: Mapping[str, Tensor], architecture: str) -> int:
    config = timm.get_pretrained_cfg(architecture)
    weight = state.get(f"{_head_names(config.classifier if config else 'head')[0]}.weight")
    return 0 if weight is None else len(weight)


def _infer_image_size(
    state: Mapping[str, Tensor], architecture: str, model_args: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Reads the size off a square position embedding; `None` where there is none or it is not square."""
    if state.get("pos_embed") is None or state["pos_embed"].ndim != 3:
        return None
    probe: Any = build_model(architecture, 0, model_args=model_args)
    patches = state["pos_embed"].shape[1] - (0 if getattr(probe, "no_embed_class", False) else probe.num_prefix_tokens)
    side = isqrt(patches)
    patch = probe.patch_embed.patch_size
    return (side * patch[0], side * patch[1]) if side * side == patches else None


def _load_exactly(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    current = model.state_dict()
    missing, extra = sorted(current.keys() - state.keys()), sorted(state.keys() - current.keys())
    mismatched = sorted(key for key in current.keys() & state.keys() if current[key].shape != state[key].shape)
    problems = [
        f"{len(keys)} {what} ({keys[0]}, …)" for what, keys in (("missing", missing), ("unknown", extra)) if keys
    ]
    problems += [f"{key} is {tuple(state[key].shape)}, expected {tuple(current[key].shape)}" for key in mismatched[:1]]
    if problems:
        network: Any = model
        raise ValueError(
            f"{path} does not fit {network.pretrained_cfg['architecture']}: {'; '.join(problems)}; "
            "name the architecture that it was saved from"
        )
    model.load_state_dict(state)

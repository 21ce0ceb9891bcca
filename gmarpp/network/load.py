"""Networks from files: whole ones, and starts of a fine-tuning."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from gmarpp.files import first_line
from gmarpp.network.build import build_model
from gmarpp.network.formats import read_weights
from gmarpp.network.preprocessing import get_image_size, set_preprocessing
from gmarpp.network.state_dict import at_most_parameters, load_exactly, require_same_layout, to_layout_of
from gmarpp.network.weights import Weights

logger = logging.getLogger(__name__)


def load_model(path: str | Path, architecture: str | None = None) -> nn.Module:
    """Builds the network that a file describes and loads its weights.

    Before memory is taken for the network, the file's description is compared with the weights in it. Checksums are
    compared where the file has any.

    Args:
        path: a `.ckpt` of this project, a timm `.safetensors` or `.pth`, or a folder from the Hugging Face Hub: of a
            timm network or of a `ViTForImageClassification`.
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

    That weights and description belong together is checked before any memory is taken for the network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of an unknown kind, does not tell its architecture, or describes another
            network than the one its weights are of.
    """
    weights = read_weights(path)
    architecture = architecture or weights.architecture
    if architecture is None:
        raise ValueError(
            f"{path} does not name its architecture: pass timm's name of it as architecture=, or write a file that "
            f"names it: python -m gmarpp.export --ckpt_path {path} --architecture vit_base_patch16_224 "
            "--output named.safetensors"
        )
    weights = replace(weights, architecture=architecture)
    if weights.num_classes is None:
        weights = replace(weights, num_classes=_head_size(weights.state, architecture))
    try:
        if weights.image_size is None:
            weights = replace(weights, image_size=_infer_image_size(weights))
        outline = _outline(weights)
    except ValueError as error:
        raise ValueError(f"{path} does not describe a network that can be built: {error}") from error
    require_same_layout(outline, to_layout_of(outline, weights, path), path)
    return weights


def _outline(weights: Weights) -> nn.Module:
    """Builds the network that weights describe without any memory for its parameters.

    Raises:
        ValueError: it cannot be built, or has far more parameters than there are weights.
    """
    assert weights.architecture is not None
    with torch.device("meta"), at_most_parameters(1000 + 4 * len(weights.state)):
        return build_model(weights.architecture, weights.num_classes or 0, weights.image_size, weights.model_args)


def fill_model(model: nn.Module, weights: Weights, path: str | Path) -> None:
    """Loads weights that must fit exactly, head included, and the classes and the preprocessing that go with them.

    Raises:
        ValueError: a weight is missing, unknown or of another shape; the message names it and `path`.
    """
    network: Any = model
    load_exactly(model, to_layout_of(model, weights, path), path)
    set_preprocessing(model, weights.preprocessing)
    network.classes, network.class_names = weights.classes, weights.class_names


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
    state = to_layout_of(model, weights, path, resample=True)
    current = model.state_dict()
    head = _head_keys(model)
    keep = all(key in state and state[key].shape == current[key].shape for key in head) and (
        not classes or not weights.classes or tuple(classes) == weights.classes
    )
    if not keep:
        state = {key: value for key, value in state.items() if key not in head} | {key: current[key] for key in head}
        logger.info("%s: the head is not loaded, it is not for these classes", path)
    load_exactly(model, state, path)
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
            f"({first_line(error)}); give a local file with --model.weights, or start from random weights with "
            "--model.pretrained false"
        ) from error
    current = model.state_dict()
    fits: bool = source.pretrained_cfg["num_classes"] == network.num_classes
    kept = set() if fits else _head_keys(model)
    model.load_state_dict({key: current[key] if key in kept else value for key, value in source.state_dict().items()})
    return fits


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


def _infer_image_size(weights: Weights) -> tuple[int, int] | None:
    """Reads the size off a square position embedding; `None` where there is none or it is not square."""
    embedding = weights.state.get("pos_embed")
    if embedding is None or embedding.ndim != 3:
        return None
    outline: Any = _outline(weights)
    patch = getattr(getattr(outline, "patch_embed", None), "patch_size", None)
    if patch is None:
        return None
    patches = embedding.shape[1]
    patches -= 0 if getattr(outline, "no_embed_class", False) else getattr(outline, "num_prefix_tokens", 0)
    side = isqrt(max(patches, 0))
    return (side * patch[0], side * patch[1]) if side and side * side == patches else None

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
from gmarpp.network.build import build_model, undrawn_weights
from gmarpp.network.files.formats import read_weights
from gmarpp.network.files.prefix import part_of_network
from gmarpp.network.files.state_dict import at_most_parameters, load_exactly, require_same_layout, to_layout_of
from gmarpp.network.files.weights import Weights
from gmarpp.network.preprocessing import get_image_size, set_preprocessing

logger = logging.getLogger(__name__)

# Timm's names of the tokens that come before the patches.
PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")


def load_model(path: str | Path, architecture: str | None = None) -> nn.Module:
    """Build the network that a file describes and load its weights.

    Before memory is taken for the network, the file's description is compared with the weights in it. Checksums are
    compared where the file has any.

    Args:
        path: a `.ckpt` by Lightning, weights of timm or in its naming (`.safetensors`, `.pth`, `.pth.tar`), or a folder
            from the Hugging Face Hub: of a timm network or of a classifier of transformers.
        architecture: timm's name of the network, for files that do not name it themselves. In them, the network may
            stand under any prefix.

    Returns:
        The network in evaluation mode, with plain attributes `classes` and `class_names` (tuples of str, empty when
        the file does not say), `task` (one of `gmarpp.network.task.TASKS`) and a `pretrained_cfg` that holds the
        preprocessing it was trained with, which a folder of transformers may lack.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: it is a network of transformers, which is not installed.
        ValueError: the file is damaged, of an unknown kind or architecture, or does not fit its architecture.
    """
    return build_network(describe_weights(path, architecture))


def build_network(weights: Weights) -> nn.Module:
    """Build the network that complete weights describe, as `load_model` does."""
    if weights.configuration:
        # transformers takes seconds to import.
        from gmarpp.network.files.transformers_classifier import build_classifier

        return build_classifier(weights)
    assert weights.architecture is not None
    assert weights.num_classes is not None
    with undrawn_weights():
        model = build_model(weights.architecture, weights.num_classes, weights.image_size, weights.model_args)
    set_preprocessing(model, weights.preprocessing)
    fill_model(model, weights)
    return model.eval()


def describe_weights(path: str | Path, architecture: str | None = None) -> Weights:
    """Return what `read_weights` does, with what the file does not say itself found out by `complete`."""
    return complete(read_weights(path), architecture)


def complete(weights: Weights, architecture: str | None = None) -> Weights:
    """Return weights whose description has no gaps.

    That weights and description belong together is checked before any memory is taken for the network.

    Args:
        weights: as read.
        architecture: timm's name of the network, where the weights do not name it themselves.

    Raises:
        ValueError: the weights do not tell their architecture, or are of another network than the one described.
    """
    if weights.configuration and architecture is None:
        return weights
    architecture = architecture or weights.architecture
    if architecture is None:
        raise ValueError(
            f"{weights.origin} does not name its architecture: pass timm's name of it as architecture=, on command "
            f"lines --model vit_base_patch16_224 or your own class of the network, --model my_code.MyNetwork, or write "
            f"a file that names it: python -m gmarpp.export --ckpt_path {weights.origin} "
            "--architecture vit_base_patch16_224 --output named.safetensors"
        )
    weights = replace(weights, architecture=architecture)
    if weights.num_classes is None:
        weights = replace(weights, state=_own_part(weights))
        weights = replace(weights, num_classes=_head_size(weights.state, architecture))
    if weights.image_size is None:
        weights = replace(weights, image_size=_infer_image_size(weights.state))
    try:
        outline = _outline(weights)
    except ValueError as error:
        raise ValueError(f"{weights.origin} does not describe a network that can be built: {error}") from error
    require_same_layout(outline, to_layout_of(outline, weights), weights.origin)
    return weights


def _own_part(weights: Weights) -> dict[str, Tensor]:
    """Return the part of a state dict that is an architecture's, found by the names that its weights have."""
    assert weights.architecture is not None
    with torch.device("meta"), at_most_parameters(1000 + 4 * len(weights.state)):
        names = build_model(weights.architecture, 1, None, weights.model_args).state_dict()
    return part_of_network(weights.state, names, weights.origin)


def _outline(weights: Weights) -> nn.Module:
    """Build the network that weights describe without any memory for its parameters.

    Raises:
        ValueError: it cannot be built, or has far more parameters than there are weights.
    """
    assert weights.architecture is not None
    with torch.device("meta"), at_most_parameters(1000 + 4 * len(weights.state)):
        return build_model(weights.architecture, weights.num_classes or 0, weights.image_size, weights.model_args)


def fill_model(model: nn.Module, weights: Weights) -> None:
    """Load weights that must fit exactly, head included, and the classes that go with them.

    Raises:
        ValueError: a weight is missing, unknown or of another shape; the message names it and its file.
    """
    network: Any = model
    load_exactly(model, to_layout_of(model, weights), weights.origin)
    network.classes, network.class_names, network.task = weights.classes, weights.class_names, weights.task


def load_weights(model: nn.Module, weights: Weights, classes: Sequence[str] = ()) -> bool:
    """Load weights into a network as the start of a fine-tuning.

    The position embedding and the patch projection are resampled where sizes differ. Their head is used only when
    it has as many outputs as the network's and its classes, where both are known, are `classes` in the same order.

    Returns:
        Whether the head was loaded.

    Raises:
        ValueError: they are another architecture's.
    """
    weights = replace(weights, state=part_of_network(weights.state, model.state_dict(), weights.origin))
    state = to_layout_of(model, weights, resample=True)
    current = model.state_dict()
    head = _head_keys(model)
    keep = all(key in state and state[key].shape == current[key].shape for key in head) and (
        not classes or not weights.classes or tuple(classes) == weights.classes
    )
    if not keep:
        state = {key: value for key, value in state.items() if key not in head} | {key: current[key] for key in head}
        logger.info("%s: the head is not loaded, it is not for these classes", weights.origin)
    load_exactly(model, state, weights.origin)
    return keep


def load_pretrained(model: nn.Module, architecture: str) -> bool:
    """Load timm's pretrained weights from the Hugging Face Hub, all but a head that is for other classes.

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


def _infer_image_size(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return the size that a square position embedding is for; `None` where there is none or it is not square."""
    embedding, projection = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if embedding is None or embedding.ndim != 3 or projection is None or projection.ndim != 4:
        return None
    prefix = sum(state[name].shape[1] for name in PREFIX_TOKENS if name in state and state[name].ndim == 3)
    # Some networks embed the positions of patches alone, others those of their further tokens, too.
    for patches in (embedding.shape[1], embedding.shape[1] - prefix):
        side = isqrt(max(patches, 0))
        if side and side * side == patches:
            return side * projection.shape[2], side * projection.shape[3]
    return None

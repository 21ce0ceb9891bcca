"""What a training starts from: a network built from options, and the weights that it is given once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gmarpp.network.build import build_model
from gmarpp.network.files.load import load_pretrained, load_weights
from gmarpp.network.files.weights import Weights
from gmarpp.network.preprocessing import set_preprocessing

DEFAULT_ARCHITECTURE = "vit_large_patch16_224.augreg_in21k_ft_in1k"


def start_architecture(architecture: str | None, source: Weights) -> str:
    """Return timm's name of the network to train: the one asked for, else that of the start weights, else a ViT-L/16.

    Raises:
        ValueError: the start weights do not name their architecture, or are for another one.
    """
    source.require_timm()
    if architecture is None and source.path is not None and source.architecture is None:
        raise ValueError(f"{source.path} does not name its architecture: set --model.architecture to timm's name of it")
    architecture = architecture or source.architecture or DEFAULT_ARCHITECTURE
    # What follows the point names timm's weights, which the file's replace.
    if source.architecture is not None and source.architecture.partition(".")[0] != architecture.partition(".")[0]:
        raise ValueError(
            f"{source.path} holds a {source.architecture}, not a {architecture}: "
            f"set --model.architecture {source.architecture}"
        )
    return architecture


def build_start(architecture: str, source: Weights, options: Mapping[str, Any]) -> nn.Module:
    """Build a network with random weights, and its start weights' size and preprocessing where options ask for none.

    Args:
        architecture: timm's name.
        source: start weights, or `Weights({})`.
        options: of a `ViTClassifier`.

    Raises:
        ValueError: naming the option by which the network cannot be built.
    """
    size = source.image_size if options["image_size"] is None else options["image_size"]
    model_args = source.model_args | (options["model_args"] or {})
    try:
        model: Any = build_model(architecture, options["num_classes"], size, model_args, options["drop_path"])
    except ValueError as error:
        raise ValueError(f"--model.architecture, --model.image_size or --model.model_args: {error}") from error
    asked = options["preprocessing"]
    try:
        set_preprocessing(model, source.preprocessing | (asked or {}))
    except ValueError as error:
        raise ValueError(f"--model.preprocessing {asked}: {error}") from error
    model.task = options["task"]
    built: nn.Module = model
    return built


def train_head_only(model: nn.Module) -> None:
    """Freeze everything but the classification head, of which distilled networks have two."""
    network: Any = model
    model.requires_grad_(False)
    head = network.get_classifier()
    for layer in head if isinstance(head, tuple) else (head,):
        layer.requires_grad_(True)


@dataclass(frozen=True)
class StartWeights:
    """Weights that a network is given when its first run begins without a checkpoint.

    Args:
        architecture: timm's name of the network, whose weights are on the Hugging Face Hub.
        source: what was read of a local file in place of them, or `Weights({})`.
    """

    architecture: str
    source: Weights

    def load_into(self, model: nn.Module, classes: Sequence[str], needs_head: bool) -> None:
        """Load the weights, and the head where it is for the same classes.

        Args:
            model: network.
            classes: the data's.
            needs_head: refuse weights whose head is for other classes, as where the network is not trained first.

        Raises:
            ConnectionError: the Hub cannot be reached.
            ValueError: the weights do not fit.
        """
        if self.source.path is None:
            has_head = load_pretrained(model, self.architecture)
        else:
            has_head = load_weights(model, self.source, classes)
        if needs_head and not has_head:
            network: Any = model
            origin = self.source.path or self.architecture
            raise ValueError(
                f"{origin} has no head for the data's {network.num_classes} classes: nothing "
                "can be evaluated with it; give a trained network with --ckpt_path"
            )

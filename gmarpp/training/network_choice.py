"""The network that a command line names: by a checkpoint, a name, or a class of anyone's."""

import inspect
import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import lightning as L
import torch
from jsonargparse.typing import register_type
from torch import nn

from gmarpp.network.files.formats import read_weights
from gmarpp.network.files.load import build_network, describe_weights
from gmarpp.network.files.prefix import part_of_network
from gmarpp.network.files.pretrained import pretrained_network, require_network_name
from gmarpp.network.files.state_dict import load_exactly
from gmarpp.network.files.weights import content_digest
from gmarpp.training.module import ViTClassifier
from gmarpp.training.pretrained_classifier import PretrainedClassifier
from gmarpp.training.trained_network import network_in

logger = logging.getLogger(__name__)


class NetworkName(str):
    """A name of timm's, or `hf-hub:` and that of a repository."""

    @classmethod
    def parse(cls, value: object) -> "NetworkName":
        """Return a name from the command line.

        Raises:
            ValueError: nothing has such a name.
        """
        # Of a class, the parser says itself what is wrong.
        if not isinstance(value, str) or ("." in value and find_spec(value.partition(".")[0])):
            raise ValueError("expected a name")
        try:
            require_network_name(value)
        except ValueError as error:
            raise ValueError(f"{error}; --model takes a name of timm's, hf-hub:OWNER/NAME or a class") from error
        return cls(value)


register_type(NetworkName, str, NetworkName.parse)

# A class or function is called when the network is needed, and a second time to see whether its weights are random.
NetworkChoice: TypeAlias = NetworkName | Callable[[], nn.Module] | None


def load_chosen(model: NetworkChoice, ckpt_path: str | None) -> ViTClassifier | PretrainedClassifier:
    """Return the Lightning module of the network that a command line names; only a name without a file asks the Hub.

    Args:
        model: timm's name of the network, `hf-hub:OWNER/NAME`, or what makes it, a LightningModule included; not needed
            for files that name their architecture.
        ckpt_path: file of its weights, where they do not come with it.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: the Hub cannot be reached.
        ValueError: the file does not fit the network or neither tells the weights; with what to write.
    """
    if model is None:
        return _from_file(ckpt_path)
    if isinstance(model, NetworkName):
        return _by_name(model, ckpt_path)
    network = _built(model)
    if not ckpt_path:
        _require_own_weights(model, network)
        digest = content_digest(network.state_dict(), {})
        return PretrainedClassifier(_from_images(network), type(network).__qualname__, digest)
    weights = read_weights(ckpt_path)
    if isinstance(network, L.LightningModule):
        network = _with_hyper_parameters(model, network, weights.hyper_parameters)
    load_exactly(network, part_of_network(weights.state, network.state_dict(), weights.origin), weights.origin)
    return PretrainedClassifier(_from_images(network), weights.path, weights.sha256)


def _from_file(ckpt_path: str | None) -> ViTClassifier | PretrainedClassifier:
    if not ckpt_path:
        raise ValueError(
            "--ckpt_path is missing: expected the file of a trained network, "
            "for example --ckpt_path checkpoints/vit_small_patch14_112.tiny_imagenet.safetensors, "
            "or a network that brings its weights, such as --model hf-hub:OWNER/NAME"
        )
    weights = describe_weights(ckpt_path)
    if weights.configuration:
        return PretrainedClassifier(build_network(weights), weights.path, weights.sha256)
    return ViTClassifier.from_weights(weights).eval()


def _by_name(name: NetworkName, ckpt_path: str | None) -> PretrainedClassifier:
    if not ckpt_path:
        network, digest = pretrained_network(name)
        return PretrainedClassifier(network, name, digest or content_digest(network.state_dict(), {}))
    if ":" in name:
        raise ValueError(f"--model {name} brings its weights: leave --ckpt_path {ckpt_path} out, or give a class")
    weights = describe_weights(ckpt_path, name)
    return PretrainedClassifier(build_network(weights), weights.path, weights.sha256)


def _built(make: Callable[..., nn.Module], **options: Any) -> nn.Module:
    network: Any = make(**options)
    if not isinstance(network, nn.Module):
        raise ValueError(f"--model: expected a torch.nn.Module, got a {type(network).__name__}")
    return network


def _from_images(network: nn.Module) -> nn.Module:
    """Return what makes logits of images alone: of a LightningModule without such a forward, its only network."""
    if not isinstance(network, L.LightningModule):
        return network
    try:
        return network_in(network)
    except ValueError as error:
        raise ValueError(
            f"--model: {type(network).__name__} has no forward that takes images alone, and not one network inside "
            "that could: write a forward from images to logits, or give the class of the network itself"
        ) from error


def _require_own_weights(make: Callable[..., nn.Module], network: nn.Module) -> None:
    """Refuse a network whose weights are random: those of a second one are others."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(torch.initial_seed() + 1)
        other = _built(make).state_dict()
    if drawn := [name for name, value in network.state_dict().items() if not torch.equal(value, other[name])]:
        raise ValueError(
            f"--ckpt_path is missing: {len(drawn)} weights of {type(network).__name__} are random "
            f"({', '.join(drawn[:3])}{', …' if len(drawn) > 3 else ''}): give the file of its trained weights, or a "
            "class or function that loads them"
        )


def _with_hyper_parameters(
    make: Callable[..., nn.Module], network: L.LightningModule, saved: Mapping[str, Any]
) -> nn.Module:
    """Return a LightningModule with the options that its checkpoint was trained with, as `load_from_checkpoint` does.

    Options that shape no weight would else make another network of them without a word.
    """
    known = inspect.signature(type(network).__init__).parameters
    options = {name: value for name, value in saved.items() if name in known}
    if not options:
        return network
    logger.info("%s has the options that its checkpoint was trained with: %s", type(network).__name__, options)
    return _built(make, **options)


def load_classifier(path: str | Path) -> ViTClassifier:
    """Build a `ViTClassifier` from any file that `gmarpp.load_model` reads; no network access.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of an unknown kind or architecture, or does not fit its architecture.
    """
    return ViTClassifier.from_weights(describe_weights(path)).eval()

"""Networks by a name alone, whose weights come from the Hugging Face Hub."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import snapshot_download
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from gmarpp.files import first_line
from gmarpp.network.build import require_known
from gmarpp.network.files.load import build_network, describe_weights
from gmarpp.network.preprocessing import set_preprocessing

HUB = "hf-hub:"
_SAFE_FILES = ["*.json", "model.safetensors", "model-*-of-*.safetensors"]
_OLD_FILES = ["pytorch_model.bin", "pytorch_model-*-of-*.bin"]


def require_network_name(name: str) -> None:
    """Require a name that `pretrained_network` may know; the Hub is not asked.

    Raises:
        ValueError: the name is none of timm's, and of no repository.
    """
    if not name.startswith(HUB):
        require_known(name)
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name.removeprefix(HUB)):
        raise ValueError(f"expected {HUB}OWNER/NAME, or {HUB}OWNER/NAME@REVISION, got {name!r}")


def pretrained_network(name: str) -> tuple[nn.Module, str | None]:
    """Return a network with the weights that belong to its name, as `load_model` does, and the weights' digest if any.

    Args:
        name: timm's, whose tag chooses the weights, or `hf-hub:` and the name of a repository of timm or transformers.

    Raises:
        ValueError: there are no weights of that name, or they are damaged.
        ConnectionError: the Hub cannot be reached, or has no such repository.
    """
    if name.startswith(HUB):
        weights = describe_weights(_hub_folder(name))
        return build_network(weights), weights.sha256
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ValueError(
            f"{name} has no pretrained weights: give a file of them by --ckpt_path, or choose from "
            "timm.list_pretrained()"
        )
    try:
        network: Any = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise _unreachable(name, error) from error
    set_preprocessing(network, {})
    network.model_args, network.classes, network.class_names = {}, (), ()
    if subset := infer_imagenet_subset(network):
        classes = ImageNetInfo(subset)
        network.classes = tuple(classes.label_names())
        network.class_names = tuple(classes.label_descriptions())
    return network.eval(), None


def _hub_folder(name: str) -> Path:
    """Return the folder with a repository's configuration and weights, in the Hub's cache."""
    repository, _, revision = name.removeprefix(HUB).partition("@")
    download = partial(snapshot_download, repository, revision=revision or None)
    try:
        folder = Path(download(allow_patterns=_SAFE_FILES))
        # Only where there is nothing better: these are pickles, though read without running any code.
        return folder if any(folder.glob("model*.safetensors")) else Path(download(allow_patterns=_OLD_FILES))
    except Exception as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"the weights of {name} could not be loaded from the Hugging Face Hub ({first_line(error)}): check the name "
        "and the connection, or download them and give them by --ckpt_path"
    )

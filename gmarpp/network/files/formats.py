"""The kinds of files that hold weights, each read into the same description."""

import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gmarpp.files import damaged, find_path
from gmarpp.network.expected import PREPROCESSING, expect_integer, expect_mapping, expect_names, expect_pair
from gmarpp.network.files.hugging_face import CONFIG, read_folder
from gmarpp.network.files.safe_reading import load_safetensors, load_tensors, parse_json
from gmarpp.network.files.timm_training import timm_description
from gmarpp.network.files.weights import DIGEST, DIGEST_NAME, MAX_CLASSES, Weights, content_digest

logger = logging.getLogger(__name__)

# Other projects' checkpoints may have an option architecture, too.
OWN_OPTIONS = {"model_args", "preprocessing"}
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".pth.tar")
# Training scripts keep the network under one of these, among other things; its average is what they evaluate.
STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")


def read_weights(path: str | Path) -> Weights:
    """Return the weights in a file of any of the formats of `load_model`, with the digest of what was read.

    The file is opened once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, unsafe, or of an unknown kind, or describes no network.
    """
    return replace(_read(path), path=str(path))


def _read(path: str | Path) -> Weights:
    source = find_path(path)
    suffixes = (".ckpt", ".safetensors", *TORCH_SUFFIXES)
    with _naming(path):
        if source.is_dir() and ((source / CONFIG).exists() or not source.name.endswith(suffixes)):
            return read_folder(source)
        if source.name.endswith(".ckpt"):
            return weights_of_checkpoint(*read_lightning_checkpoint(source), path)
        if source.name.endswith(".safetensors"):
            return _read_safetensors(source)
        if source.name.endswith(TORCH_SUFFIXES):
            return _read_torch(source)
    raise ValueError(
        f"{path} is of an unknown kind: expected {', '.join(suffixes)}, or the folder of a timm network or of a "
        "classifier of transformers from the Hugging Face Hub"
    )


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Name the file in errors of its description."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error) or str(find_path(path)) in str(error):
            raise
        raise ValueError(f"{path} does not describe a network that can be built: {error}") from error


def read_lightning_checkpoint(path: str | Path) -> tuple[dict[str, Any], str]:
    """Return the content of a `.ckpt` by Lightning, and the file's SHA-256.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or unsafe, or holds something else.
    """
    content, digest = load_tensors(path)
    with _naming(path):
        expect_mapping("state_dict", content.get("state_dict"))
        expect_mapping("hyper_parameters", content.setdefault("hyper_parameters", {}))
    return content, digest


def weights_of_checkpoint(content: dict[str, Any], digest: str, path: str | Path) -> Weights:
    """Return the weights in what `read_lightning_checkpoint` returns.

    Raises:
        ValueError: naming the file, and the part that describes no network.
    """
    options = content["hyper_parameters"]
    origin: dict[str, Any] = {"path": str(path), "sha256": digest}
    if "architecture" not in options or not OWN_OPTIONS & options.keys():
        # Another project's: the caller has to know what it is.
        named = {key: value for key, value in options.items() if isinstance(key, str)}
        return Weights(content["state_dict"], hyper_parameters=named, **origin)
    missing = ({"image_size", "num_classes"} | OWN_OPTIONS) - options.keys()
    prefix = "model."
    with _naming(path):
        if missing:
            raise ValueError(f"hyper_parameters: expected {', '.join(sorted(missing))}, got none")
        return Weights(
            state={key[len(prefix) :]: value for key, value in content["state_dict"].items() if key.startswith(prefix)},
            architecture=options["architecture"],
            image_size=expect_pair("image_size", options["image_size"]),
            num_classes=expect_integer("num_classes", options["num_classes"], 0, MAX_CLASSES),
            model_args=options["model_args"],
            classes=expect_names("classes", content.get("classes", ())),
            class_names=expect_names("class_names", content.get("class_names", ())),
            preprocessing=options["preprocessing"],
            task=options.get("task", "multiclass"),
            training={key: value for key, value in options.items() if not key.startswith("_")},
            **origin,
        )


def _read_safetensors(path: Path) -> Weights:
    state, metadata, digest = load_safetensors(path)
    is_digested = DIGEST in metadata or metadata.get(DIGEST_NAME) == DIGEST
    if is_digested and metadata.get(DIGEST) != content_digest(state, metadata):
        raise damaged(
            path,
            f"its content has changed; after an intended change, remove {DIGEST} and {DIGEST_NAME} from its metadata",
        )

    def parsed(key: str, absent: Any = None) -> Any:
        return parse_json(metadata[key], key) if key in metadata else absent

    size = parsed("img_size")
    texts = {"interpolation", "crop_mode"}
    return Weights(
        state=state,
        architecture=metadata.get("architecture"),
        image_size=None if size is None else expect_pair("img_size", size),
        num_classes=parsed("num_classes"),
        model_args=parsed("model_args", {}),
        classes=expect_names("classes", parsed("classes", [])),
        class_names=expect_names("class_names", parsed("class_names", [])),
        task=metadata.get("task", "multiclass"),
        preprocessing={key: metadata[key] if key in texts else parsed(key) for key in PREPROCESSING if key in metadata},
        sha256=digest,
    )


def _read_torch(path: Path) -> Weights:
    content, digest = load_tensors(path)
    nested = next((key for key in STATE_KEYS if isinstance(content.get(key), dict)), None)
    if nested is None:
        return Weights(_flat(content), sha256=digest)
    if nested.endswith("ema"):
        logger.info("%s: the averaged weights are used, %s", path, nested)
    named, options = content.get("arch"), content.get("args")
    described = timm_description(vars(options)) if isinstance(options, Namespace) else {}
    architecture = described.pop("architecture", named)
    state = {str(key): value for key, value in content[nested].items()}
    return Weights(state, architecture if isinstance(architecture, str) else None, sha256=digest, **described)


def _flat(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors in dicts inside dicts, under dotted names; what is no tensor is left out."""
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value
        elif isinstance(value, dict) and all(isinstance(each, str) for each in value):
            tensors |= _flat(value, f"{prefix}{key}.")
    return tensors

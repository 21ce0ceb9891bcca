"""What timm's training script says in its checkpoints about the network that it trained."""

from collections.abc import Mapping
from typing import Any

from gmarpp.network.expected import PREPROCESSING, expect_mapping, expect_pair


def timm_description(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of `Weights` that the options of a training tell.

    Args:
        options: of timm's `train.py`, by name; those that were not given are `None`.

    Raises:
        ValueError: an option is of the wrong type; the message names it.
    """
    given = {name: value for name, value in options.items() if value is not None}
    described: dict[str, Any] = {}
    if isinstance(model := given.get("model"), str):
        described["architecture"] = model.removeprefix("hf-hub:").removeprefix("timm/")
    if (size := given.get("input_size")) is not None:
        # Channels, height and width.
        described["image_size"] = expect_pair("input_size", list(size)[1:] if isinstance(size, (list, tuple)) else size)
    elif (size := given.get("img_size")) is not None:
        described["image_size"] = expect_pair("img_size", size)
    arguments = expect_mapping("model_kwargs", given.get("model_kwargs") or {})
    # Their own size, where they name one, is the one that the network was built with.
    if (size := arguments.pop("img_size", None)) is not None:
        described["image_size"] = expect_pair("model_kwargs.img_size", size)
    arguments.pop("num_classes", None)
    # timm's name of global_pool.
    if "gp" in given:
        arguments.setdefault("global_pool", given["gp"])
    preprocessing = {key: given[key] for key in PREPROCESSING if key in given}
    # The script takes one number for all channels, too.
    for key in {"mean", "std"} & preprocessing.keys():
        values = preprocessing[key]
        preprocessing[key] = list(values) * 3 if isinstance(values, (list, tuple)) and len(values) == 1 else values
    return {**described, "model_args": arguments, "preprocessing": preprocessing}

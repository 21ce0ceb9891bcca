"""How transformers' image processors prepare images, in timm's words."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gmarpp.network.expected import expect_integer, expect_mapping, expect_pair
from gmarpp.network.files.safe_reading import read_json

PIL_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# Processors of these families, by the beginning of their names, take a single number for the shortest edge.
BY_SHORTEST_EDGE = ("CLIP", "Bit", "ChineseCLIP", "ConvNext", "Levit")


def read_image_processor(folder: Path, digests: dict[str, str]) -> dict[str, Any]:
    """Return the configuration of the image processor in a folder, empty where there is none.

    Args:
        folder: of a network.
        digests: by file, to which what is read is added.

    Raises:
        ValueError: a file is damaged.
    """
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).exists():
            config, digest = read_json(folder / name)
            if part is None or part in config:
                digests[name] = digest
                return config if part is None else expect_mapping(part, config[part])
    return {}


def processor_preprocessing(
    config: Mapping[str, Any], image_size: tuple[int, int], resample: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return the height and width to which a processor brings images, and the rest of `PREPROCESSING`.

    Args:
        config: of the processor.
        image_size: (height, width) where it does not say.
        resample: its class's interpolation, in PIL's numbers.

    Raises:
        ValueError: an option is of the wrong type or out of range; the message names it.
    """
    size, crop_pct, crop_mode = _resized(config, image_size)
    # Mean and deviation are of values that were multiplied by this, and ours of values in [0, 1].
    rescaled = choose("do_rescale", {True: True, False: False}, config.get("do_rescale", True))
    scale = 255 * _number("rescale_factor", config.get("rescale_factor", 1 / 255)) if rescaled else 255.0
    normalized = choose("do_normalize", {True: True, False: False}, config.get("do_normalize", True))
    mean, std = (
        [_number(name, value) / scale for value in _channels(name, config.get(name, [0.5] * 3))]
        for name in ("image_mean", "image_std")
    )
    return size, {
        "mean": mean if normalized else [0.0] * 3,
        "std": std if normalized else [1 / scale] * 3,
        "interpolation": choose("resample", PIL_INTERPOLATION, config.get("resample", resample)),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }


def choose(name: str, known: Mapping[Any, Any], value: Any) -> Any:
    """Return what stands for an option's value.

    Raises:
        ValueError: the value is unknown; the message names the option.
    """
    # As a key, True equals 1.
    if type(value) not in map(type, known) or value not in known:
        raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(map(str, known))}")
    return known[value]


def _resized(config: Mapping[str, Any], image_size: tuple[int, int]) -> tuple[tuple[int, int], float, str]:
    """Return the final (height, width), the part of the resized image that it is, and how the image is resized."""
    size, crop = config.get("size"), config.get("crop_size")
    crops = choose("do_center_crop", {True: True, False: False}, config.get("do_center_crop", False))
    final = _edges("crop_size", crop) if crops and crop is not None else None
    kind = str(config.get("image_processor_type", config.get("feature_extractor_type", "")))
    if type(size) is int and kind.startswith(BY_SHORTEST_EDGE):
        size = {"shortest_edge": size}
    if isinstance(size, dict) and "shortest_edge" in size:
        final = final or image_size
        shortest = expect_integer("shortest_edge", size["shortest_edge"], min(final), 1 << 20)
        return final, min(final) / shortest, "center"
    if size is None:
        return final or image_size, 1.0, "squash"
    height, width = _edges("size", size)
    final = final or (height, width)
    if final[0] * width != final[1] * height:
        raise ValueError(f"crop_size: expected the shape of size {height}x{width}, got {final[0]}x{final[1]}")
    return final, final[0] / height, "squash"


def _edges(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, dict) and {"height", "width"} <= value.keys():
        value = [value["height"], value["width"]]
    return expect_pair(name, value)


def _channels(name: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise ValueError(f"{name}: expected three numbers, one per channel, got {value!r:.80}")
    return list(value)


def _number(name: str, value: Any) -> float:
    lowest = 0 if name == "image_mean" else 1e-9
    if type(value) not in (int, float) or not lowest <= value < 1 << 16:
        raise ValueError(f"{name}: expected {'positive ' if lowest else ''}numbers, got {value!r:.80}")
    return float(value)

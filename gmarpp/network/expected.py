"""What a description of a network may hold: checks of values that come from files and command lines."""

import math
from typing import Any

PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
# All that files name; what images can be prepared with here is a part of them.
TIMM_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random")
TIMM_CROP_MODES = ("center", "squash", "border")
MAX_PIXELS_PER_SIDE = 16_384
# No option of a network is larger; a number of layers that the weights do not have is found while building.
MAX_OPTION = 1 << 16


def expect(condition: bool, name: str, expected: str, got: Any) -> None:
    """Raise `ValueError` that names an entry, what was expected and what was got, unless a condition holds."""
    if not condition:
        text = repr(got)
        raise ValueError(f"{name}: expected {expected}, got {text if len(text) <= 80 else text[:77] + '...'}")


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number of a size that options have."""
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= MAX_OPTION


def is_plain(value: Any, depth: int = 0) -> bool:
    """Return whether a value consists of numbers, texts, lists and dicts, not nested too deep."""
    if isinstance(value, dict):
        return depth < 4 and all(isinstance(key, str) and is_plain(each, depth + 1) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return depth < 4 and all(is_plain(each, depth + 1) for each in value)
    return value is None or isinstance(value, (bool, str)) or is_number(value)


def check_preprocessing(key: str, value: Any) -> None:
    """Require that one of `PREPROCESSING` has a value that images can be prepared with.

    Raises:
        ValueError: unknown key, or a value of the wrong type or out of range.
    """
    if key in ("mean", "std"):
        triple = isinstance(value, (list, tuple)) and len(value) == 3 and all(map(is_number, value))
        fits = triple and (key == "mean" or min(value) > 0)
        expect(fits, key, f"three {'positive ' if key == 'std' else ''}numbers, one per channel", value)
    elif key == "interpolation":
        expect(value in TIMM_INTERPOLATIONS, key, f"one of {', '.join(TIMM_INTERPOLATIONS)}", value)
    elif key == "crop_pct":
        expect(is_number(value) and 0 < value <= 1, key, "a number in (0, 1]", value)
    elif key == "crop_mode":
        expect(value in TIMM_CROP_MODES, key, f"one of {', '.join(TIMM_CROP_MODES)}", value)
    else:
        raise ValueError(f"unknown preprocessing {key!r}: choose from {', '.join(PREPROCESSING)}")


def expect_integer(name: str, value: Any, lowest: int, highest: int) -> int:
    """Return an integer of a range.

    Raises:
        ValueError: the value is something else; the message names it.
    """
    expect(type(value) is int and lowest <= value <= highest, name, f"an integer from {lowest} to {highest}", value)
    return int(value)


def expect_pair(name: str, value: Any) -> tuple[int, int]:
    """Return (height, width) in pixels of a side or a pair of them.

    Raises:
        ValueError: the value is something else; the message names it.
    """
    sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
    fits = len(sides) == 2 and all(type(side) is int and 0 < side <= MAX_PIXELS_PER_SIDE for side in sides)
    expect(fits, name, f"one or two sides of 1 to {MAX_PIXELS_PER_SIDE} pixels", value)
    return sides[0], sides[1]


def expect_names(name: str, value: Any) -> tuple[str, ...]:
    """Return the names in a list.

    Raises:
        ValueError: the value is something else; the message names it.
    """
    expect(isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value), name, "a list", value)
    return tuple(value)


def expect_mapping(name: str, value: Any) -> dict[str, Any]:
    """Return a dict with strings as keys.

    Raises:
        ValueError: the value is something else; the message names it.
    """
    expect(isinstance(value, dict) and all(isinstance(key, str) for key in value), name, "values by name", value)
    return dict(value)
